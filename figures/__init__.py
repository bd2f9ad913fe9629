"""Plots of saved runs, one a file: `python -m figures.NAME RUN`. Reads files only; never imports `sims`."""
