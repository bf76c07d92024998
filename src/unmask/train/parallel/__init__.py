"""Training on many devices: the only package that knows that devices come in numbers."""
