"""A beginning that many sequences share, read once: what follows it attends to its keys and values."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from rora_theory.llama.config import LlamaConfig
from rora_theory.llama.model import Adapter, NoAdapter, Params, forward_cached, init_cache

STEP = 16
"""Beginnings are cut to a multiple of it: each length is compiled anew, and cuDNN wants an even number of keys."""


@partial(jax.tree_util.register_dataclass, data_fields=["adapter", "key", "value"], meta_fields=[])
@dataclass(frozen=True)
class Continuation:
    """An `Adapter` under which every row continues the beginning: its positions follow the beginning's.

    Attributes:
      adapter: the model's own; None for none.
      key, value: of the beginning, as attention takes them.
    """

    adapter: Adapter | None
    key: Float[Array, "layers p k d"]
    value: Float[Array, "layers p k d"]

    @property
    def own(self) -> Adapter:
        return NoAdapter() if self.adapter is None else self.adapter

    def layers(self) -> Any:
        """See `Adapter`."""
        return self.own.layers(), self.key, self.value

    def linear(
        self, name: str, x: Array, weight: Array, bias: Array | None, layer: Any, *, key: PRNGKeyArray | None
    ) -> Array:
        """See `Adapter`."""
        return self.own.linear(name, x, weight, bias, layer[0], key=key)

    def prefix(self, layer: Any) -> tuple[Array, Array]:
        """See `Adapter`: a trained prefix, then the beginning."""
        own, (_, key, value) = self.own.prefix(layer[0]), layer
        if own is None:
            return key, value
        return jnp.concatenate([own[0].astype(key.dtype), key]), jnp.concatenate([own[1].astype(value.dtype), value])


def shared_length(sequences: Sequence[Sequence[int]], spare: int = 0) -> int:
    """How many tokens to read once: those with which all sequences begin but the last ``spare`` of them, down to a
    multiple of `STEP`."""
    first, last = min(map(tuple, sequences)), max(map(tuple, sequences))  # what these share, all between them share
    return max(0, common_length(first, last) - spare) // STEP * STEP


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def read_prompt(params: Params, tokens: Sequence[int], config: LlamaConfig, adapter: Adapter | None) -> Continuation:
    """The continuation of a beginning of one token or more."""
    key, value = _read(params, jnp.asarray([tokens], jnp.int32), adapter, config=config)
    return Continuation(adapter, key, value)


@partial(jax.jit, static_argnames="config")
def _read(params: Params, tokens: Array, adapter: Adapter | None, *, config: LlamaConfig) -> tuple[Array, Array]:
    cache = init_cache(config, 1, tokens.shape[1], params["embed_tokens"].dtype)
    _, cache = forward_cached(params, tokens, cache, config, adapter)
    return cache["k"][:, 0], cache["v"][:, 0]
