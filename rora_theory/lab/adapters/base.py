"""Interface of all adapters.

An adapter is a pytree that the model applies (`rora_theory.lab.llama.Adapter`: ``layers``, ``linear``, ``prefix``).
Training, merging and reporting use the methods of `TrainableAdapter`. To add a kind of adapter, implement a
configuration (`AdapterConfig`) and a subclass of `TrainableAdapter`; nothing else changes.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
from jaxtyping import Array, PRNGKeyArray

from rora_theory.lab.llama import LlamaConfig
from rora_theory.lab.llama.model import NoAdapter, Params
from rora_theory.lab.llama.quantised import dense_params, is_quantised

Trained = TypeVar("Trained", bound="TrainableAdapter")


class AdaptedModule(NamedTuple):
    """Row of the table of adapted modules: the layers of a module with the same rank and alpha.

    Attributes:
      module: Name of the module.
      layers: Layer indices, such as ``"0-3, 7"``.
      rank: Rank; the width of a bottleneck, the number of virtual tokens of a prefix.
      alpha: Alpha; None for methods without one.
      rule: Scaling rule, or the name of a method without one.
      scaling: Scaling factor; None for methods without one.
    """

    module: str
    layers: str
    rank: int
    alpha: float | None
    rule: str
    scaling: float | None


class TrainableAdapter(NoAdapter):
    """Base class of adapters, frozen dataclasses that are pytrees.

    Attributes:
      params: Trainable parameters, a pytree of float32 arrays; its leaves have a leading axis of the layers.
      config: Configuration of the adapter.
    """

    params: Any
    config: Any

    def layers(self) -> Any:
        """Return the parameters, scanned over the layers beside the weights."""
        return self.params

    def replace(self: Trained, params: Any) -> Trained:
        """Return the adapter with other trainable parameters of the same structure."""
        return dataclasses.replace(self, params=params)  # type: ignore[type-var]

    def merge(self, params: Params) -> Params:
        """Merge the adapter into the weights of the base model.

        A plain model with the merged weights computes the same as the base model with the adapter, without dropout. The
        merge is computed in float32 and rounded once to the weights' dtype. Quantised weights become dense.

        Returns:
          The merged weights.

        Raises:
          InputError: If the adapter's configuration is not ``mergeable``.
        """
        raise NotImplementedError

    def count(self) -> int:
        """Return the number of trainable parameters, without the padding of ranks."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.params))


@runtime_checkable
class AdapterConfig(Protocol):
    """A frozen, hashable configuration of an adapter, independent of a model."""

    @property
    def mergeable(self) -> bool:
        """Whether the adapter can be merged into the weights of the base model."""
        ...

    @property
    def replaces_weights(self) -> bool:
        """Whether the trained parameters replace weights, so that there is no adapter to write besides the model."""
        ...

    def build(self, key: PRNGKeyArray, llama_config: LlamaConfig, params: Params) -> TrainableAdapter:
        """Initialise an adapter of this configuration.

        The adapted model starts with the outputs of the base model, except with a prefix or a
        bottleneck.

        Args:
          key: Random key of the initial values.
          params: Weights of the base model, from which DoRA's magnitudes and full fine-tuning start.

        Returns:
          The adapter.

        Raises:
          InputError: If the configuration does not fit the model.
        """
        ...

    def table(self, llama_config: LlamaConfig) -> tuple[AdaptedModule, ...]:
        """Return the table of adapted modules, with a row for the layers of a module that share rank and alpha."""
        ...


def share(adapter: TrainableAdapter, params: Params) -> float:
    """Return the trainable fraction of all parameters, counted as in PEFT and the published tables.

    Args:
      adapter: Adapter whose parameters are trained.
    """
    trainable_count = adapter.count()
    base_count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params, is_leaf=is_quantised))
    return trainable_count / (base_count if adapter.config.replaces_weights else trainable_count + base_count)


def with_weights(params: Params, weights: Mapping[str, Array]) -> Params:
    """Return dense model parameters with the weights of some modules replaced.

    Args:
      weights: New weights, ``{module: [layers, out, in]}``.
    """
    layers = {**params["layers"]}
    for name, weight in weights.items():
        layers[name] = {**layers[name], "weight": weight}
    return dense_params({**params, "layers": layers})
