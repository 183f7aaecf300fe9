"""Runs of a sweep: what is on disk, the processes, the live table."""
