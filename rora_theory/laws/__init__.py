"""Exact laws of an adapter's steps, with the samplers and the automatic differentiation that test them."""

from rora_theory import lazy_modules

__getattr__, __dir__ = lazy_modules.attributes(__name__)
