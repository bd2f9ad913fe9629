"""Memory and time of a fine-tuning run, estimated from shapes alone: no weights and no accelerator are needed.

The training step is traced on abstract arrays. The memory of weights, adapter and optimizer state follows from their
shapes; the rest is read off the traced program (`traced_cost`). On several devices (`lab.finetune.sharding`)
the estimate is per device: its rows of the batch, its part of the weights, and the weights that it gathers for a
product.

`analyse_compiled_step` returns XLA's own estimate of the same step for the default backend. For LLaMA-7B in bfloat16 at
rank 128 with 16 x 256 tokens, XLA's GPU compiler (targeting an A6000, without one) reports 30.1 GB, this module
30.0 GB. With rematerialisation it reports 19.7 GB, this module 19.5 GB. XLA fuses a layer's elementwise work a little
less than this module assumes.
"""

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax.typing import DTypeLike

from rora_theory.errors import InputError
from rora_theory.lab import adapters
from rora_theory.lab.adapters.lora import assemble_lora
from rora_theory.lab.data.batches import Batch
from rora_theory.lab.finetune import step as steps
from rora_theory.lab.finetune import traced_cost
from rora_theory.lab.finetune.config import FinetuneConfig
from rora_theory.lab.finetune.loss import LOGITS_BYTES, count_blocks
from rora_theory.lab.finetune.sharding import Gathered, Layout
from rora_theory.lab.llama import LlamaConfig
from rora_theory.lab.llama.model import abstract_params, count_parameters, init_params
from rora_theory.lab.llama.weights import read_config
from rora_theory.scaling import check_integer, check_positive, check_share

GB = 1e9

MODELS = {
    "llama-7b": LlamaConfig(32000, 4096, 11008, 32, 32, 32, 128),
    "llama-13b": LlamaConfig(32000, 5120, 13824, 40, 40, 40, 128),
    "llama2-7b": LlamaConfig(32000, 4096, 11008, 32, 32, 32, 128, rms_norm_eps=1e-5, max_position_embeddings=4096),
    "llama2-70b": LlamaConfig(32000, 8192, 28672, 80, 64, 8, 128, rms_norm_eps=1e-5, max_position_embeddings=4096),
    "llama3-8b": LlamaConfig(
        128256, 4096, 14336, 32, 32, 8, 128, rms_norm_eps=1e-5, rope_theta=500000.0, max_position_embeddings=8192
    ),
    "sheared-llama-1.3b": LlamaConfig(
        32000, 2048, 5504, 24, 16, 16, 128, rms_norm_eps=1e-5, max_position_embeddings=4096
    ),
    "mistral-7b": LlamaConfig(
        32000,
        4096,
        14336,
        32,
        32,
        8,
        128,
        rms_norm_eps=1e-5,
        max_position_embeddings=32768,
        model_type="mistral",
        sliding_window=4096,
    ),
    "qwen2.5-7b": LlamaConfig(
        152064, 3584, 18944, 28, 28, 4, 128, rope_theta=1e6, max_position_embeddings=131072, model_type="qwen2"
    ),
    "qwen3-8b": LlamaConfig(
        151936, 4096, 12288, 36, 32, 8, 128, rope_theta=1e6, max_position_embeddings=40960, model_type="qwen3"
    ),
    "smollm2-135m": LlamaConfig(
        49152,
        576,
        1536,
        30,
        9,
        3,
        64,
        rms_norm_eps=1e-5,
        rope_theta=100000.0,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
    ),
    "gemma3-270m": LlamaConfig(
        262144,
        640,
        2048,
        18,
        4,
        1,
        256,
        rope_theta=1e6,
        tie_word_embeddings=True,
        max_position_embeddings=32768,
        model_type="gemma3_text",
        sliding_window=512,
        full_attention_layers=(5, 11, 17),
        query_pre_attn_scalar=256,
        rope_local_base_freq=1e4,
    ),
}
"""Configurations of published models by short name."""

PAPER_MODELS = ("llama-7b", "llama-13b", "llama2-7b", "llama3-8b", "sheared-llama-1.3b")
"""Names in `MODELS` of the models in the paper's experiments."""


