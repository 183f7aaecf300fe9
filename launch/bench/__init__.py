"""Measuring against what one would write instead: `python launch/bench WHAT`."""
