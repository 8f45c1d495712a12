"""What tests of commands share."""

from tests.infer.conftest import pipeline

__all__ = ["pipeline"]
