"""A trainer written the way the papers' repositories are, for the engine to be timed against."""
