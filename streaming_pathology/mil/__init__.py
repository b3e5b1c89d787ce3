"The MIL baseline, on patches or patch embeddings."
