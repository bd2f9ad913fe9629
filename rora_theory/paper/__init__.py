"""The RoRA paper: its equations as printed, a verdict on each, its printed tables and their audit."""

from rora_theory import lazily

__getattr__, __dir__ = lazily.attributes(__name__)
