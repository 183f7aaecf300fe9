"""Disturbing a run at random moments: `python launch/torture`."""
