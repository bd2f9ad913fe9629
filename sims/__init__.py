"""Experiments as commands, one per file: `python -m sims.NAME --help`."""