def find_model(name: str) -> LlamaConfig:
    """Return the configuration of a published model or of a model folder.

    Args:
      name: Key of `MODELS`, or path of a folder with config.json.

    Raises:
      InputError: If ``name`` is neither.
    """
    if name in MODELS:
        return MODELS[name]
    if (Path(name) / "config.json").exists():
        return read_config(Path(name))
    raise InputError(f"--model must be one of {', '.join(MODELS)} or a folder with config.json, got {name!r}")


@dataclass(frozen=True)
class Device:
    """An accelerator's specification.

    Attributes:
      name: Product name and memory size.
      memory: Bytes of memory that the driver reports.
      bfloat16: Peak rate of dense bfloat16 products accumulated in float32, in operations per second.
      float32: Peak rate of float32 products, in operations per second. By default JAX runs them in TF32 on these
        accelerators.
      bandwidth: Memory bandwidth in bytes per second.
    """

    name: str
    memory: int
    bfloat16: float
    float32: float
    bandwidth: float

    def peak(self, dtype: DTypeLike) -> float:
        """Return the peak rate of matrix products in ``dtype``, in operations per second."""
        return self.bfloat16 if jnp.dtype(dtype).itemsize == 2 else self.float32

    @classmethod
    def from_specification(cls, memory: float, rate: float, bandwidth: float | None = None) -> "Device":
        """Construct a device from its specification.

        Args:
          memory: Bytes of memory.
          rate: Peak rate of products in the dtype of the base weights, in operations per second.
          bandwidth: Memory bandwidth in bytes per second; None ignores the time of reading the weights.

        Raises:
          InputError: If a value is not a finite number above 0, or if ``memory`` does not exceed `RESERVE`.
        """
        for quantity, value in (("memory", memory), ("rate", rate), ("bandwidth", bandwidth)):
            if value is not None:
                check_positive(quantity, value)
        if memory <= RESERVE:
            raise InputError(f"memory must be more than {RESERVE / 1e9:g} GB, got {memory / 1e9:g} GB")
        name = f"a device of {memory / 1e9:g} GB and {rate / 1e12:g} TFLOP/s"
        return cls(name, round(memory), rate, rate, math.inf if bandwidth is None else bandwidth)


# Sources: NVIDIA's Ampere GA102 whitepaper (2021) for the RTX A6000, Ada whitepaper v2.1 for the RTX 4090, and data
# sheets of the A100 80GB (2021), L40S (2023), H100 SXM (2023) and H200 SXM (2024). Rates are without sparsity; memory
# is what `nvidia-smi` reports.
_MIB = 2**20
DEVICES = {
    "a6000": Device("NVIDIA RTX A6000 48 GB", 48677 * _MIB, 154.8e12, 77.4e12, 768e9),
    "rtx4090": Device("NVIDIA RTX 4090 24 GB", 24564 * _MIB, 165.2e12, 82.6e12, 1008e9),
    "l40s": Device("NVIDIA L40S 48 GB", 46068 * _MIB, 362.0e12, 183.0e12, 864e9),
    "a100-40gb": Device("NVIDIA A100 SXM 40 GB", 40960 * _MIB, 312e12, 156e12, 1555e9),
    "a100-80gb": Device("NVIDIA A100 SXM 80 GB", 81920 * _MIB, 312e12, 156e12, 2039e9),
    "h100": Device("NVIDIA H100 SXM 80 GB", 81559 * _MIB, 989.4e12, 494.7e12, 3350e9),
    "h200": Device("NVIDIA H200 SXM 141 GB", 143771 * _MIB, 989.4e12, 494.7e12, 4800e9),
}
"""Accelerators by short name."""

RESERVE = 1_000_000_000
"""Bytes of a device reserved for the driver's context, the libraries' workspaces and the compiled code."""

CPU_WORKING_RATIO = 2.5
"""Largest ratio of a layer's working set on a CPU to the estimate: XLA's CPU compiler fuses less elementwise work and
fewer random draws than its GPU compiler."""

