"""Plots of saved runs, one a file: `python -m figures.NAME RUN`. Reads files only: of `sims` it takes but how a command
begins and ends."""
