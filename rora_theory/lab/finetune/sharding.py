"""Training on several devices by JAX's own sharding, along one mesh axis.

The rows of a batch are split over the devices. The base weights are copied to every device, or split over them, and so
are the trained weights of full fine-tuning with their optimizer state. An adapter and its optimizer state, about a
hundredth of the base, are copied. Arrays carry their `NamedSharding`; the compiler decides what it gathers, and the
same jitted step runs on any number of devices.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rora_theory.errors import InputError
from rora_theory.lab.finetune.config import FinetuneConfig
from rora_theory.lab.llama import LlamaConfig, abstract_params

AXIS = "devices"

_SPLIT_AXES = {"weight": (1, 3), "bias": (1, 2), "embed_tokens": (0, 2), "lm_head": (0, 2)}
"""Axis of each kind of weight that is split, and its number of axes: outputs of modules, and the vocabulary."""


@dataclass(frozen=True)
class Layout:
    """Placement of every array of a run on a mesh of one axis.

    A weight whose split axis is not a multiple of the number of devices (such as a vocabulary of 32001 tokens on 8
    devices) is copied instead. A batch that is not a multiple raises an error.

    Attributes:
      mesh: Devices.
      split_weights: Whether the base weights are split over the devices instead of being copied to each.
    """

    mesh: Mesh
    split_weights: bool = False

    @classmethod
    def over(cls, devices: Sequence[jax.Device], *, split_weights: bool = False) -> "Layout":
        """Return the layout over some devices."""
        mesh = jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)
        return cls(mesh, split_weights)

    @cached_property
    def replicated(self) -> NamedSharding:
        """Sharding of an array with a full copy on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    @cached_property
    def rows(self) -> NamedSharding:
        """Sharding of an array split by rows, such as a batch."""
        return NamedSharding(self.mesh, PartitionSpec(AXIS))

    def shardings(self, tree: Any) -> Any:
        """Return the tree of shardings of base weights or of a training state, given as arrays or their shapes."""
        return jax.tree.map_with_path(self._sharding, tree)

    def place(self, tree: Any) -> Any:
        """Place base weights or a training state on the devices; each of several processes passes the whole tree."""
        shardings = self.shardings(tree)
        return jax.device_put(tree, shardings) if jax.process_count() == 1 else jax.tree.map(_place, tree, shardings)

    def batch(self, batch: Any) -> Any:
        """Place a batch of host arrays on the devices, split by rows.

        Every process passes the whole batch and copies its own part to its devices.

        Raises:
          InputError: If the devices cannot share the rows evenly.
        """
        self.check_batch(jax.tree.leaves(batch)[0].shape[0])
        # Because the global shape is stated, each process takes its devices' rows out of the whole batch.
        return jax.tree.map(lambda a: jax.make_array_from_process_local_data(self.rows, a, a.shape), batch)

    def check_batch(self, batch: int, accumulation: int = 1) -> None:
        """Raise an error unless the devices can share a batch evenly.

        Raises:
          InputError: If the rows of a microbatch are not a multiple of the number of devices.
        """
        if batch % (self.mesh.size * accumulation):
            factor = f"{self.mesh.size} (devices that share the batch)"
            if accumulation > 1:
                factor += f" times {accumulation} (accumulation)"
            raise InputError(f"batch_size must be a multiple of {factor}, got {batch}")

    def _sharding(self, path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        # The last key of the path names the kind of array, in the base and in full fine-tuning.
        keys = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        axis, ndim = _SPLIT_AXES.get(keys[-1] if keys else "", (0, -1))
        if not self.split_weights or leaf.ndim != ndim or leaf.shape[axis] % self.mesh.size:
            return self.replicated
        return NamedSharding(self.mesh, PartitionSpec(*[None] * axis, AXIS))


def _place(leaf: Any, sharding: NamedSharding) -> Any:
    """Place this process's parts of an array. `jax.device_put` does not accept one on a device of this process."""
    # Random keys cannot be converted to NumPy: place the integers that they wrap.
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_place(jax.random.key_data(leaf), sharding), impl=jax.random.key_impl(leaf))
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def layout_over_all_devices(
    llama_config: LlamaConfig, config: FinetuneConfig, *, split_weights: bool = False
) -> tuple[Layout | None, Any]:
    """Return the layout over all devices and the shardings of the base weights, or two None on a single device.

    Raises:
      InputError: If the devices cannot share the batch evenly.
    """
    if len(jax.devices()) == 1:
        return None, None
    layout = Layout.over(jax.devices(), split_weights=split_weights)
    layout.check_batch(config.batch_size, config.accumulation)
    return layout, layout.shardings(abstract_params(llama_config, jnp.dtype(config.dtype), config.quantization))
