"""Tar shards as webdataset has them: which samples they hold, where each lies in them, and how such shards are made."""
