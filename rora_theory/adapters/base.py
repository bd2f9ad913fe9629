"""What every kind of adapter offers, and the functions that call it.

An adapter is a pytree that the model runs (`rora_theory.llama.Adapter`: ``layers``, ``linear``, ``prefix``)
and that training, merging and reporting handle through the methods below. A new kind is a config with ``build`` and
``table`` and an adapter with these methods; nothing else changes.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
from jaxtyping import Array, Float, PRNGKeyArray

from rora_theory.llama import Adapter, LlamaConfig
from rora_theory.llama.model import Params
from rora_theory.llama.quantised import dense_params, is_quantised

Norms = dict[str, Float[Array, "layers out"]]


class AdaptedModule(NamedTuple):
    """One line of the resolved table: layers of a module that share a rank, an alpha and hence a scaling.

    Of a series or parallel adapter the rank is the bottleneck's width, of a prefix the number of virtual tokens; the
    rule is the method's name, and what the method does not have is None.
    """

    module: str
    layers: str
    rank: int
    alpha: float | None
    rule: str
    scaling: float | None


@runtime_checkable
class TrainableAdapter(Adapter, Protocol):
    """An `Adapter` with parameters to train."""

    @property
    def params(self) -> Any: ...
    @property
    def config(self) -> "AdapterConfig": ...
    def replace(self, params: Any) -> "TrainableAdapter": ...
    def merge(self, params: Params) -> Params: ...
    def unmerge(self, params: Params, norms: Norms | None = None) -> Params: ...
    def count(self) -> int: ...
    def table(self) -> tuple[AdaptedModule, ...]: ...


@runtime_checkable
class AdapterConfig(Protocol):
    """A frozen, hashable description of an adapter, before there is a model.

    ``mergeable``: whether weights of a plain model can compute what the base with the adapter does. ``replaces``:
    whether its parameters take the place of weights, so that there is nothing beside the model to write.
    """

    @property
    def mergeable(self) -> bool: ...
    @property
    def replaces(self) -> bool: ...
    def build(self, key: PRNGKeyArray, llama_config: LlamaConfig, params: Params) -> TrainableAdapter: ...
    def table(self, llama_config: LlamaConfig) -> tuple[AdaptedModule, ...]: ...


AnyAdapter = TypeVar("AnyAdapter", bound=TrainableAdapter)


def init(key: PRNGKeyArray, config: AdapterConfig, llama_config: LlamaConfig, params: Params) -> Any:
    """A fresh adapter: the adapted model computes what ``params`` alone does, except under a prefix.

    Args:
      key: of the random initial values.
      config: the kind of adapter and its settings.
      llama_config: the base model's shape.
      params: the base model's weights, which DoRA's magnitudes start from.

    Raises:
      InputError: the configuration does not fit the model.
    """
    return config.build(key, llama_config, params)


def trainable(adapter: TrainableAdapter) -> Any:
    """The pytree of float32 arrays that training changes, and all that it changes."""
    return adapter.params


def replace(adapter: AnyAdapter, params: Any) -> AnyAdapter:
    """The adapter with other trainable values of the same structure."""
    return adapter.replace(params)  # type: ignore[return-value]


def merge(adapter: TrainableAdapter, params: Params) -> Params:
    """Weights of a plain model that computes what ``params`` with the adapter does (dropout off).

    Computed in float32 and rounded once to the weights' dtype. Weights held in blocks come out dense.

    Raises:
      InputError: an adapter whose config is not ``mergeable``.
    """
    return adapter.merge(params)


def unmerge(adapter: TrainableAdapter, params: Params, norms: Norms | None = None) -> Params:
    """The inverse of `merge`, up to rounding; DoRA needs the ``norms`` of before the merge (`dora.norms`)."""
    return adapter.unmerge(params, norms)


def count(adapter: TrainableAdapter) -> int:
    """Number of trainable parameters, by true ranks: padding does not count."""
    return adapter.count()


def share(adapter: TrainableAdapter, params: Params) -> float:
    """Trainable parameters over all, the base's and the adapter's, as PEFT and the published tables count."""
    own = adapter.count()
    base = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params, is_leaf=is_quantised))
    return own / (base if adapter.config.replaces else own + base)


def with_weights(params: Params, weights: Mapping[str, Array]) -> Params:
    """A model's parameters, all of them arrays, with other weights of some modules, ``{module: [layers, out, in]}``."""
    layers = {**params["layers"]}
    for name, weight in weights.items():
        layers[name] = {**layers[name], "weight": weight}
    return dense_params({**params, "layers": layers})


def table(
    adapter: TrainableAdapter | AdapterConfig, llama_config: LlamaConfig | None = None
) -> tuple[AdaptedModule, ...]:
    """What is adapted and how strongly: one row for the layers of a module that share rank and alpha.

    Args:
      adapter: an adapter, or a config with ``llama_config``.
      llama_config: for a config, the model it is for.
    """
    return adapter.table() if llama_config is None else adapter.table(llama_config)  # type: ignore[call-arg]
