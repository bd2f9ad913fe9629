"""Training on several devices: a layout maps the logical axes of every array to the axes of a device mesh.

A mesh has two axes. The base weights are replicated along ``"data"`` and split along ``"fsdp"``, where the compiler
gathers a layer's weights just before they are used (Rajbhandari et al. 2020, "ZeRO", stage 3). The batch is split along
both axes. The adapter and its optimizer state, about a hundredth of the base, are replicated everywhere. In full
fine-tuning, the trained weights and their optimizer state are split as the base weights are. JAX does the rest: arrays
carry their `NamedSharding`, and the same jitted step runs on any mesh.
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

from rora_theory.errors import InputError
from rora_theory.lab.adapters.base import AdapterConfig, TrainableAdapter
from rora_theory.lab.finetune.config import FinetuneConfig
from rora_theory.lab.llama import LlamaConfig, abstract_params
from rora_theory.scaling import check_integer

MESH_AXES = ("data", "fsdp")


def mesh(data: int | None = None, fsdp: int = 1, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return a mesh of ``data x fsdp`` devices.

    Args:
      data: Number of copies of the base weights; None uses all devices.
      fsdp: Number of devices that share one copy.
      devices: Devices of the mesh; None means all devices of all processes.

    Raises:
      InputError: If ``data * fsdp`` is not the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    if fsdp < 1 or len(devices) % fsdp:
        raise InputError(f"fsdp must be a divisor of the number of devices, {len(devices)}, got {fsdp}")
    copies = len(devices) // fsdp
    if data not in (None, copies):
        raise InputError(f"data must be {copies} with fsdp {fsdp}, to use all {len(devices)} devices, got {data}")
    return jax.make_mesh((copies, fsdp), MESH_AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def abstract_mesh(data: int = 1, fsdp: int = 1) -> AbstractMesh:
    """Return a mesh for planning, without physical devices.

    Args:
      data: Number of copies of the base weights.
      fsdp: Number of devices that share one copy.

    Raises:
      InputError: If a number is below 1.
    """
    for name, value in (("data", data), ("fsdp", fsdp)):
        check_integer(name, value)
    return AbstractMesh((data, fsdp), MESH_AXES, axis_types=(AxisType.Auto,) * 2)


@dataclass(frozen=True)
class Rules:
    """Mesh axes that split each logical axis of the arrays; an empty tuple does not split it.

    Attributes:
      batch: Rows of a batch.
      layers: Stacked layers. If split, each layer is on one group of devices, which sends it to the other groups.
      outputs: First axis of a module's weight, [out, in].
      inputs: Second axis of a module's weight.
      vocab: First axis of the embedding and the unembedding, [vocab, hidden].
      hidden: Second axis of the embedding and the unembedding, and the axis of norm weights.
      rank: Low-rank axis of adapter tensors and of their optimizer state.

    Raises:
      InputError: If a mesh axis does not exist or would split two axes of the same array.
    """

    batch: tuple[str, ...] = MESH_AXES
    layers: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ("fsdp",)
    inputs: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ("fsdp",)
    hidden: tuple[str, ...] = ()
    rank: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Validate the settings."""
        for field in fields(self):
            unknown = [axis for axis in getattr(self, field.name) if axis not in MESH_AXES]
            if unknown:
                raise InputError(
                    f"rules: {field.name} has unknown mesh axis {unknown[0]!r}; supported: {', '.join(MESH_AXES)}"
                )
        # Within one array, a mesh axis may split at most one logical axis.
        for names in _ARRAYS:
            split_by: dict[str, str] = {}
            for name in names:
                for axis in getattr(self, name):
                    if axis in split_by:
                        raise InputError(
                            f"rules: mesh axis {axis!r} splits both {split_by[axis]} and {name} of one array. "
                            "Remove it from one of them."
                        )
                    split_by[axis] = name


_WEIGHT, _BIAS, _TABLE = ("layers", "outputs", "inputs"), ("layers", "outputs"), ("vocab", "hidden")
_NORMS = ("layers", "hidden")
_ARRAYS: tuple[tuple[str, ...], ...] = (("batch",), _WEIGHT, _TABLE, _NORMS, ("rank",))
"""Logical axes of each kind of array."""


