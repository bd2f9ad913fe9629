"""The JAX path, for research: models, adapters, records, fine-tuning, evaluation and sweeps of training runs."""
