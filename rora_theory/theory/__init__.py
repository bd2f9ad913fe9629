"""Exact laws of an adapter's steps, with the samplers and the automatic differentiation that test them."""

from rora_theory import lazily

__getattr__, __dir__ = lazily.attributes(__name__)
