"""Weighted sums of wires, added into an accumulator that stays in place."""