@dataclass(frozen=True)
class Layout:
    """Placement of every array of a run on a mesh.

    An axis that is not a multiple of its number of devices (such as a vocabulary of 32001 tokens on 8 devices) is not
    split. A batch that is not a multiple raises an error instead.

    Attributes:
      mesh: Devices, or an abstract mesh for planning.
      rules: Mesh axes that split each logical axis.
    """

    mesh: Mesh | AbstractMesh
    rules: Rules = Rules()

    @cached_property
    def replicated(self) -> NamedSharding:
        """Sharding of an array with a full copy on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    @cached_property
    def rows(self) -> NamedSharding:
        """Sharding of an array split by rows, such as a batch."""
        return NamedSharding(self.mesh, PartitionSpec(_spec(self.rules.batch)))

    @property
    def parts(self) -> int:
        """Number of parts that a batch is split into."""
        return self._devices(self.rules.batch)

    def params_shardings(self, params: Any) -> Any:
        """Return the tree of shardings of base weights, given as arrays or `jax.ShapeDtypeStruct`."""
        return self._shardings(params)

    def state_shardings(self, state: Any) -> Any:
        """Return the tree of shardings of a training state.

        Arrays are replicated, except for the ``rank`` axis of adapter tensors and for trained weights, which are split
        as base weights are.
        """
        return self._shardings(state)

    def params(self, params: Any) -> Any:
        """Place base weights on the devices."""
        return place(params, self.params_shardings(params))

    def state(self, state: Any) -> Any:
        """Place a training state on the devices."""
        return place(state, self.state_shardings(state))

    def batch(self, batch: Any) -> Any:
        """Place a batch of host arrays on the devices, split by rows.

        Every process passes the whole batch and copies its own part to its devices.

        Raises:
          InputError: If the devices cannot share the rows evenly.
        """
        rows = jax.tree.leaves(batch)[0].shape[0]
        self.check_batch(rows)
        # Because the global shape is stated, each process takes its devices' rows out of the whole batch.
        return jax.tree.map(lambda a: jax.make_array_from_process_local_data(self.rows, a, a.shape), batch)

    def check_batch(self, batch: int, accumulation: int = 1) -> None:
        """Raise an error unless the devices can share a batch evenly.

        Args:
          batch: Number of rows.
          accumulation: Number of microbatches that the rows are divided into.

        Raises:
          InputError: If the rows of a microbatch are not a multiple of `parts`.
        """
        if batch % (self.parts * accumulation):
            factor = f"{self.parts} (devices that share the batch)"
            if accumulation > 1:
                factor += f" times {accumulation} (accumulation)"
            raise InputError(f"batch_size must be a multiple of {factor}, got {batch}")

    def _devices(self, axes: tuple[str, ...]) -> int:
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def _shardings(self, tree: Any) -> Any:
        def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
            # Split each axis as its rule says, if its length is a multiple of the devices.
            spec: list[Any] = []
            for name, size in zip(_logical_axes(path, leaf.ndim), leaf.shape, strict=True):
                axes = getattr(self.rules, name) if name else ()
                spec.append(_spec(axes) if size % self._devices(axes) == 0 else None)
            # JAX drops trailing None from the shardings of results. Do the same: otherwise the state that a step
            # returns would have another sharding than the first state, and the step would be compiled twice.
            while spec and spec[-1] is None:
                spec.pop()
            return NamedSharding(self.mesh, PartitionSpec(*spec))

        return jax.tree.map_with_path(sharding, tree)


class Gathered:
    """Wrapper of an adapter that gathers one module's weight at a time and splits activations by rows.

    Without these constraints the compiler may find it cheaper, for a short batch, to move the activations and to leave
    the weights split. A module's weight is gathered for its product, dropped, and gathered again in the backward pass.
    If it were kept, the gathered weights of all layers would put the whole model on every device.

    Args:
      adapter: Trainable adapter to wrap; the training step uses the wrapper in its place.
      layout: Placement of the arrays on the devices.
    """

    def __init__(self, adapter: TrainableAdapter, layout: Layout) -> None:
        self._adapter, self._layout = adapter, layout

    @property
    def params(self) -> Any:
        """Trainable arrays of the wrapped adapter."""
        return self._adapter.params

    @property
    def config(self) -> AdapterConfig:
        """Configuration of the wrapped adapter."""
        return self._adapter.config

    def replace(self, params: Any) -> "Gathered":
        """Return a wrapper of the adapter with other trainable arrays."""
        return Gathered(self._adapter.replace(params), self._layout)

    def layers(self) -> Any:
        """Return the wrapped adapter's arrays by layer."""
        return self._adapter.layers()

    def linear(self, name: str, x: Array, weight: Array, bias: Array | None, layer: Any, *, key: Array | None) -> Array:
        """Apply the wrapped adapter's module with its weight gathered and its activations split by rows."""
        rows = self._layout.rows
        x = jax.lax.with_sharding_constraint(x, rows)
        # The barrier makes the compiler gather this layer's matrix. Without it, the compiler gathers a slice of the
        # stacked layers in another order of axes, for which it copies all weights that the device holds.
        weight = jax.lax.with_sharding_constraint(jax.lax.optimization_barrier(weight), self._layout.replicated)
        y = self._adapter.linear(name, x, weight, bias, layer, key=key)
        return jax.lax.with_sharding_constraint(y, rows)

    def prefix(self, layer: Any) -> Any:
        """Return the wrapped adapter's prefix of one layer."""
        return self._adapter.prefix(layer)

    def merge(self, params: Any) -> Any:
        """Merge the wrapped adapter into weights."""
        return self._adapter.merge(params)

    def unmerge(self, params: Any, norms: Any = None) -> Any:
        """Remove the wrapped adapter from weights."""
        return self._adapter.unmerge(params, norms)

    def count(self) -> int:
        """Return the number of trainable parameters."""
        return self._adapter.count()

    def table(self) -> Any:
        """Return the wrapped adapter's table of adapted modules."""
        return self._adapter.table()


