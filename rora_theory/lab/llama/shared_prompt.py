"""Evaluation of a prefix that many sequences share: its keys and values are computed once for all of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from rora_theory.lab.llama.config import LlamaConfig
from rora_theory.lab.llama.model import Adapter, NoAdapter, Params, forward_cached, init_cache

LENGTH_MULTIPLE = 16
"""Divisor of the length of a shared prefix: each length compiles anew, and cuDNN needs an even number of keys."""


@partial(jax.tree_util.register_dataclass, data_fields=["adapter", "key", "value"], meta_fields=[])
@dataclass(frozen=True)
class Continuation:
    """An `Adapter` under which every row continues a shared prefix: its positions follow the prefix's.

    Attributes:
      key: Rotated keys of the shared prefix.
      value: Values of the shared prefix.
    """

    adapter: Adapter | None
    key: Float[Array, "layers p k d"]
    value: Float[Array, "layers p k d"]

    @property
    def inner_adapter(self) -> Adapter:
        """Adapter of the model, or the one that changes nothing."""
        return NoAdapter() if self.adapter is None else self.adapter

    def layers(self) -> Any:
        """Return the inner adapter's arrays and the shared keys and values, layer by layer."""
        return self.inner_adapter.layers(), self.key, self.value

    def linear(
        self, name: str, x: Array, weight: Array, bias: Array | None, layer: Any, *, key: PRNGKeyArray | None
    ) -> Array:
        """Apply the inner adapter's module."""
        return self.inner_adapter.linear(name, x, weight, bias, layer[0], key=key)

    def prefix(self, layer: Any) -> tuple[Array, Array]:
        """Return the keys and values that every query sees: a trained prefix, then the shared tokens'."""
        trained, (_, key, value) = self.inner_adapter.prefix(layer[0]), layer
        if trained is None:
            return key, value
        trained_key, trained_value = trained
        key = jnp.concatenate([trained_key.astype(key.dtype), key])
        return key, jnp.concatenate([trained_value.astype(value.dtype), value])


def shared_length(sequences: Sequence[Sequence[int]], spare: int = 0) -> int:
    """Return the number of leading tokens that all sequences share, rounded down to a multiple of `LENGTH_MULTIPLE`.

    Args:
      sequences: Token ids of each sequence.
      spare: Number of shared tokens to leave out. Pass 1 if every sequence must have a token after the prefix.
    """
    # A prefix that the lexicographically first and last sequences share is a prefix of all sequences.
    first, last = min(map(tuple, sequences)), max(map(tuple, sequences))
    return max(0, common_length(first, last) - spare) // LENGTH_MULTIPLE * LENGTH_MULTIPLE


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the number of leading tokens that two sequences have in common."""
    differing = (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(differing, min(len(first), len(second)))


def read_prompt(params: Params, tokens: Sequence[int], config: LlamaConfig, adapter: Adapter | None) -> Continuation:
    """Compute the keys and values of a shared prefix of one token or more.

    Args:
      tokens: Token ids of the prefix.

    Returns:
      An adapter under which the model continues the prefix.
    """
    key, value = _keys_and_values(params, jnp.asarray([tokens], jnp.int32), adapter, config=config)
    return Continuation(adapter, key, value)


@partial(jax.jit, static_argnames="config")
def _keys_and_values(
    params: Params, tokens: Array, adapter: Adapter | None, *, config: LlamaConfig
) -> tuple[Array, Array]:
    cache = init_cache(config, 1, tokens.shape[1], params["embed_tokens"].dtype)
    _, cache = forward_cached(params, tokens, cache, config, adapter)
    return cache["k"][:, 0], cache["v"][:, 0]
