"""Rounding of values to 1, 2, 4, 8 or 16 bits, block by block."""
