"""Training of a whole model: embeddings, norms and all modules, for pretraining."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from rora_theory.lab.adapters.base import AdaptedModule, TrainableAdapter
from rora_theory.lab.llama import LlamaConfig
from rora_theory.lab.llama.model import Params


@dataclass(frozen=True)
class WholeModelConfig:
    """Configuration of the training of all weights. Frozen and hashable."""

    mergeable: ClassVar[bool] = True
    replaces_weights: ClassVar[bool] = True

    def table(self, llama_config: LlamaConfig) -> tuple[AdaptedModule, ...]:  # noqa: ARG002
        """Return no rows: no module is adapted."""
        return ()

    def build(self, key: PRNGKeyArray, llama_config: LlamaConfig, params: Params) -> "WholeModel":  # noqa: ARG002
        """Start from the given weights, in float32."""
        return WholeModel(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), self)


@partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["config"])
@dataclass(frozen=True)
class WholeModel(TrainableAdapter):
    """All weights of a model as the trainable parameters of a run; no module is adapted.

    `rora_theory.lab.finetune.step.batch_loss` reads these weights in place of the frozen base.

    Attributes:
      params: Weights in the tree of `rora_theory.lab.llama.model`, in float32.
    """

    params: Params
    config: WholeModelConfig

    def layers(self) -> dict[str, Array]:
        """Return no arrays: the step reads the parameters in place of the base weights."""
        return {}

    def merge(self, params: Params) -> Params:  # noqa: ARG002
        return self.params
