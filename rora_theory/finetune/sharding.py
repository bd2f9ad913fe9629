"""Many devices: one object says which logical axis of which array runs along which axis of the mesh.

A mesh has two axes. Along ``"data"`` the base weights are whole on every device; along ``"fsdp"`` they are
split, and the compiler gathers each layer's just before it is used (Rajbhandari et al. 2020, "ZeRO", stage 3).
The batch is split along both. The adapter and its optimizer state, a hundredth of the base, are whole everywhere;
weights that are trained themselves, and their optimizer state, are split as the base is.
Everything else is JAX's: arrays carry their `NamedSharding`, and one jitted step serves any mesh.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from rora_theory.adapters.base import AdapterConfig, TrainableAdapter
from rora_theory.errors import InputError
from rora_theory.finetune.config import FinetuneConfig
from rora_theory.llama import LlamaConfig, abstract_params
from rora_theory.scaling import check_integer

MESH_AXES = ("data", "fsdp")


def mesh(data: int | None = None, fsdp: int = 1, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of ``data x fsdp`` devices.

    Args:
      data: copies of the base weights; None is as many as the devices allow.
      fsdp: devices that share one copy.
      devices: None is all devices of all processes.

    Raises:
      InputError: numbers that do not make up the devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    if fsdp < 1 or len(devices) % fsdp:
        raise InputError(f"fsdp is {fsdp}; accepted is a divisor of the {len(devices)} devices")
    copies = len(devices) // fsdp
    if data not in (None, copies):
        raise InputError(
            f"data is {data} with fsdp {fsdp}; accepted is {copies}, to make up the {len(devices)} devices"
        )
    return jax.make_mesh((copies, fsdp), MESH_AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def abstract_mesh(data: int = 1, fsdp: int = 1) -> AbstractMesh:
    """A mesh of devices that need not be there, to plan with.

    Raises:
      InputError: a number below 1.
    """
    for name, value in (("data", data), ("fsdp", fsdp)):
        check_integer(name, value)
    return AbstractMesh((data, fsdp), MESH_AXES, axis_types=(AxisType.Auto,) * 2)


@dataclass(frozen=True)
class Rules:
    """Mesh axes along which each logical axis is split; the empty tuple keeps it whole.

    Attributes:
      batch: rows of a batch.
      layers: the stacked layers. Split, a layer is on one group of devices and is sent to the others whole.
      outputs, inputs: the two axes of a module's weight, [out, in].
      vocab, hidden: the two axes of the embedding and of the unembedding; ``hidden`` also that of norms.
      rank: the low-rank axis of adapter tensors and of their optimizer state.

    Raises:
      InputError: a mesh axis that would split two axes of one array, or that does not exist.
    """

    batch: tuple[str, ...] = MESH_AXES
    layers: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ("fsdp",)
    inputs: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ("fsdp",)
    hidden: tuple[str, ...] = ()
    rank: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            unknown = [axis for axis in getattr(self, field.name) if axis not in MESH_AXES]
            if unknown:
                raise InputError(
                    f"rules: {field.name} names mesh axis {unknown[0]!r}; accepted are {', '.join(MESH_AXES)}"
                )
        for names in _ARRAYS:
            owner: dict[str, str] = {}
            for name in names:
                for axis in getattr(self, name):
                    if axis in owner:
                        raise InputError(
                            f"rules: mesh axis {axis!r} splits both {owner[axis]} and {name} of one array; "
                            "accepted is one of them"
                        )
                    owner[axis] = name


_WEIGHT, _BIAS, _TABLE = ("layers", "outputs", "inputs"), ("layers", "outputs"), ("vocab", "hidden")
_NORMS = ("layers", "hidden")
_ARRAYS: tuple[tuple[str, ...], ...] = (("batch",), _WEIGHT, _TABLE, _NORMS, ("rank",))
"""Logical axes that meet in one array."""


@dataclass(frozen=True)
class Layout:
    """A mesh and its rules: where every array of a run lies.

    An axis whose length is not a multiple of its devices (a vocabulary of 32001 words on 8) is kept whole; a batch
    is refused instead.
    """

    mesh: Mesh | AbstractMesh
    rules: Rules = Rules()

    @cached_property
    def replicated(self) -> NamedSharding:
        """Whole on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    @cached_property
    def rows(self) -> NamedSharding:
        """Split by rows, as batches are."""
        return NamedSharding(self.mesh, PartitionSpec(_spec(self.rules.batch)))

    @property
    def parts(self) -> int:
        """Number of parts a batch is split into."""
        return self._devices(self.rules.batch)

    def params_shardings(self, params: Any) -> Any:
        """The tree of shardings of base weights (arrays or `jax.ShapeDtypeStruct`), for `llama.load` too."""
        return self._tree(params)

    def state_shardings(self, state: Any) -> Any:
        """The tree of shardings of a training state: whole everywhere but for adapter tensors' ``rank`` and
        for trained weights, which lie as the base's."""
        return self._tree(state)

    def params(self, params: Any) -> Any:
        """Base weights, laid out."""
        return place(params, self.params_shardings(params))

    def state(self, state: Any) -> Any:
        """A training state, laid out."""
        return place(state, self.state_shardings(state))

    def batch(self, batch: Any) -> Any:
        """A batch of host arrays, laid out by rows. Every process has the whole batch and feeds its own part.

        Raises:
          InputError: rows that can't be dealt out evenly.
        """
        rows = jax.tree.leaves(batch)[0].shape[0]
        self.check_batch(rows)
        # With the global shape stated, each process takes what its devices hold out of the whole.
        return jax.tree.map(lambda a: jax.make_array_from_process_local_data(self.rows, a, a.shape), batch)

    def check_batch(self, batch: int, accumulation: int = 1) -> None:
        """Refuse a batch that the devices can't share evenly.

        Raises:
          InputError: rows, in each of ``accumulation`` parts, that are no multiple of `parts`.
        """
        if batch % (self.parts * accumulation):
            times = "" if accumulation == 1 else f" times the {accumulation} parts of accumulation"
            raise InputError(
                f"batch_size is {batch}; accepted is a multiple of the {self.parts} devices that share it{times}"
            )

    def _devices(self, axes: tuple[str, ...]) -> int:
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def _tree(self, tree: Any) -> Any:
        def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
            spec: list[Any] = []
            for name, size in zip(_names(path, leaf.ndim), leaf.shape, strict=True):
                axes = getattr(self.rules, name) if name else ()
                spec.append(_spec(axes) if size % self._devices(axes) == 0 else None)
            # As JAX writes the shardings of results, so that a state that comes back is a state that was compiled for.
            while spec and spec[-1] is None:
                spec.pop()
            return NamedSharding(self.mesh, PartitionSpec(*spec))

        return jax.tree.map_with_path(one, tree)


