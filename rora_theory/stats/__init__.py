"""Estimates with standard errors, moments, slopes and their verdicts, paired differences, and best learning rates."""

from rora_theory import lazy_modules

__getattr__, __dir__ = lazy_modules.attributes(__name__)
