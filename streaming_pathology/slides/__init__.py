"From the scanner to the network."
