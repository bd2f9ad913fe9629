r"""Full fine-tuning: the weights of selected modules are trained in float32.

.. math:: y = W x + b, \qquad W \text{ trained, initialised from the base model}

A low-rank adapter of the same modules is a restriction: its update :math:`\gamma B A` has at most rank r. Biases,
norms, embeddings and all other modules are frozen. The products are computed in the dtype of the base weights, so a
bfloat16 run rounds the float32 weights at every step, as mixed precision does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from rora_theory.advice.adapter_config import PAPER_TARGETS
from rora_theory.errors import InputError
from rora_theory.lab.adapters.base import AdaptedModule, TrainableAdapter, with_weights
from rora_theory.lab.adapters.targets import in_all_layers, layer_text
from rora_theory.lab.llama import LlamaConfig, linear
from rora_theory.lab.llama.model import Params
from rora_theory.lab.llama.quantised import to_dense


@dataclass(frozen=True)
class FullConfig:
    """Configuration of full fine-tuning. Frozen and hashable.

    Attributes:
      target_modules: Names of the trained modules as `targets.resolve` matches them, each in all layers.

    Raises:
      InputError: If ``target_modules`` is a string.
    """

    target_modules: Sequence[str] = PAPER_TARGETS

    mergeable: ClassVar[bool] = True
    replaces_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.target_modules, str):
            raise InputError(
                f"target_modules must be a list of names for full fine-tuning, got the string {self.target_modules!r}"
            )
        object.__setattr__(self, "target_modules", tuple(self.target_modules))

    def table(self, llama_config: LlamaConfig) -> tuple[AdaptedModule, ...]:
        """Return the table of the trained modules; the rank is the largest rank of a weight."""
        layers = layer_text(range(llama_config.num_hidden_layers))
        return tuple(
            AdaptedModule(module, layers, min(llama_config.module_shape(module)), None, "full", None)
            for module in in_all_layers(llama_config, self.target_modules, "full fine-tuning")
        )

    def build(self, key: PRNGKeyArray, llama_config: LlamaConfig, params: Params) -> "FullAdapter":  # noqa: ARG002
        """Initialise the trained weights from the base model's, see `base.init`."""
        modules = in_all_layers(llama_config, self.target_modules, "full fine-tuning")
        weights = {
            module: {"weight": to_dense(params["layers"][module]["weight"]).astype(jnp.float32)} for module in modules
        }
        return FullAdapter(weights, self)


@partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["config"])
@dataclass(frozen=True)
class FullAdapter(TrainableAdapter):
    """Trained weights that replace the model's, a pytree that `rora_theory.lab.llama.forward` applies.

    Attributes:
      params: ``{module: {"weight": [layers, p_out, p_in]}}`` in float32.
    """

    params: dict[str, dict[str, Any]]
    config: FullConfig

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
        """Apply the module with its trained weight, rounded to the dtype of the base weight."""
        return linear(x, layer[name]["weight"].astype(weight.dtype) if name in layer else weight, bias)

    def merge(self, params: Params) -> Params:
        base = params["layers"]
        weights = {name: tensors["weight"].astype(base[name]["weight"].dtype) for name, tensors in self.params.items()}
        return with_weights(params, weights)
