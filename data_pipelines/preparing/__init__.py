"""What is done with a data set before a run: a look at every photo, and packing them into shards."""
