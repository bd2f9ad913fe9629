"""Memory that a cell needs on a node, computed from shapes, by which a cluster schedules cells."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from rora_theory.lab.finetune import capacity, traced_cost
from rora_theory.lab.finetune.config import BaseDtype, FinetuneConfig
from rora_theory.lab.finetune.loss import LOGITS_BYTES
from rora_theory.lab.llama import LlamaConfig
from rora_theory.lab.llama.model import abstract_params
from rora_theory.runs.reading import key_of


def cell_memory(model: LlamaConfig, training: FinetuneConfig | None, dtype: BaseDtype) -> int:
    """Compute the number of bytes that a worker needs on a CPU.

    A worker fine-tunes a model and then evaluates it with the adapter merged into a copy of the weights.

    Args:
      model: Configuration of the model.
      training: Fine-tuning run with batches as wide as its cutoff; None evaluates the model only.
      dtype: Type of the base weights.
    """
    base = sum(map(traced_cost.size_in_bytes, jax.tree.leaves(abstract_params(model, jnp.dtype(dtype)))))
    # Rates and seeds take no memory: cells that differ in them share an entry of the cache.
    training_bytes = 0 if training is None else _training_memory(model, replace(training, lr=None, seed=0))
    return max(training_bytes, 2 * base + LOGITS_BYTES) + capacity.RESERVE


_cache: dict[str, int] = {}
"""Memory of training by the hash of model and configuration."""


def _training_memory(model: LlamaConfig, training: FinetuneConfig) -> int:
    key = key_of({"model": model, "training": training})
    if key not in _cache:
        width = min(training.cutoff, model.max_position_embeddings)
        _cache[key] = capacity.estimate_step(model, training, width).on_cpu(training.dtype)
    return _cache[key]
