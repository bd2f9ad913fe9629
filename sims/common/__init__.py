"""Shared code of the commands: command line, options, tables, progress, answers."""
