"""Who computes what, and how ranks talk."""
