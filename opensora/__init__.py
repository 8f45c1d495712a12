"""opensora: open video generation and world-model training.

Importing this package costs torch and pydantic at most; every heavy package is imported inside
the one file that owns it, when it is used.
"""

__version__ = "0.1.0"
