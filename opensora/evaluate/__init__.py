"""Judging what models make."""
