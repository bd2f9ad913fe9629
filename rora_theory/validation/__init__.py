"""Validation of configuration fields: ranges declared beside the field, and lists of ranks, steps and rules."""