CPU_MEMORY_NOTE = (
    "XLA's CPU compiler fuses less of a layer's elementwise work and random draws, up to "
    f"{CPU_WORKING_RATIO:g} times the working set, and widens bfloat16. Its GPU compiler does not."
)
"""Explanation of why a CPU needs more memory than the estimate."""

PREALLOCATED_FRACTION = 0.75
"""Fraction of a device's memory that JAX preallocates if XLA_PYTHON_CLIENT_MEM_FRACTION is not set."""


@dataclass(frozen=True)
class StepEstimate:
    """Estimated cost of one training step, in bytes per device unless noted otherwise.

    Attributes:
      parameters: Number of base weights over all devices.
      trainable: Number of trainable parameters.
      tokens: Number of positions per step over all devices.
      flops: Operations of one device's matrix products.
      passes: Number of times that a step reads the base weights.
      base: Bytes of one device's base weights.
      adapter: Bytes of the trainable parameters, in float32.
      optimizer: Bytes of the optimizer state: two float32 moments per trainable parameter.
      batch: Bytes of the tokens, targets and loss weights.
      gradients: Bytes of the trainable parameters' gradients.
      activations: Bytes of the activations saved for the backward pass; with rematerialisation, the layers' inputs.
      working: Bytes of all other values that are live at peak memory: intermediates of one layer, or a block of
        logits.
      logits: Bytes of the block of logits held at once, for information: ``working`` includes it if it is live at
        peak memory.
      gathered: Bytes of other devices' weights that are held for the duration of a product.
      devices: Number of devices.
    """

    parameters: int
    trainable: int
    tokens: int
    flops: int
    passes: int
    base: int
    adapter: int
    optimizer: int
    batch: int
    gradients: int
    activations: int
    working: int
    logits: int
    gathered: int = 0
    devices: int = 1

    @property
    def total(self) -> int:
        """Peak memory of one device in bytes, the sum of `parts`."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Return the bytes of each of the eight parts of peak memory."""
        names = ("base", "adapter", "optimizer", "batch", "gradients", "activations", "working", "gathered")
        return {name: getattr(self, name) for name in names}

    def on_cpu(self, dtype: DTypeLike) -> int:
        """Return an upper bound on the bytes that XLA's program takes on a CPU with a base of ``dtype``."""
        # A CPU computes in float32: bfloat16 weights and activations are copied at twice their size.
        copies = 2 * (self.base + self.activations) if jnp.dtype(dtype).itemsize == 2 else 0
        return self.total + round((CPU_WORKING_RATIO - 1) * self.working) + copies

    def fits(self, device: Device) -> bool:
        """Return whether the step fits in the device's memory less `RESERVE`."""
        return self.total <= device.memory - RESERVE

    def verdict(self, device: Device) -> str:
        """Return a phrase that says whether the step fits, and which option or variable to set."""
        memory = f"{self.total / GB:.1f} GB of {(device.memory - RESERVE) / GB:.1f} GB"
        if not self.fits(device):
            return (
                f"does not fit ({memory}); reduce memory with --remat True, a smaller --batch-size or a larger "
                "--accumulation"
            )
        fraction = self.memory_fraction(device)
        requirement = f"; needs XLA_PYTHON_CLIENT_MEM_FRACTION={fraction:.2f} or more" if fraction else ""
        return f"fits ({memory}){requirement}"

    def memory_fraction(self, device: Device) -> float | None:
        """Return the XLA_PYTHON_CLIENT_MEM_FRACTION that the run needs, or None if JAX's default suffices."""
        fraction = self.total / device.memory
        return None if fraction <= PREALLOCATED_FRACTION else math.ceil(100 * fraction) / 100

    def seconds(self, device: Device, dtype: DTypeLike, utilisation: float) -> float:
        """Estimate the duration of a step: the larger of its compute time and the time to read the weights.

        Args:
          device: Accelerator that runs the step.
          dtype: Dtype of the base weights, in which the products are computed.
          utilisation: Fraction of the peak rate that the products reach.

        Raises:
          InputError: If ``utilisation`` is outside (0, 1].
        """
        check_share("utilisation", utilisation)
        return max(self.flops / (utilisation * device.peak(dtype)), self.passes * self.base / device.bandwidth)


