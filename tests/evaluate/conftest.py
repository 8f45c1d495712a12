"""What tests of suites share."""

from tests.infer.conftest import pipeline

__all__ = ["pipeline"]
