"""Keeping the entries of largest magnitude, and adding them up on receipt."""
