"""Support for tests: tiny models and records, brute force by other routes, run-time shape checks."""

from support import checker

__all__ = ["checker"]
