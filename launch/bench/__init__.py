"""Measuring against what one would write instead: `python launch/bench WHAT`."""

LOADING = ("data", "resident", "decode", "listing", "trainer")
"""What of it is about where batches come from."""
