r"""Bottleneck adapters of a LLaMA model's linear modules: series and parallel (Houlsby et al. 2019, He et al. 2022).

With :math:`z = W x + b` the module, :math:`D` [width, in] down, :math:`U` [out, width] up, and f elementwise,

.. math::

    y = z + s\, U f(D z_d) \quad\text{(series)}, \qquad y = z + s\, U f(D x_d) \quad\text{(parallel)}

where d marks dropout. Neither has biases. Both are what the paper's Tables call Series and Parallel, with
LLM-Adapters' settings (Hu et al. 2023): width 256, tanh, series on up_proj and gate_proj, parallel on up_proj and
down_proj.

U starts at zero and D as LoRA's A, so that the adapted model starts as its base: a random U would add noise to every
layer of a trained model before the first step. Recalled of LLM-Adapters and not verified: that it starts so too (its
option is named after another method), that s is 1, that there are no biases, and that its series adapter sits at the
module's output. Of these the Tables' shares of trainable parameters can tell something: Parallel's 3.54% of LLaMA-7B
and 2.89% of LLaMA-13B are those of the settings above without biases; Series' 0.99% and 0.80% are those of a single
adapter a layer on a vector of the model's width (``target_modules=("down_proj",)`` here), where up_proj and gate_proj
have 5.08% and 4.17%.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, PRNGKeyArray

from rora_theory.adapters.base import Norms, Params, Row
from rora_theory.adapters.dropout import dropout
from rora_theory.adapters.inits import init_a
from rora_theory.adapters.targets import full_name, layer_text, matched
from rora_theory.errors import InputError
from rora_theory.llama import MODULES, LlamaConfig, linear
from rora_theory.llama.model import PRODUCT

Placement = Literal["series", "parallel"]
NonLinearity = Literal["tanh", "relu", "silu", "gelu"]

TARGETS: dict[str, tuple[str, ...]] = {"series": ("up_proj", "gate_proj"), "parallel": ("up_proj", "down_proj")}
"""LLM-Adapters' modules, by placement."""

FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
}


@dataclass(frozen=True)
class BottleneckConfig:
    """Settings of a series or parallel adapter. Frozen and hashable.

    Attributes:
      placement: ``"series"``, fed by the module's output, or ``"parallel"``, fed by its input.
      width: rows of D, at least 1.
      target_modules: names of modules as `targets.resolve` matches them, each in all layers; None is `TARGETS`'.
      non_linearity: f.
      scaling: s, above 0.
      dropout: probability in [0, 1) of dropping an input element of the adapter, in training.

    Raises:
      InputError: a value outside these ranges. What depends on the model is checked when there is one.
    """

    placement: Placement
    width: int = 256
    target_modules: Sequence[str] | None = None
    non_linearity: NonLinearity = "tanh"
    scaling: float | int = 1.0
    dropout: float | int = 0.0

    mergeable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name, kind in (("placement", Placement), ("non_linearity", NonLinearity)):
            if getattr(self, name) not in get_args(kind):
                raise InputError(f"{name} is {getattr(self, name)!r}; accepted are {', '.join(get_args(kind))}")
        if isinstance(self.width, bool) or not isinstance(self.width, int) or self.width < 1:
            raise InputError(f"bottleneck width is {self.width!r}; accepted is an integer of 1 or more")
        if not _is_number(self.scaling) or not 0 < self.scaling < math.inf:
            raise InputError(f"scaling is {self.scaling!r}; accepted is a finite number above 0")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise InputError(f"dropout is {self.dropout!r}; accepted is a number from 0 to below 1")
        modules = TARGETS[self.placement] if self.target_modules is None else self.target_modules
        if isinstance(modules, str):
            raise InputError(f"target_modules is {modules!r} for a {self.placement} adapter; accepted are names")
        for name, value in (("target_modules", tuple(modules)), ("scaling", float(self.scaling))):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "dropout", float(self.dropout))

    def modules(self, llama_config: LlamaConfig) -> tuple[str, ...]:
        """The adapted modules of a model, in the order of `MODULES`.

        Raises:
          InputError: a name that matches nothing, or not in every layer.
        """
        assert self.target_modules is not None
        chosen = set(matched(llama_config, self.target_modules, None))
        count = llama_config.num_hidden_layers
        found = []
        for module in MODULES:
            layers = [layer for layer in range(count) if full_name(layer, module) in chosen]
            if layers and len(layers) < count:
                raise InputError(
                    f"target_modules choose {module} in layers {layer_text(layers)} of {count}; accepted for a "
                    f"{self.placement} adapter is a module in all layers"
                )
            if layers:
                found.append(module)
        return tuple(found)

    def table(self, llama_config: LlamaConfig) -> tuple[Row, ...]:
        """See `base.table`."""
        layers = layer_text(range(llama_config.num_hidden_layers))
        modules = self.modules(llama_config)
        return tuple(Row(module, layers, self.width, None, self.placement, self.scaling) for module in modules)

    def shapes(self, module: str, llama_config: LlamaConfig) -> dict[str, tuple[int, int]]:
        """Shapes of one layer's D and U."""
        p_out, p_in = llama_config.module_shape(module)
        fed_by = p_out if self.placement == "series" else p_in
        return {"adapter_down": (self.width, fed_by), "adapter_up": (p_out, self.width)}

    def build(self, key: PRNGKeyArray, llama_config: LlamaConfig, params: Params) -> "BottleneckAdapter":  # noqa: ARG002
        """A fresh adapter, see `base.init`: D is U(-1/sqrt(n), 1/sqrt(n)) with n its inputs, U zero."""
        count = llama_config.num_hidden_layers
        tensors = {}
        for module in self.modules(llama_config):
            shapes = self.shapes(module, llama_config)
            own = jax.random.fold_in(key, MODULES.index(module))
            tensors[module] = {
                "adapter_down": init_a(own, "kaiming_uniform", (self.width,) * count, *shapes["adapter_down"]),
                "adapter_up": jnp.zeros((count, *shapes["adapter_up"]), jnp.float32),
            }
        return BottleneckAdapter(tensors, self, llama_config)


@partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["config", "llama_config"])
@dataclass(frozen=True)
class BottleneckAdapter:
    """A series or parallel adapter: a pytree that `rora_theory.llama.forward` runs.

    Attributes:
      params: ``{module: {"adapter_down": [layers, width, n], "adapter_up": [layers, p_out, width]}}`` float32, n being
        p_out in series and p_in in parallel.
      config: the settings it was made from.
      llama_config: the model's.
    """

    params: dict[str, dict[str, Any]]
    config: BottleneckConfig
    llama_config: LlamaConfig

    def layers(self) -> dict[str, dict[str, Any]]:
        """See `rora_theory.llama.Adapter`."""
        return self.params

    def linear(
        self,
        name: str,
        x: Float[Array, "*b i"],
        weight: Float[Array, "o i"],
        bias: Float[Array, " o"] | None,
        layer: dict[str, dict[str, Array]],
        *,
        key: PRNGKeyArray | None,
    ) -> Float[Array, "*b o"]:
        """The adapted module, see `rora_theory.llama.Adapter` and the module docstring.

        The adapter's products are made in the dtype of ``x``. Every module draws its own dropout mask.
        """
        plain = linear(x, weight, bias)
        if name not in layer:
            return plain
        config, tensors = self.config, layer[name]
        fed = x
        if config.placement == "series":
            # Kept for the gradient of D: else the backward pass would multiply by W again.
            fed = plain = checkpoint_name(plain, PRODUCT)
        if key is not None and config.dropout > 0:
            fed = dropout(jax.random.fold_in(key, MODULES.index(name)), fed, config.dropout)
        inner = checkpoint_name(linear(fed, tensors["adapter_down"].astype(x.dtype)), PRODUCT)
        up = config.scaling * tensors["adapter_up"]
        return plain + linear(FUNCTIONS[config.non_linearity](inner), up.astype(x.dtype))

    def prefix(self, layer: Any) -> None:
        """None: no prefix."""

    def replace(self, params: Any) -> "BottleneckAdapter":
        """See `base.replace`."""
        return replace(self, params=params)

    def merge(self, params: Params) -> Params:  # noqa: ARG002
        """Raises `InputError`: what is not linear is no change of a weight."""
        raise InputError(
            f"a {self.config.placement} adapter can't be merged into weights; accepted is running it beside them"
        )

    def unmerge(self, params: Params, norms: Norms | None = None) -> Params:
        """Raises as `merge`."""
        del norms
        return self.merge(params)

    def count(self) -> int:
        """See `base.count`."""
        return sum(math.prod(tensor.shape) for tensor in jax.tree.leaves(self.params))

    def table(self) -> tuple[Row, ...]:
        """See `base.table`."""
        return self.config.table(self.llama_config)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
