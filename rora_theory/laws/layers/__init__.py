"""Test of the first-step law on real layers: fixed gradients and inputs of a model's modules, random adapters."""
