r"""Prefix tuning: trained keys and values that every query of every layer attends to (Li and Liang 2021).

.. math:: \mathrm{softmax}\!\left(q\,[K_p; K]^\top / \sqrt d\right) [V_p; V]

:math:`K_p` and :math:`V_p` have ``virtual_tokens`` rows per layer. They are trained directly, without the network that
Li and Liang use for training (PEFT's ``prefix_projection``).

The position of the prefix matters, because rotary embeddings rotate the queries by their position. PEFT numbers the
tokens from P, the number of virtual tokens, and does not rotate the prefix keys: the score of token i is
:math:`(R_{P+i} q)^\top k_p`, where R is the rotation of a position. This package numbers the tokens from 0 with every
adapter and rotates the prefix keys by -P, which gives the same score, :math:`(R_i q)^\top R_{-P} k_p`.

The adapted model differs from its base from the start, because the prefix receives part of each query's attention.
This is also so if keys and values are zero.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from rora_theory.errors import InputError
from rora_theory.lab.adapters.base import AdaptedModule, TrainableAdapter
from rora_theory.lab.adapters.targets import layer_text
from rora_theory.lab.llama import LlamaConfig, rope
from rora_theory.lab.llama.model import Params, windowed_layers
from rora_theory.scaling import check_integer


@dataclass(frozen=True)
class PrefixConfig:
    """Configuration of prefix tuning. Frozen and hashable.

    Attributes:
      virtual_tokens: Number of keys and values per layer, at least 1. LLM-Adapters trains 10.

    Raises:
      InputError: If a value is out of range.
    """

    virtual_tokens: int = 10

    mergeable: ClassVar[bool] = False
    replaces_weights: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_integer("virtual_tokens", self.virtual_tokens)

    def table(self, llama_config: LlamaConfig) -> tuple[AdaptedModule, ...]:
        """Return the table of adapted modules, whose rank is the number of virtual tokens."""
        layers = layer_text(range(llama_config.num_hidden_layers))
        return (AdaptedModule("self_attn", layers, self.virtual_tokens, None, "prefix", None),)

    def build(self, key: PRNGKeyArray, llama_config: LlamaConfig, params: Params) -> "PrefixAdapter":  # noqa: ARG002
        """Initialise a prefix from N(0, 1), PEFT's default."""
        shape = self.shape(llama_config)
        keys = zip(("key", "value"), jax.random.split(key), strict=True)
        tensors = {name: jax.random.normal(tensor_key, shape, jnp.float32) for name, tensor_key in keys}
        return PrefixAdapter(tensors, self, llama_config)

    def shape(self, llama_config: LlamaConfig) -> tuple[int, int, int, int]:
        """Return the shape of the keys and of the values: layers, virtual tokens, key/value heads, head width."""
        layers, heads = llama_config.num_hidden_layers, llama_config.num_key_value_heads
        return layers, self.virtual_tokens, heads, llama_config.head_dim


@partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["config", "llama_config"])
@dataclass(frozen=True)
class PrefixAdapter(TrainableAdapter):
    """A prefix, a pytree that `rora_theory.lab.llama.forward` applies.

    Attributes:
      params: ``{"key", "value": [layers, virtual tokens, kv heads, head_dim]}`` in float32; the keys are not rotated,
        as in PEFT's files.
      llama_config: Configuration of the model, which determines the rotations.
    """

    params: dict[str, Any]
    config: PrefixConfig
    llama_config: LlamaConfig

    def layers(self) -> dict[str, Any]:
        """Return the keys and values of all layers, and which layers have windowed attention."""
        return {**self.params, "windowed": windowed_layers(self.llama_config)}

    def prefix(self, layer: dict[str, Array]) -> tuple[Float[Array, "p k d"], Float[Array, "p k d"]]:
        """Return the keys of one layer, rotated to the positions before token 0 (module docstring), and its values."""
        count = self.config.virtual_tokens
        angles = rope.layer_angles(self.llama_config, jnp.full((1, count), -count, jnp.int32))
        return rope.rotate(layer["key"][None], *angles(layer["windowed"]))[0], layer["value"]

    def merge(self, params: Params) -> Params:  # noqa: ARG002
        """Raise `InputError`: a prefix cannot be merged into weights."""
        raise InputError("a prefix cannot be merged into weights. Apply it without merging.")
