"""Training: the plan of what learns, the loop, checkpoints, recovery and several ranks."""
