"""Noise processes, levels, solvers, guidance and masks: tensors and callables only."""
