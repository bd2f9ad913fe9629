"""Fine-tuning: batches from records, the loss, the jitted step, and a training loop that resumes after a kill."""

from rora_theory.lab.data.batches import Batch, Batches, Examples, choose_widths, prefetch, split_records, tokenize
from rora_theory.lab.data.records import Record, RecordSet, read_record_set, read_records
from rora_theory.lab.finetune.config import FinetuneConfig
from rora_theory.lab.finetune.loop import NonFiniteLossError, Paused, StepCompleted, Trainer, ValidationCompleted
from rora_theory.lab.finetune.metrics import Metrics
from rora_theory.lab.finetune.training_data import TrainingData, prepare

__all__ = [
    "Batch",
    "Batches",
    "Examples",
    "FinetuneConfig",
    "Metrics",
    "NonFiniteLossError",
    "Paused",
    "Record",
    "RecordSet",
    "StepCompleted",
    "Trainer",
    "TrainingData",
    "ValidationCompleted",
    "choose_widths",
    "prefetch",
    "prepare",
    "read_record_set",
    "read_records",
    "split_records",
    "tokenize",
]
