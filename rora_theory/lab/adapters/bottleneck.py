r"""Bottleneck adapters of a LLaMA model's linear modules: series and parallel (Houlsby et al. 2019, He et al. 2022).

With :math:`z = W x + b` the module, :math:`D` [width, n] down and :math:`U` [m, width] up,

.. math::

    y &= W (x + U \tanh(D x_d)) + b &&\text{series, before the module: q, k, v, gate, up} \\
    y &= z + U \tanh(D z_d) &&\text{series, after the module: o, down} \\
    y &= z + U \tanh(D x_d) &&\text{parallel}

where the subscript d marks dropout. Neither has biases. The paper's tables call them Series and Parallel. They are
those of LLM-Adapters (Hu et al. 2023, its `bottleneck.py` and recorded commands): by default of width 256, D and U
normal with standard deviation 0.02, series on up_proj and gate_proj, parallel on up_proj and down_proj.
LLM-Adapters has series adapters of the feed-forward modules only; those of the attention modules are an extension.

With these settings, Parallel trains 3.54% of LLaMA-7B's and 2.89% of LLaMA-13B's parameters, as the paper's tables
state. Series trains 1.95% and 1.59%. The tables' 0.99% and 0.80% correspond to a single adapter per layer on a vector
of the model's width (``target_modules=("down_proj",)`` here).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, PRNGKeyArray

from rora_theory.errors import InputError
from rora_theory.lab.adapters.base import AdaptedModule, TrainableAdapter
from rora_theory.lab.adapters.dropout import dropout
from rora_theory.lab.adapters.targets import in_all_layers, layer_text
from rora_theory.lab.adapters.widen import widen
from rora_theory.lab.llama import MODULES, LlamaConfig, linear
from rora_theory.lab.llama.model import SAVED_PRODUCT, Params
from rora_theory.scaling import check_between, check_choice, check_integer

Placement = Literal["series", "parallel"]

TARGETS: dict[str, tuple[str, ...]] = {"series": ("up_proj", "gate_proj"), "parallel": ("up_proj", "down_proj")}
"""Modules that LLM-Adapters adapts, by placement."""

AFTER = ("self_attn.o_proj", "mlp.down_proj")
"""Modules that a series adapter follows, because their output has the model's width. It precedes all other modules."""

INIT_DEVIATION = 0.02
"""Standard deviation of the initial D and U. The adapted model differs from its base from the start."""


