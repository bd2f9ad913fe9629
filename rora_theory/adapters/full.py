r"""Full fine-tuning: the weights of chosen modules are themselves what is trained, in float32.

.. math:: y = W x + b, \qquad W \text{ trained, from the base model's}

What an adapter of the same modules is a restriction of: its update :math:`\gamma B A` has rank r at most, this one any.
Biases, norms, embeddings and the other modules stay as they are. The products are made in the base weights' dtype, so
that a bfloat16 run rounds the float32 weights anew at every step, as mixed precision does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from rora_theory.adapters.base import AdaptedModule, Norms, with_weights
from rora_theory.adapters.targets import in_all_layers, layer_text
from rora_theory.advice.lora_config import PAPER_TARGETS
from rora_theory.errors import InputError
from rora_theory.llama import LlamaConfig, linear
from rora_theory.llama.model import Params


@dataclass(frozen=True)
class FullConfig:
    """Which modules are trained, each in all layers. Frozen and hashable.

    Attributes:
      target_modules: names of modules as `targets.resolve` matches them.
    """

    target_modules: Sequence[str] = PAPER_TARGETS

    mergeable: ClassVar[bool] = True
    replaces: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.target_modules, str):
            raise InputError(f"target_modules is {self.target_modules!r} for full fine-tuning; accepted are names")
        object.__setattr__(self, "target_modules", tuple(self.target_modules))

    def table(self, llama_config: LlamaConfig) -> tuple[AdaptedModule, ...]:
        """See `base.table`; the rank is that of a whole weight."""
        layers = layer_text(range(llama_config.num_hidden_layers))
        return tuple(
            AdaptedModule(module, layers, min(llama_config.module_shape(module)), None, "full", None)
            for module in in_all_layers(llama_config, self.target_modules, "full fine-tuning")
        )

    def build(self, key: PRNGKeyArray, llama_config: LlamaConfig, params: Params) -> "FullAdapter":  # noqa: ARG002
        """The base model's weights in float32: see `base.init`."""
        modules = in_all_layers(llama_config, self.target_modules, "full fine-tuning")
        weights = {module: {"weight": params["layers"][module]["weight"].astype(jnp.float32)} for module in modules}
        return FullAdapter(weights, self, llama_config)


@partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["config", "llama_config"])
@dataclass(frozen=True)
class FullAdapter:
    """Trained weights in the place of the model's: a pytree that `rora_theory.llama.forward` runs.

    Attributes:
      params: ``{module: {"weight": [layers, p_out, p_in]}}`` float32.
      config: the settings it was made from.
      llama_config: the model's.
    """

    params: dict[str, dict[str, Any]]
    config: FullConfig
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
        key: PRNGKeyArray | None,  # noqa: ARG002
    ) -> Float[Array, "*b o"]:
        """The module with its trained weight, rounded to the dtype of the base's."""
        return linear(x, layer[name]["weight"].astype(weight.dtype) if name in layer else weight, bias)

    def prefix(self, layer: Any) -> None:
        """None: no prefix."""

    def replace(self, params: Any) -> "FullAdapter":
        """See `base.replace`."""
        return replace(self, params=params)

    def merge(self, params: Params) -> Params:
        """See `base.merge`."""
        old = params["layers"]
        return with_weights(
            params, {name: own["weight"].astype(old[name]["weight"].dtype) for name, own in self.params.items()}
        )

    def unmerge(self, params: Params, norms: Norms | None = None) -> Params:
        """Raises `InputError`: what the weights were before is nowhere in them."""
        del params, norms
        raise InputError("full fine-tuning can't be undone from the weights; accepted is the base model")

    def count(self) -> int:
        """See `base.count`."""
        return sum(own["weight"].size for own in self.params.values())

    def table(self) -> tuple[AdaptedModule, ...]:
        """See `base.table`."""
        return self.config.table(self.llama_config)
