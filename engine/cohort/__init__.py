"""What learns: peers with their heads, the method, optimisers, averages, random streams."""
