"Exact streaming of any CNN."
