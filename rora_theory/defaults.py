"""Default batch sizes and names of models, which functions and commands share."""

TRAIN_BATCH_SIZE = 16
"""Number of records per training step: that of the published runs."""

SCORE_BATCH_SIZE = 8
"""Number of prompts per batch for ``generate``, and of device calls in flight for ``label`` and ``harness``."""

MEASURE_BATCH_SIZE = 8
"""Number of records in the batch that yields the gradient, and in the held-out batch."""

SMALL_BATCH_SIZE = 4
"""Number of records per step where many short runs are compared, and of windows per batch for a perplexity."""

MODEL_NAMES = {"smollm2-135m": "SmolLM2-135M", "gemma3-270m": "Gemma 3 270M"}
"""Names in words of the models that an option names, for figures and pages."""
