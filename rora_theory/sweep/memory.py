"""How much memory a cell that fine-tunes takes of a node, from shapes alone: what a cluster places it by."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from rora_theory.finetune import capacity, traced_cost
from rora_theory.finetune.config import BaseDtype, FinetuneConfig
from rora_theory.finetune.loss import LOGITS_BYTES
from rora_theory.llama import LlamaConfig
from rora_theory.llama.model import abstract_params
from rora_theory.runs.reading import key_of


def cell_memory(model: LlamaConfig, training: FinetuneConfig | None, dtype: BaseDtype) -> int:
    """Bytes that a worker takes on a CPU: it fine-tunes a model, then measures it with what was trained merged in.

    Args:
      model: its shapes.
      training: the run, of batches as wide as its cutoff; None measures the model as it is.
      dtype: of the base weights.
    """
    base = sum(map(traced_cost.size_in_bytes, jax.tree.leaves(abstract_params(model, jnp.dtype(dtype)))))
    trained = 0 if training is None else _of_training(model, replace(training, lr=None, seed=0))
    return max(trained, 2 * base + LOGITS_BYTES) + capacity.RESERVE


_known: dict[str, int] = {}
"""Cells differ by rates and seeds, which take no memory."""


def _of_training(model: LlamaConfig, training: FinetuneConfig) -> int:
    key = key_of({"model": model, "training": training})
    if key not in _known:
        width = min(training.cutoff, model.max_position_embeddings)
        _known[key] = capacity.account(model, training, width).on_cpu(training.dtype)
    return _known[key]
