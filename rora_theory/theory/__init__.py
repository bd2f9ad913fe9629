"""Exact laws of an adapter's steps, and the samplers and the automatic differentiation that judge them."""
