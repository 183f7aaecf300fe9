"""`python launch/bench gpu`: all that a GPU has to show, in parts that are limited in time and fail alone."""
