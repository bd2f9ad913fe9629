r"""Prefix tuning: trained keys and values that every query of every layer attends to (Li and Liang 2021).

.. math:: \mathrm{softmax}\!\left(q\,[K_p; K]^\top / \sqrt d\right) [V_p; V]

with :math:`K_p, V_p` of ``virtual_tokens`` rows a layer, trained as they are, without the network that Li and Liang
put before them in training (PEFT's ``prefix_projection``).

Where the prefix stands decides what it computes, since the model's own queries turn with their position. PEFT counts
the tokens from ``virtual_tokens`` on and turns no prefix key: the score of token i is :math:`(R_{P+i} q)^\top k_p`
with R the rotation of a position and P the number of virtual tokens. Here the tokens are counted from 0 with any
adapter, so the keys are turned by -P, which is the same score: :math:`(R_i q)^\top R_{-P} k_p`.

The adapted model does not start as its base: each query shares its attention with the prefix. Zero values would not
do that either, since a zero key takes attention from the others.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from rora_theory.adapters.base import AdaptedModule, Norms
from rora_theory.adapters.targets import layer_text
from rora_theory.errors import InputError
from rora_theory.llama import LlamaConfig, linear, rope
from rora_theory.llama.model import Params, windowed_layers
from rora_theory.scaling import check_integer

PrefixInit = Literal["normal", "zero"]


@dataclass(frozen=True)
class PrefixConfig:
    """Settings of a prefix. Frozen and hashable.

    Attributes:
      virtual_tokens: keys and values a layer, at least 1. LLM-Adapters trains 10.
      init: ``"normal"``, N(0, 1), as PEFT's embedding starts; or ``"zero"``, PEFT's option of that name.

    Raises:
      InputError: a value outside these ranges.
    """

    virtual_tokens: int = 10
    init: PrefixInit = "normal"

    mergeable: ClassVar[bool] = False
    replaces: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_integer("virtual_tokens", self.virtual_tokens)
        if self.init not in get_args(PrefixInit):
            raise InputError(f"init is {self.init!r}; accepted are {', '.join(get_args(PrefixInit))}")

    def table(self, llama_config: LlamaConfig) -> tuple[AdaptedModule, ...]:
        """See `base.table`."""
        layers = layer_text(range(llama_config.num_hidden_layers))
        return (AdaptedModule("self_attn", layers, self.virtual_tokens, None, "prefix", None),)

    def build(self, key: PRNGKeyArray, llama_config: LlamaConfig, params: Params) -> "PrefixAdapter":  # noqa: ARG002
        """A fresh adapter, see `base.init`."""
        shape = self.shape(llama_config)
        if self.init == "zero":
            return PrefixAdapter({"key": jnp.zeros(shape), "value": jnp.zeros(shape)}, self, llama_config)
        own = zip(("key", "value"), jax.random.split(key), strict=True)
        tensors = {name: jax.random.normal(draw, shape, jnp.float32) for name, draw in own}
        return PrefixAdapter(tensors, self, llama_config)

    def shape(self, llama_config: LlamaConfig) -> tuple[int, int, int, int]:
        """Of the keys, and of the values: layers, virtual tokens, key/value heads, their width."""
        layers, heads = llama_config.num_hidden_layers, llama_config.num_key_value_heads
        return layers, self.virtual_tokens, heads, llama_config.head_dim


@partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["config", "llama_config"])
@dataclass(frozen=True)
class PrefixAdapter:
    """A prefix: a pytree that `rora_theory.llama.forward` runs.

    Attributes:
      params: ``{"key", "value": [layers, virtual tokens, kv heads, head_dim]}`` float32, the keys as PEFT holds them.
      config: the settings it was made from.
      llama_config: the model's, whose rotations place the prefix.
    """

    params: dict[str, Any]
    config: PrefixConfig
    llama_config: LlamaConfig

    def layers(self) -> dict[str, Any]:
        """See `rora_theory.llama.Adapter`."""
        return {**self.params, "windowed": windowed_layers(self.llama_config)}

    def linear(
        self,
        name: str,  # noqa: ARG002
        x: Float[Array, "*b i"],
        weight: Float[Array, "o i"],
        bias: Float[Array, " o"] | None,
        layer: dict[str, Array],  # noqa: ARG002
        *,
        key: PRNGKeyArray | None,  # noqa: ARG002
    ) -> Float[Array, "*b o"]:
        """The module as it is."""
        return linear(x, weight, bias)

    def prefix(self, layer: dict[str, Array]) -> tuple[Float[Array, "p k d"], Float[Array, "p k d"]]:
        """Keys, turned to where the tokens are counted from 0 (module docstring), and values of one layer."""
        count = self.config.virtual_tokens
        angles = rope.layer_angles(self.llama_config, jnp.full((1, count), -count, jnp.int32))
        return rope.rotate(layer["key"][None], *angles(layer["windowed"]))[0], layer["value"]

    def replace(self, params: Any) -> "PrefixAdapter":
        """See `base.replace`."""
        return replace(self, params=params)

    def merge(self, params: Params) -> Params:  # noqa: ARG002
        """Raises `InputError`: no weight of a plain model attends to a prefix."""
        raise InputError("a prefix can't be merged into weights; accepted is running it beside them")

    def unmerge(self, params: Params, norms: Norms | None = None) -> Params:
        """Raises as `merge`."""
        del norms
        return self.merge(params)

    def count(self) -> int:
        """See `base.count`."""
        return sum(math.prod(tensor.shape) for tensor in self.params.values())

    def table(self) -> tuple[AdaptedModule, ...]:
        """See `base.table`."""
        return self.config.table(self.llama_config)
