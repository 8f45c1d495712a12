"""Operators that everything above is built from: attention, positions, layers, convolution."""
