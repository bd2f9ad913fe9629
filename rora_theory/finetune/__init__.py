"""Fine-tuning: records to batches, the loss, the jitted step, and a loop that survives being killed."""

from rora_theory.data.batches import Batch, Batches, Examples, choose_widths, iterate, split, tokenize
from rora_theory.data.records import Record, read_records
from rora_theory.finetune.config import FinetuneConfig
from rora_theory.finetune.loop import NonFiniteLossError, Paused, Stepped, Trainer, Validated

__all__ = [
    "Batch",
    "Batches",
    "Examples",
    "FinetuneConfig",
    "NonFiniteLossError",
    "Paused",
    "Record",
    "Stepped",
    "Trainer",
    "Validated",
    "choose_widths",
    "iterate",
    "read_records",
    "split",
    "tokenize",
]
