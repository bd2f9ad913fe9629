"""Trained runs without any training."""

from rora_theory.stats.trained_runs import TrainedRun


def trained_run(method: str = "lora", rank: int = 8, gamma: float = 2.0, rate: float = 0.1, **values) -> TrainedRun:
    """Return a run of seed 0 with a loss of 1 and no losses by record unless stated."""
    defaults = {"seed": 0, "loss": 1.0, "records": None, "tokens": None}
    return TrainedRun(method, rank, gamma, rate, **(defaults | values))
