"""Eight commonsense tasks under three protocols: scored items, and accuracies with their standard errors."""

from rora_theory.evaluate.accuracies import TaskAccuracy, accuracies, average
from rora_theory.evaluate.samples import Samples
from rora_theory.evaluate.scoring import Protocol, Sample, Scoring, in_order, score, score_tasks

__all__ = [
    "Protocol",
    "Sample",
    "Samples",
    "Scoring",
    "TaskAccuracy",
    "accuracies",
    "average",
    "in_order",
    "score",
    "score_tasks",
]
