"""What a data set is on disk: its files, their samples by id, and what is said of files that are missing or wrong."""
