"""The RoRA paper: its equations as printed, a verdict on each, and an audit of its printed tables."""

from rora_theory import lazy_modules

__getattr__, __dir__ = lazy_modules.attributes(__name__)
