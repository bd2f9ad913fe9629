"""Eight commonsense tasks under three protocols: scored items, and accuracies with their standard errors."""

from rora_theory.evaluate.levels import Level, average, levels
from rora_theory.evaluate.samples import Samples
from rora_theory.evaluate.scoring import Protocol, Sample, Scoring, in_order, score, score_tasks

__all__ = [
    "Level",
    "Protocol",
    "Sample",
    "Samples",
    "Scoring",
    "average",
    "in_order",
    "levels",
    "score",
    "score_tasks",
]
