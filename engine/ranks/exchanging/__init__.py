"""What peers show each other in a step: who gets which rows, in how many bytes, and how they travel."""