def layout_over_all_devices(
    llama_config: LlamaConfig, config: FinetuneConfig, *, fsdp: int = 1
) -> tuple[Layout | None, Any]:
    """Return the layout over all devices and the shardings of the base weights, or two None on a single device.

    Args:
      llama_config: Configuration of the base model.
      config: Fine-tuning configuration.
      fsdp: Number of devices that share one copy of the weights; further groups of devices hold further copies.

    Raises:
      InputError: If the devices cannot share the batch evenly, or their number is not a multiple of ``fsdp``.
    """
    if len(jax.devices()) == 1 and fsdp == 1:
        return None, None
    layout = Layout(mesh(fsdp=fsdp))
    layout.check_batch(config.batch_size, config.accumulation)
    return layout, layout.params_shardings(abstract_params(llama_config, jnp.dtype(config.dtype), config.quantization))


def place(tree: Any, shardings: Any) -> Any:
    """Place arrays on their devices; each of several processes holds the whole tree and places its own parts."""
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def place_leaf(leaf: Any, sharding: NamedSharding) -> Any:
        # Random keys have no callback form: place the integers that they wrap.
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            key_data = place_leaf(jax.random.key_data(leaf), NamedSharding(sharding.mesh, PartitionSpec()))
            return jax.random.wrap_key_data(key_data, impl=jax.random.key_impl(leaf))
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(place_leaf, tree, shardings)


def _spec(axes: tuple[str, ...]) -> str | tuple[str, ...] | None:
    return axes if len(axes) > 1 else (axes[0] if axes else None)


def _logical_axes(path: tuple[Any, ...], ndim: int) -> tuple[str | None, ...]:
    """Return the logical axes of an array from its path in the tree; None is an axis that is never split."""
    # The last key of the path names the kind of array, in the base and in the adapter.
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
    # An array with another number of axes is of another kind with the same name: it is not split.
    return (None,) * ndim if names is None or len(names) != ndim else names
