"""Ground below all other packages. No file of a user's own has its name, as one may have that of `train` or `configs`."""
