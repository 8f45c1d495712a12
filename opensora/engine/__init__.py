"""How parameters and work are placed: engines, checkpoints, averages of weights."""
