"""Training: the loop (time), the tasks (what a step computes), optimizers, tracking."""
