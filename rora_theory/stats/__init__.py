"""Estimates with standard errors, moments, slopes with verdicts, paired differences, the best rate of a grid."""

from rora_theory import lazily

__getattr__, __dir__ = lazily.attributes(__name__)