@dataclass(frozen=True)
class Program:
    """The jitted training step of a run and its abstract arguments.

    Attributes:
      function: Jitted function ``(state, base, batch) -> (state, metrics)``.
      state: Abstract training state.
      base: Abstract base weights.
      batch: Abstract batch.
    """

    function: Any
    state: Any
    base: Any
    batch: Any


def abstract_step(
    llama_config: LlamaConfig,
    config: FinetuneConfig,
    width: int,
    *,
    attention: str = "auto",
    logits_bytes: int = LOGITS_BYTES,
    layout: Layout | None = None,
) -> Program:
    """Build the training step for batches of ``config.batch_size`` rows of ``width`` positions.

    Args:
      llama_config: Configuration of the base model.
      config: Fine-tuning configuration.
      width: Number of positions per row.
      attention: Attention implementation, see `rora_theory.lab.llama.attention.choose_route`.
      logits_bytes: Maximum number of bytes of logits held at once, over all devices.
      layout: Layout of the arrays on several devices; None means a single device.

    Raises:
      InputError: If a setting is out of range, the adapter does not fit the model, the width is below 1, or the
        devices cannot share the batch evenly.
    """
    check_integer("width", width)
    # Abstract weights, adapter and training state: shapes and dtypes without memory.
    base = abstract_params(llama_config, jnp.dtype(config.dtype), config.quantization)
    key = jax.eval_shape(lambda: jax.random.key(0))
    adapter = abstract_adapter(llama_config, config)
    optimizer = steps.finetune_optimizer(config, 1)
    state = jax.eval_shape(
        lambda params, k: steps.init_state(adapters.replace(adapter, params), optimizer, k), adapter.params, key
    )
    # Token ids and targets share one shape; the loss weights are real numbers.
    integers = jax.ShapeDtypeStruct((config.batch_size, width), jnp.int32)
    weights = jax.ShapeDtypeStruct((config.batch_size, width), jnp.float32)
    batch = Batch(integers, integers, weights, None)
    # On several devices every abstract array carries its sharding.
    shardings = None
    if layout is not None:
        layout.check_batch(config.batch_size, config.accumulation)
        shardings = layout.state_shardings(state)
        adapter = Gathered(adapter, layout)
        base, state = _with_shardings(base, layout.params_shardings(base)), _with_shardings(state, shardings)
        batch = _with_shardings(batch, jax.tree.map(lambda _: layout.rows, batch))
    function = steps.train_step(
        adapter, llama_config, config, 1, attention=attention, logits_bytes=logits_bytes, state_shardings=shardings
    )
    return Program(function, state, base, batch)


def _with_shardings(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda array, sharding: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding), tree, shardings
    )


