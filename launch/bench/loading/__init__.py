"""Benches of the data path."""
