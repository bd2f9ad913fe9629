"""The RoRA paper: its equations as printed, a verdict on each, and an audit of its printed tables."""

from rora_theory import lazily

__getattr__, __dir__ = lazily.attributes(__name__)