@dataclass(frozen=True)
class BottleneckConfig:
    """Configuration of a series or parallel adapter. Frozen and hashable.

    Attributes:
      placement: ``"series"``, in sequence with the module, or ``"parallel"`` to it.
      width: Width of the bottleneck, the number of rows of D.
      target_modules: Names of modules as `targets.resolve` matches them, each in all layers; None uses `TARGETS`.
      dropout: Probability in [0, 1) of dropping an input element of the adapter in training.

    Raises:
      InputError: If a value is out of range. Settings that depend on the model are checked by `modules`.
    """

    placement: Placement
    width: int = 256
    target_modules: Sequence[str] | None = None
    dropout: float | int = 0.0

    mergeable: ClassVar[bool] = False
    replaces_weights: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_choice("placement", self.placement, get_args(Placement))
        check_integer("bottleneck width", self.width)
        check_between("dropout", self.dropout, 0, 1, closed="left")
        modules = TARGETS[self.placement] if self.target_modules is None else self.target_modules
        if isinstance(modules, str):
            raise InputError(
                f"target_modules must be a list of names for a {self.placement} adapter, got the string {modules!r}"
            )
        # The frozen dataclass is hashable only with a tuple, and equal only with numbers of one type.
        object.__setattr__(self, "target_modules", tuple(modules))
        object.__setattr__(self, "dropout", float(self.dropout))

    def modules(self, llama_config: LlamaConfig) -> tuple[str, ...]:
        """Return the adapted modules of a model in the order of `MODULES`.

        Raises:
          InputError: If a name matches no module, or not in every layer.
        """
        assert self.target_modules is not None
        return in_all_layers(llama_config, self.target_modules, f"a {self.placement} adapter")

    def table(self, llama_config: LlamaConfig) -> tuple[AdaptedModule, ...]:
        """Return the table of adapted modules, whose rank is the bottleneck's width."""
        layers = layer_text(range(llama_config.num_hidden_layers))
        modules = self.modules(llama_config)
        return tuple(AdaptedModule(module, layers, self.width, None, self.placement, None) for module in modules)

    def shapes(self, module: str, llama_config: LlamaConfig) -> dict[str, tuple[int, int]]:
        """Return the shapes of one layer's D and U."""
        p_out, p_in = llama_config.module_shape(module)
        # A series adapter maps one side of the module to itself.
        if self.placement == "series":
            p_out = p_in = p_out if module in AFTER else p_in
        return {"adapter_down": (self.width, p_in), "adapter_up": (p_out, self.width)}

    def build(self, key: PRNGKeyArray, llama_config: LlamaConfig, params: Params) -> "BottleneckAdapter":  # noqa: ARG002
        """Initialise an adapter, see `base.init`."""
        count = llama_config.num_hidden_layers
        tensors = {}
        for module in self.modules(llama_config):
            # A key for each module, so that its draw does not depend on which other modules are adapted.
            keys = jax.random.split(jax.random.fold_in(key, MODULES.index(module)))
            tensors[module] = {
                name: INIT_DEVIATION * jax.random.normal(tensor_key, (count, *shape), jnp.float32)
                for tensor_key, (name, shape) in zip(keys, self.shapes(module, llama_config).items(), strict=True)
            }
        return BottleneckAdapter(tensors, self)


@partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["config"])
@dataclass(frozen=True)
class BottleneckAdapter(TrainableAdapter):
    """A series or parallel adapter, a pytree that `rora_theory.lab.llama.forward` applies.

    Attributes:
      params: ``{module: {"adapter_down": [layers, width, n], "adapter_up": [layers, m, width]}}`` in float32. In
        series, n = m is p_in before a module and p_out after it; in parallel, n is p_in and m is p_out.
    """

    params: dict[str, dict[str, Any]]
    config: BottleneckConfig

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
        """Apply the adapted module, see `rora_theory.lab.llama.Adapter` and the module docstring.

        The adapter's products are computed in the dtype of ``x``. Every module draws its own dropout mask.
        """
        if name not in layer:
            return linear(x, weight, bias)
        if self.config.placement == "series":
            if name not in AFTER:
                return linear(x + self._bottleneck(x, layer[name], key), weight, bias)
            # Save the output for the gradient of D: otherwise the backward pass would multiply by W again.
            z = checkpoint_name(linear(x, weight, bias), SAVED_PRODUCT)
            return z + self._bottleneck(z, layer[name], key)
        return linear(x, weight, bias) + self._bottleneck(x, layer[name], key)

    def _bottleneck(
        self, inputs: Float[Array, "*b n"], tensors: dict[str, Array], key: PRNGKeyArray | None
    ) -> Float[Array, "*b m"]:
        """Compute U tanh(D x) with dropout of the inputs x."""
        if key is not None and self.config.dropout > 0:
            inputs = dropout(key, inputs, self.config.dropout)
        inner = checkpoint_name(linear(inputs, tensors["adapter_down"].astype(inputs.dtype)), SAVED_PRODUCT)
        return widen(jnp.tanh(inner), tensors["adapter_up"].astype(inputs.dtype))

    def merge(self, params: Params) -> Params:  # noqa: ARG002
        """Raise `InputError`: a non-linear function cannot be merged into a weight."""
        raise InputError(f"a {self.config.placement} adapter cannot be merged into weights. Apply it without merging.")
