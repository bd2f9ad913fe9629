"""Exact laws of an adapter's steps, and the samplers and the automatic differentiation that judge them."""

from rora_theory import lazily

__getattr__, __dir__ = lazily.attributes(__name__)
