"""Denoisers, one file each: `model(x, t, cond) -> prediction`, single-device code."""