class Gathered:
    """An adapter whose modules see activations split by rows, and one whole weight at a time.

    Left to itself the compiler finds it cheaper, for a short batch, to send the activations round and to leave the
    weights where they are. A module's weight is gathered for its product and dropped, and gathered again in the
    backward pass: kept, the gathered weights of all layers would be the whole model on every device. The barrier before
    it has the compiler gather a matrix: it gathers a layer of the stack in another order of axes, of which it makes a
    copy of all that the device has of the weights.

    Args:
      adapter: any trainable adapter; this one is used in its place in a step.
      layout: where the arrays lie.
    """

    def __init__(self, adapter: TrainableAdapter, layout: Layout) -> None:
        self._adapter, self._layout = adapter, layout

    @property
    def params(self) -> Any:
        return self._adapter.params

    @property
    def config(self) -> AdapterConfig:
        return self._adapter.config

    def replace(self, params: Any) -> "Gathered":
        return Gathered(self._adapter.replace(params), self._layout)

    def layers(self) -> Any:
        return self._adapter.layers()

    def linear(self, name: str, x: Array, weight: Array, bias: Array | None, layer: Any, *, key: Array | None) -> Array:
        rows = self._layout.rows
        x = jax.lax.with_sharding_constraint(x, rows)
        weight = jax.lax.with_sharding_constraint(jax.lax.optimization_barrier(weight), self._layout.replicated)
        y = self._adapter.linear(name, x, weight, bias, layer, key=key)
        return jax.lax.with_sharding_constraint(y, rows)

    def prefix(self, layer: Any) -> Any:
        return self._adapter.prefix(layer)

    def merge(self, params: Any) -> Any:
        return self._adapter.merge(params)

    def unmerge(self, params: Any, norms: Any = None) -> Any:
        return self._adapter.unmerge(params, norms)

    def count(self) -> int:
        return self._adapter.count()

    def table(self) -> Any:
        return self._adapter.table()


def over_all_devices(llama_config: LlamaConfig, config: FinetuneConfig, *, fsdp: int = 1) -> tuple[Layout | None, Any]:
    """The layout of a run on all devices, and where its base weights lie; None and None on a single device.

    Args:
      llama_config: the base model's.
      config: of the run.
      fsdp: devices that share one copy of the weights; the others hold further copies.

    Raises:
      InputError: the devices can't share the batch evenly, or are no multiple of ``fsdp``.
    """
    if len(jax.devices()) == 1:
        return None, None
    layout = Layout(mesh(fsdp=fsdp))
    layout.check_batch(config.batch_size, config.accumulation)
    return layout, layout.params_shardings(abstract_params(llama_config, jnp.dtype(config.dtype), config.quantization))


def place(tree: Any, shardings: Any) -> Any:
    """Arrays on their devices. With several processes, each holds the whole tree and places its own parts."""
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def one(leaf: Any, sharding: NamedSharding) -> Any:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raw = one(jax.random.key_data(leaf), NamedSharding(sharding.mesh, PartitionSpec()))
            return jax.random.wrap_key_data(raw, impl=jax.random.key_impl(leaf))
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(one, tree, shardings)


def _spec(axes: tuple[str, ...]) -> str | tuple[str, ...] | None:
    return axes if len(axes) > 1 else (axes[0] if axes else None)


def _names(path: tuple[Any, ...], ndim: int) -> tuple[str | None, ...]:
    """Logical axes of an array by where it stands in its tree; None for an axis that is never split."""
    keys = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
    names: tuple[str | None, ...] | None = {
        "weight": _WEIGHT,
        "bias": _BIAS,
        "embed_tokens": _TABLE,
        "lm_head": _TABLE,
        "norm": ("hidden",),
        "input_layernorm": _NORMS,
        "post_attention_layernorm": _NORMS,
        "pre_feedforward_layernorm": _NORMS,
        "post_feedforward_layernorm": _NORMS,
        "lora_A": (None, "rank", None),
        "lora_B": (None, None, "rank"),
    }.get(keys[-1] if keys else "")
    return (None,) * ndim if names is None or len(names) != ndim else names
