"""One training step, evaluation, and what watches both."""
