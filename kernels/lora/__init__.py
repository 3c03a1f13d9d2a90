"""A frozen product with a low-rank product of each client beside it."""
