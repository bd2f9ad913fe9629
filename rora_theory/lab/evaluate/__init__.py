"""Evaluation on eight commonsense tasks under three protocols: samples, and accuracies with standard errors."""

from rora_theory.lab.evaluate.accuracies import TaskAccuracy, accuracies, average
from rora_theory.lab.evaluate.samples import Samples
from rora_theory.lab.evaluate.scoring import Protocol, Sample, Scoring, in_order, score, score_tasks

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