def estimate_step(
    llama_config: LlamaConfig, config: FinetuneConfig, width: int = 256, layout: Layout | None = None
) -> StepEstimate:
    """Estimate the memory and the operations of one training step per device.

    Each of several devices processes its own rows, so its activations are those of a smaller batch. It holds the base
    weights that `placement` lists and gathers the weights of one layer for a product. The estimate assumes blocked
    attention, which every device supports; a fused kernel needs no more memory.

    Args:
      llama_config: Configuration of the base model.
      config: Fine-tuning configuration.
      width: Number of positions per row.
      layout: Layout of the arrays on several devices, with a real or an abstract mesh (`sharding.abstract_mesh`);
        None means a single device.

    Raises:
      InputError: If `abstract_step` rejects the arguments.
    """
    parts, devices = 1, 1
    if layout is not None:
        layout.check_batch(config.batch_size, config.accumulation)
        parts, devices = layout.parts, math.prod(layout.mesh.shape.values())
    # Trace the step of one device: its share of the rows, and of the block of logits.
    device_config = replace(config, batch_size=config.batch_size // parts)
    logits_bytes = LOGITS_BYTES // parts
    step = abstract_step(llama_config, device_config, width, attention="blocked", logits_bytes=logits_bytes)
    # Peak over the program: stacked gradients, saved activations, and the largest set of other live values.
    traced = step.function.trace(step.state, step.base, step.batch)
    peak = traced_cost.peak_memory(traced.jaxpr)
    # Arguments of the step: whole on a single device, sharded on several.
    base, adapter, state = _bytes(step.base), _bytes(step.state.params), _bytes(step.state)
    gathered = 0
    if layout is not None:
        base = _bytes(step.base, layout.params_shardings(step.base))
        shardings = layout.state_shardings(step.state)
        adapter, state = _bytes(step.state.params, shardings.params), _bytes(step.state, shardings)
        gathered = _gathered_bytes(abstract_params(llama_config, jnp.dtype(config.dtype)), layout)
    # float32 logits of all positions that are processed at once, for one block of the vocabulary.
    positions = device_config.batch_size // config.accumulation * width
    blocks = count_blocks(positions, llama_config.vocab_size, logits_bytes)
    block_bytes = 4 * positions * -(-llama_config.vocab_size // blocks)
    return StepEstimate(
        parameters=count_parameters(llama_config),
        trainable=adapters.count(abstract_adapter(llama_config, config)),
        tokens=config.batch_size * width,
        flops=traced_cost.flops(traced.jaxpr),
        # Forward and backward pass read every weight once for each microbatch; rematerialisation adds one more read.
        passes=(3 if config.remat else 2) * config.accumulation,
        base=base,
        adapter=adapter,
        optimizer=state - adapter,
        batch=_bytes(step.batch),
        gradients=peak.stacked,
        activations=peak.saved,
        working=peak.working,
        logits=block_bytes,
        gathered=gathered,
        devices=devices,
    )


def fit_table(
    models: Sequence[str],
    config: FinetuneConfig,
    device: Device,
    *,
    width: int = 256,
    utilisation: float = 0.4,
    layout: Layout | None = None,
) -> pd.DataFrame:
    """Tabulate whether a run fits on a device for several models, without and with rematerialisation.

    Args:
      models: Keys of `MODELS`.
      config: Fine-tuning configuration; its ``remat`` is replaced.
      device: Accelerator, or each of the accelerators of ``layout``.
      width: Number of positions per row.
      utilisation: Fraction of the device's peak rate that the products reach.
      layout: Layout of the arrays on several devices; None means a single device.

    Returns:
      Columns ``model`` and ``remat``; ``trained`` in per cent of the base's parameters; ``base``, ``state`` (trainable
      parameters and Adam's moments), ``activations`` and ``total`` in GB; ``fits``; ``seconds`` per step.
    """
    # Trace each model once without and once with rematerialisation: the trade of memory for time.
    rows = []
    for name, remat in itertools.product(models, (False, True)):
        estimate = estimate_step(MODELS[name], replace(config, remat=remat), width, layout)
        sizes = {
            "base": estimate.base,
            "state": estimate.adapter + estimate.optimizer,
            "activations": estimate.activations,
            "total": estimate.total,
        }
        row = {"model": name, "remat": remat, "trained": 100 * estimate.trainable / estimate.parameters}
        row |= {part: size / GB for part, size in sizes.items()}
        seconds = estimate.seconds(device, config.dtype, utilisation)
        rows.append(row | {"fits": estimate.fits(device), "seconds": seconds})
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class ArrayPlacement:
    """Distribution of one kind of base array over the devices.

    Attributes:
      name: Kind of array, such as "weights of modules".
      ways: Number of parts that each array is split into; 1 means a full copy on every device.
      bytes_whole: Bytes of the unsplit arrays.
      bytes_per_device: Bytes that each device holds.
    """

    name: str
    ways: int
    bytes_whole: int
    bytes_per_device: int


def placement(llama_config: LlamaConfig, config: FinetuneConfig, layout: Layout) -> list[ArrayPlacement]:
    """Return how each kind of base array is split over the devices of a layout.

    An array is kept whole on every device if its split axis is not a multiple of the number of devices.
    """
    base = abstract_params(llama_config, jnp.dtype(config.dtype), config.quantization)
    shardings = layout.params_shardings(base)
    # Sum the sizes of arrays of the same kind that are split into the same number of parts.
    sizes_by_kind: dict[tuple[str, int], list[int]] = {}
    for (path, leaf), sharding in zip(jax.tree.leaves_with_path(base), jax.tree.leaves(shardings), strict=True):
        total_bytes, device_bytes = _bytes(leaf), _bytes(leaf, sharding)
        key = next(entry.key for entry in reversed(path) if isinstance(entry, jax.tree_util.DictKey))
        sizes = sizes_by_kind.setdefault((_KINDS.get(key, "norms"), total_bytes // device_bytes), [0, 0])
        sizes[0] += total_bytes
        sizes[1] += device_bytes
    return [ArrayPlacement(name, ways, *sizes) for (name, ways), sizes in sizes_by_kind.items()]


_KINDS = {
    "weight": "weights of modules",
    "bias": "biases of modules",
    "embed_tokens": "embeddings",
    "lm_head": "unembeddings",
}


def _gathered_bytes(base: Any, layout: Layout) -> int:
    """Return the bytes of one layer's dense weights, all of which may be gathered before the first product.

    Embedding tables are not gathered: each device processes its part of the vocabulary on the hidden states of all
    rows, which take less memory.
    """
    shardings = jax.tree.leaves(layout.params_shardings(base))
    pairs = zip(jax.tree.leaves(base), shardings, strict=True)
    split_arrays = [array for array, sharding in pairs if not sharding.is_fully_replicated]
    # Module weights are stacked, [layers, out, in]: one layer is a 1 / layers part.
    return sum(_bytes(array) // array.shape[0] for array in split_arrays if array.ndim == 3)


@dataclass(frozen=True)
class CompiledStep:
    """XLA's memory analysis of a step compiled for the default backend.

    Attributes:
      arguments: Bytes of the weights, state and batch.
      temporaries: Bytes of all other values. A CPU needs more than a GPU, see `StepEstimate.on_cpu`.
      seconds: Compilation time in seconds.
    """

    arguments: int
    temporaries: int
    seconds: float

    @property
    def total(self) -> int:
        """Peak memory of one device in bytes."""
        return self.arguments + self.temporaries


def analyse_compiled_step(
    llama_config: LlamaConfig, config: FinetuneConfig, width: int = 256, layout: Layout | None = None
) -> CompiledStep:
    """Compile a run's step for the default backend, without weights, and return XLA's memory analysis of one device.

    Args:
      llama_config: Configuration of the base model.
      config: Fine-tuning configuration.
      width: Number of positions per row.
      layout: Layout of the arrays on several devices; None means a single device.

    Raises:
      InputError: If `abstract_step` rejects the arguments.
    """
    return _compile(abstract_step(llama_config, config, width, layout=layout))[1]


def _compile(step: Program) -> tuple[jax.stages.Compiled, CompiledStep]:
    """Compile a step, and return the executable and its memory analysis."""
    start = time.perf_counter()
    program = step.function.lower(step.state, step.base, step.batch).compile()
    analysis = program.memory_analysis()
    seconds = time.perf_counter() - start
    return program, CompiledStep(analysis.argument_size_in_bytes, analysis.temp_size_in_bytes, seconds)


@dataclass(frozen=True)
class MeasuredStep:
    """Measured memory and time of a step on random weights.

    Attributes:
      peak: Peak memory of one device in bytes, weights included.
      program: XLA's memory analysis of the same step. The first step also allocates code, thread stacks and packed
        operands of products, which the devices of a CPU share.
      seconds: Duration of the second step, which compiles nothing.
    """

    peak: int
    program: CompiledStep
    seconds: float


def measure_step(
    llama_config: LlamaConfig, config: FinetuneConfig, width: int = 256, layout: Layout | None = None
) -> MeasuredStep:
    """Run two steps on random weights and tokens, and measure their memory and time.

    On GPUs the peak is the highest of the allocators' own peaks. On a CPU (Linux only) it is the growth of the resident
    memory of the process in the first step plus the size of the step's arguments, divided evenly over the devices.

    Args:
      llama_config: Configuration of the base model.
      config: Fine-tuning configuration.
      width: Number of positions per row.
      layout: Layout of the arrays on several devices; None means the default device.

    Raises:
      InputError: If `abstract_step` rejects the arguments, or if the operating system does not report peak memory.
    """
    # Compile before any array exists, so that the compiler's own memory is not counted.
    step = abstract_step(llama_config, config, width, layout=layout)
    run, program = _compile(step)
    devices = [jax.devices()[0]] if layout is None else list(layout.mesh.devices.flat)
    shardings = None if layout is None else layout.params_shardings(step.base)
    # Random weights, training state and batch, placed on the devices.
    draw = jax.jit(init_params, static_argnums=(1, 2, 3), out_shardings=shardings)
    base = draw(jax.random.key(0), llama_config, jnp.dtype(config.dtype), config.quantization)
    adapter = adapters.init(jax.random.key(1), config.adapter(), llama_config, base)
    state = steps.init_state(adapter, steps.finetune_optimizer(config, 1), jax.random.key(2))
    random = np.random.default_rng(0)
    tokens = random.integers(0, llama_config.vocab_size, (config.batch_size, width + 1)).astype(np.int32)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], np.ones((config.batch_size, width), np.float32), None)
    if layout is not None:
        state, batch = layout.state(state), layout.batch(batch)
    # The adapter's arrays are copied into the state: only the state's count.
    del adapter
    jax.block_until_ready((base, state))
    # Resident memory of everything but the step's arguments, which count towards the peak.
    resident_before = 0
    if devices[0].platform != "gpu":
        reset_peak_memory()
        resident_before = process_memory("VmRSS") - _bytes_on_devices((base, state))
    # The first step reaches the peak, the second is timed.
    state, _ = jax.block_until_ready(run(state, base, batch))
    start = time.perf_counter()
    jax.block_until_ready(run(state, base, batch))
    seconds = time.perf_counter() - start
    # Peak of a device: as a GPU's allocator reports it, or that of the process without what was resident before.
    if devices[0].platform == "gpu":
        peak = max(int(device.memory_stats()["peak_bytes_in_use"]) for device in devices)
        return MeasuredStep(peak, program, seconds)
    return MeasuredStep((process_memory("VmHWM") - resident_before) // len(devices), program, seconds)


def abstract_adapter(llama_config: LlamaConfig, config: FinetuneConfig) -> Any:
    """Return the run's adapter with abstract arrays; LoRA's scaling factors stay concrete numbers."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    base = abstract_params(llama_config, jnp.dtype(config.dtype))
    shapes = jax.eval_shape(lambda k, b: adapters.init(k, config.adapter(), llama_config, b), key, base)
    if isinstance(shapes, adapters.LoraAdapter):
        return assemble_lora(shapes.config, shapes.targets, shapes.params)
    return shapes


def _bytes(tree: Any, shardings: Any = None) -> int:
    """Return the bytes of concrete or abstract arrays; with shardings, the bytes that one device holds."""
    leaves = jax.tree.leaves(tree)
    if shardings is None:
        return sum(map(traced_cost.size_in_bytes, leaves))
    fractions = [
        math.prod(sharding.shard_shape(array.shape)) / math.prod(array.shape)
        for array, sharding in zip(leaves, jax.tree.leaves(shardings), strict=True)
    ]
    sizes = (traced_cost.size_in_bytes(array) * part for array, part in zip(leaves, fractions, strict=True))
    return round(sum(sizes))


def _bytes_on_devices(tree: Any) -> int:
    """Return the bytes of concrete arrays, summed over all devices."""
    # Random keys have no size of their own: count the integers that they wrap.
    arrays = [
        jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        for leaf in jax.tree.leaves(tree)
    ]
    return sum(shard.data.nbytes for array in arrays for shard in array.addressable_shards)


def process_memory(field: str) -> int:
    """Return a memory field of Linux's status of this process, such as ``VmRSS``, in bytes."""
    try:
        with open("/proc/self/status") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith(f"{field}:"))
    except (OSError, StopIteration) as error:
        raise _peak_unavailable() from error


def reset_peak_memory() -> None:
    """Reset the peak of this process's resident memory to its present value."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError as error:
        raise _peak_unavailable() from error


def _peak_unavailable() -> InputError:
    return InputError(
        "measure: this operating system does not report the peak memory of a process. Measure on Linux or on a GPU."
    )
