"""Runnable experiments, one a file: `python -m sims.NAME --help`."""
