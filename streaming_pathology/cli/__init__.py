"The commands."
