"Measurements beside other packages."
