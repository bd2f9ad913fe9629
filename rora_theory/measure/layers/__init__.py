"""First steps in real layers: measured with sampled adapters, and computed by the law."""
