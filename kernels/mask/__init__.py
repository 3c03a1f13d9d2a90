"""Masks of secure aggregation: keystreams that cancel in the sum."""
