"""Estimates with standard errors, moments, slopes and their verdicts, paired differences, and best learning rates."""

from rora_theory import lazily

__getattr__, __dir__ = lazily.attributes(__name__)
