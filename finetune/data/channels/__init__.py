"""Images of more than 8 bits, and of other channels than RGB."""
