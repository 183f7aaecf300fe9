"""How a cohort trains: config, placement, exchange, the step and the loop, evaluation, checkpoints, tracking."""
