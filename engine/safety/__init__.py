"""What keeps a run alive: checkpoints, rollbacks, health, signals."""
