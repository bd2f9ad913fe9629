"""Does a fine-tuning run fit, and how long does it take? From shapes alone: no weights, no accelerator.

The step that training runs is traced on abstract arrays. Weights, adapter and optimizer state are counted from their
shapes, the rest from the traced program (`traced_cost`). On several devices (`rora_theory.finetune.sharding`) the
account is that of each: its rows of the batch, its part of the weights, and the weights that it gathers for a product.
XLA's own account of the same step, of the backend at hand, is there to compare: `compile_here`. Its GPU compiler, run
for an A6000 without one, says 30.1 GB for LLaMA-7B in bfloat16 at rank 128 and 16 x 256 tokens where this says 30.0,
and with rematerialisation 19.7 where this says 19.5: it fuses a layer's elementwise work a little less than is taken
here.
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

from rora_theory import adapters
from rora_theory.adapters.lora import assemble_lora
from rora_theory.data.batches import Batch
from rora_theory.errors import InputError
from rora_theory.finetune import step as steps
from rora_theory.finetune import traced_cost
from rora_theory.finetune.config import FinetuneConfig
from rora_theory.finetune.loss import LOGITS_BYTES
from rora_theory.finetune.sharding import Gathered, Layout
from rora_theory.llama import LlamaConfig
from rora_theory.llama.model import abstract_params, count_parameters, init_params
from rora_theory.llama.weights import read_config
from rora_theory.scaling import check_positive, check_share

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
"""Shapes of published models."""

PAPER_MODELS = ("llama-7b", "llama-13b", "llama2-7b", "llama3-8b", "sheared-llama-1.3b")
"""The models of the paper's experiments."""


def find_model(name: str) -> LlamaConfig:
    """A model's shape: one of `MODELS`, or that of a folder with its config.json.

    Raises:
      InputError: neither.
    """
    if name in MODELS:
        return MODELS[name]
    if (Path(name) / "config.json").exists():
        return read_config(Path(name))
    raise InputError(f"--model is {name!r}; accepted are {', '.join(MODELS)} or a folder with config.json")


@dataclass(frozen=True)
class Device:
    """An accelerator as its maker specifies it.

    Attributes:
      memory: bytes that its driver reports.
      bfloat16: operations a second of bfloat16 products, dense, accumulated in float32.
      float32: of float32 products, which JAX runs in TF32 on these cards unless told otherwise.
      bandwidth: bytes a second of its memory.
    """

    name: str
    memory: int
    bfloat16: float
    float32: float
    bandwidth: float

    def peak(self, dtype: DTypeLike) -> float:
        """Operations a second of products of ``dtype``."""
        return self.bfloat16 if jnp.dtype(dtype).itemsize == 2 else self.float32

    @classmethod
    def of(cls, memory: float, rate: float, bandwidth: float | None = None) -> "Device":
        """Any device by its figures.

        Args:
          memory: bytes.
          rate: operations a second of products in the run's type.
          bandwidth: bytes a second of its memory; None leaves the time of reading the weights out.

        Raises:
          InputError: a figure that is not a finite number above 0, or no more memory than `RESERVE`.
        """
        for name, value in (("memory", memory), ("rate", rate), ("bandwidth", bandwidth)):
            if value is not None:
                check_positive(name, value)
        if memory <= RESERVE:
            raise InputError(f"memory is {memory / 1e9:g} GB; accepted is more than {RESERVE / 1e9:g} GB")
        found = f"{memory / 1e9:g} GB and {rate / 1e12:g} TFLOP/s"
        return cls(f"a device of {found}", round(memory), rate, rate, math.inf if bandwidth is None else bandwidth)


# NVIDIA's data sheets: Ampere GA102 whitepaper (2021) for the RTX A6000; A100 80GB (2021); Ada whitepaper v2.1 for the
# RTX 4090; L40S (2023); H100 (2023) and H200 (2024), SXM. Rates without sparsity. Memory as `nvidia-smi` reports it.
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
"""Bytes that the driver's context, the libraries' workspaces and the compiled code take on a device."""

CPU_WORKING = 2.5
"""What a layer's working set takes at most on a CPU, where it is 1 here: XLA's compiler for CPUs fuses less of its
elementwise work and random draws. A GPU's does."""

ON_CPU = (
    "A CPU's compiler fuses less of a layer's elementwise work and random draws, up to "
    f"{CPU_WORKING:g} times the working set, and widens bfloat16; a GPU's does not."
)
"""The same in words, for who sets a CPU's account beside a plan."""

PREALLOCATED = 0.75
"""Share of a device that JAX takes unless the variable XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise."""


@dataclass(frozen=True)
class Account:
    """What one step of a run needs of each device. Bytes, unless said otherwise; `total` is the sum of the eight parts.

    Attributes:
      parameters: number of the base's weights, of all devices.
      trainable: number of the adapter's.
      tokens: positions a step, of all devices.
      flops: operations of a device's products.
      base: a device's weights, read by ``passes`` passes a step.
      adapter, optimizer: float32; the optimizer's two moments are twice the adapter.
      batch: tokens, targets and their weights.
      gradients: of the adapter.
      activations: kept for the backward pass; with rematerialisation the layers' inputs alone.
      working: what the fullest moment holds besides: a layer's own intermediates, or a block of logits.
      gathered: weights of other devices that a product has for a while.
      logits: the block of logits held at once, here to see; a part of ``working`` when it is there.
      devices: how many there are.
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
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Bytes by part."""
        names = ("base", "adapter", "optimizer", "batch", "gradients", "activations", "working", "gathered")
        return {name: getattr(self, name) for name in names}

    def on_cpu(self, dtype: DTypeLike) -> int:
        """Bytes that XLA's program takes at most on a CPU, with a base of ``dtype``: see `CPU_WORKING`; and of a
        bfloat16 base, and of what is kept in bfloat16, it makes float32 copies."""
        copies = 2 * (self.base + self.activations) if jnp.dtype(dtype).itemsize == 2 else 0
        return self.total + round((CPU_WORKING - 1) * self.working) + copies

    def fits(self, device: Device) -> bool:
        """Whether the device has the memory, its `RESERVE` left out."""
        return self.total <= device.memory - RESERVE

    def verdict(self, device: Device) -> str:
        """Whether it fits, in words, with what helps where it does not and what JAX must be told where it does."""
        memory = f"{self.total / GB:.1f} GB of {(device.memory - RESERVE) / GB:.1f} GB"
        if not self.fits(device):
            return f"does not fit ({memory}); --remat True, a smaller --batch-size or more --accumulation takes less"
        fraction = self.memory_fraction(device)
        need = f"; needs XLA_PYTHON_CLIENT_MEM_FRACTION={fraction:.2f} or more" if fraction else ""
        return f"fits ({memory}){need}"

    def memory_fraction(self, device: Device) -> float | None:
        """The XLA_PYTHON_CLIENT_MEM_FRACTION that the run needs; None where JAX's own share is enough."""
        share = self.total / device.memory
        return None if share <= PREALLOCATED else math.ceil(100 * share) / 100

    def seconds(self, device: Device, dtype: DTypeLike, utilisation: float) -> float:
        """A step's time: its products at ``utilisation`` of the peak rate, or reading the weights, the longer.

        Raises:
          InputError: a utilisation outside (0, 1].
        """
        check_share("utilisation", utilisation)
        return max(self.flops / (utilisation * device.peak(dtype)), self.passes * self.base / device.bandwidth)


@dataclass(frozen=True)
class Program:
    """The jitted training step of a run and the abstract arrays it takes."""

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
    """The step that training runs, for batches of ``config.batch_size`` rows of ``width`` positions.

    Args:
      llama_config, config: of the run.
      width: positions a row.
      attention: see `rora_theory.llama.attention.choose_route`.
      logits_bytes: most bytes of logits held at once, on all devices together.
      layout: of a run on several devices; None is one.

    Raises:
      InputError: a setting out of range, an adapter that does not fit the model, a width it does not take, or a batch
        that the devices can't share evenly.
    """
    if width < 1:
        raise InputError(f"width is {width}; accepted is an integer of 1 or more")
    base = abstract_params(llama_config, jnp.dtype(config.dtype), config.quantization)
    key = jax.eval_shape(lambda: jax.random.key(0))
    adapter = abstract_adapter(llama_config, config)
    optimizer = steps.finetune_optimizer(config, 1)
    state = jax.eval_shape(
        lambda params, k: steps.init_state(adapters.replace(adapter, params), optimizer, k), adapter.params, key
    )
    integers = jax.ShapeDtypeStruct((config.batch_size, width), jnp.int32)
    weights = jax.ShapeDtypeStruct((config.batch_size, width), jnp.float32)
    batch = Batch(integers, integers, weights, None)
    shardings = None
    if layout is not None:
        layout.check_batch(config.batch_size, config.accumulation)
        shardings = layout.state_shardings(state)
        adapter = Gathered(adapter, layout)
        base, state = _placed(base, layout.params_shardings(base)), _placed(state, shardings)
        batch = _placed(batch, jax.tree.map(lambda _: layout.rows, batch))
    function = steps.train_step(
        adapter, llama_config, config, 1, attention=attention, logits_bytes=logits_bytes, state_shardings=shardings
    )
    return Program(function, state, base, batch)


def _placed(tree: Any, shardings: Any) -> Any:
    """Abstract arrays, with where they lie."""
    return jax.tree.map(lambda a, at: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=at), tree, shardings)


def account(
    llama_config: LlamaConfig, config: FinetuneConfig, width: int = 256, layout: Layout | None = None
) -> Account:
    """Trace a run's step and account for it.

    Each of several devices works its own rows, so what it computes and keeps is that of a smaller batch; of the base
    it has what `placement` says, and for a product it gathers the whole weights of one layer. The account
    is that of `attention`'s plain routes, which every device has: a fused kernel takes no more.

    Args:
      llama_config, config: of the run.
      width: positions a row.
      layout: of a run on several devices, its mesh real or abstract (`sharding.abstract_mesh`); None is one device.

    Raises:
      InputError: as `abstract_step`.
    """
    parts, devices = 1, 1
    if layout is not None:
        layout.check_batch(config.batch_size, config.accumulation)
        parts, devices = layout.parts, math.prod(layout.mesh.shape.values())
    own = replace(config, batch_size=config.batch_size // parts)
    logits_bytes = LOGITS_BYTES // parts
    step = abstract_step(llama_config, own, width, attention="blocked", logits_bytes=logits_bytes)
    traced = step.function.trace(step.state, step.base, step.batch)
    held = traced_cost.held(traced.jaxpr)
    base, adapter, state = _bytes(step.base), _bytes(step.state.params), _bytes(step.state)
    gathered = 0
    if layout is not None:
        base = _bytes(step.base, layout.params_shardings(step.base))
        shardings = layout.state_shardings(step.state)
        adapter, state = _bytes(step.state.params, shardings.params), _bytes(step.state, shardings)
        gathered = _gathered(abstract_params(llama_config, jnp.dtype(config.dtype)), layout)
    rows = own.batch_size // config.accumulation
    row = 4 * llama_config.vocab_size * rows
    return Account(
        parameters=count_parameters(llama_config),
        trainable=adapters.count(abstract_adapter(llama_config, config)),
        tokens=config.batch_size * width,
        flops=traced_cost.flops(traced.jaxpr),
        passes=(3 if config.remat else 2) * config.accumulation,
        base=base,
        adapter=adapter,
        optimizer=state - adapter,
        batch=_bytes(step.batch),
        gradients=held.stacked,
        activations=held.kept,
        working=held.working,
        logits=min(row * width, max(row, logits_bytes // row * row)),
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
    """Whether a run of several of `MODELS` fits on a device, or on each of a layout's, without rematerialisation and
    with it.

    Returns:
      ``model``, ``remat``; ``trained`` in per cent of all parameters; ``base``, ``state`` (what is trained, and Adam's
      moments of it), ``activations`` and ``total`` in GB; ``fits``; ``seconds`` a step.
    """
    rows = []
    for name, remat in itertools.product(models, (False, True)):
        found = account(MODELS[name], replace(config, remat=remat), width, layout)
        sizes = {"base": found.base, "state": found.adapter + found.optimizer, "activations": found.activations}
        row = {"model": name, "remat": remat, "trained": 100 * found.trainable / found.parameters}
        row |= {part: size / GB for part, size in (sizes | {"total": found.total}).items()}
        seconds = found.seconds(device, config.dtype, utilisation)
        rows.append(row | {"fits": found.fits(device), "seconds": seconds})
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Placed:
    """Where arrays of one kind of the base lie.

    Attributes:
      name: what they are.
      ways: into how many parts each is split; 1 is whole on every device.
      bytes_whole, bytes_each: of all of them, and a device's.
    """

    name: str
    ways: int
    bytes_whole: int
    bytes_each: int


def placement(llama_config: LlamaConfig, config: FinetuneConfig, layout: Layout) -> list[Placed]:
    """What of the base is split over a layout's devices, and what is whole on each, as a table whose length is no
    multiple of the devices is.
    """
    base = abstract_params(llama_config, jnp.dtype(config.dtype), config.quantization)
    shardings = layout.params_shardings(base)
    found: dict[tuple[str, int], list[int]] = {}
    for (path, leaf), sharding in zip(jax.tree.leaves_with_path(base), jax.tree.leaves(shardings), strict=True):
        whole, each = _bytes(leaf), _bytes(leaf, sharding)
        key = next(entry.key for entry in reversed(path) if isinstance(entry, jax.tree_util.DictKey))
        sizes = found.setdefault((_KINDS.get(key, "norms"), whole // each), [0, 0])
        sizes[0] += whole
        sizes[1] += each
    return [Placed(name, ways, *sizes) for (name, ways), sizes in found.items()]


_KINDS = {
    "weight": "weights of modules",
    "bias": "biases of modules",
    "embed_tokens": "embeddings",
    "lm_head": "unembeddings",
}


def _gathered(base: Any, layout: Layout) -> int:
    """A layer's weights, dense: the compiler may gather them before the first product. Of a table each device works its
    own words, on all rows' hidden states, which take less."""
    shardings = jax.tree.leaves(layout.params_shardings(base))
    split = [a for a, at in zip(jax.tree.leaves(base), shardings, strict=True) if not at.is_fully_replicated]
    return sum(_bytes(a) // a.shape[0] for a in split if a.ndim == 3)


@dataclass(frozen=True)
class Compiled:
    """XLA's own account of a step on the backend at hand, bytes.

    Attributes:
      arguments: weights, state and batch.
      temporaries: everything else. On a CPU more than a GPU takes, see `Account.on_cpu`.
      seconds: the compiler's time.
    """

    arguments: int
    temporaries: int
    seconds: float

    @property
    def total(self) -> int:
        """Bytes of a device at the fullest moment."""
        return self.arguments + self.temporaries


def compile_here(
    llama_config: LlamaConfig, config: FinetuneConfig, width: int = 256, layout: Layout | None = None
) -> Compiled:
    """Compile a run's step for the default backend, without weights; each device's account. Raises as `account`."""
    return _compile(abstract_step(llama_config, config, width, layout=layout))[1]


def _compile(step: Program) -> tuple[jax.stages.Compiled, Compiled]:
    start = time.perf_counter()
    program = step.function.lower(step.state, step.base, step.batch).compile()
    found = program.memory_analysis()
    return program, Compiled(found.argument_size_in_bytes, found.temp_size_in_bytes, time.perf_counter() - start)


@dataclass(frozen=True)
class MeasuredStep:
    """A step that was run, on random weights.

    Attributes:
      peak: bytes of a device at the fullest moment, weights and all.
      program: what the compiler's account says of it; what a first step brings in besides is code, threads' stacks and
        packed operands of products, shared by the devices of a CPU.
      seconds: of a step after the first.
    """

    peak: int
    program: Compiled
    seconds: float


def measure_step(
    llama_config: LlamaConfig, config: FinetuneConfig, width: int = 256, layout: Layout | None = None
) -> MeasuredStep:
    """Run two steps on the default device, or on a layout's, on random weights and tokens, and see what they take.

    On GPUs the highest of the allocators' own peaks. On a CPU what the process's resident memory grew by in the first
    step, and the arrays that were there before, an equal share for each device; Linux alone tells.

    Raises:
      InputError: as `account`, or a system that does not tell.
    """
    step = abstract_step(llama_config, config, width, layout=layout)
    run, program = _compile(step)
    devices = [jax.devices()[0]] if layout is None else list(layout.mesh.devices.flat)
    shardings = None if layout is None else layout.params_shardings(step.base)
    draw = jax.jit(init_params, static_argnums=(1, 2, 3), out_shardings=shardings)
    base = draw(jax.random.key(0), llama_config, jnp.dtype(config.dtype), config.quantization)
    adapter = adapters.init(jax.random.key(1), config.adapter(), llama_config, base)
    state = steps.init_state(adapter, steps.finetune_optimizer(config, 1), jax.random.key(2))
    random = np.random.default_rng(0)
    tokens = random.integers(0, llama_config.vocab_size, (config.batch_size, width + 1)).astype(np.int32)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], np.ones((config.batch_size, width), np.float32), None)
    if layout is not None:
        state, batch = layout.state(state), layout.batch(batch)
    del adapter
    jax.block_until_ready((base, state))
    before = 0
    if devices[0].platform != "gpu":
        forget_peak()
        before = resident("VmRSS") - _bytes_on_devices((base, state))
    state, _ = jax.block_until_ready(run(state, base, batch))
    start = time.perf_counter()
    jax.block_until_ready(run(state, base, batch))
    seconds = time.perf_counter() - start
    if devices[0].platform == "gpu":
        peak = max(int(device.memory_stats()["peak_bytes_in_use"]) for device in devices)
        return MeasuredStep(peak, program, seconds)
    return MeasuredStep((resident("VmHWM") - before) // len(devices), program, seconds)


def abstract_adapter(llama_config: LlamaConfig, config: FinetuneConfig) -> Any:
    """The run's adapter, its arrays abstract and LoRA's scaling in numbers."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    base = abstract_params(llama_config, jnp.dtype(config.dtype))
    shapes = jax.eval_shape(lambda k, b: adapters.init(k, config.adapter(), llama_config, b), key, base)
    if isinstance(shapes, adapters.LoraAdapter):
        return assemble_lora(shapes.config, shapes.targets, shapes.params)
    return shapes


def _bytes(tree: Any, shardings: Any = None) -> int:
    """Bytes of arrays, abstract or not; with their shardings those of one device."""
    leaves = jax.tree.leaves(tree)
    if shardings is None:
        return sum(map(traced_cost.size_in_bytes, leaves))
    shares = [
        math.prod(at.shard_shape(a.shape)) / math.prod(a.shape)
        for a, at in zip(leaves, jax.tree.leaves(shardings), strict=True)
    ]
    return round(sum(traced_cost.size_in_bytes(a) * share for a, share in zip(leaves, shares, strict=True)))


def _bytes_on_devices(tree: Any) -> int:
    """Bytes of arrays, those of every device counted."""
    keys = [
        jax.random.key_data(a) if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key) else a
        for a in jax.tree.leaves(tree)
    ]
    return sum(shard.data.nbytes for a in keys for shard in a.addressable_shards)


def resident(what: str) -> int:
    """A line of Linux's account of this process, in bytes."""
    try:
        with open("/proc/self/status") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith(f"{what}:"))
    except (OSError, StopIteration) as error:
        raise InputError("measure: this system does not tell a process's peak memory; accepted is Linux") from error


def forget_peak() -> None:
    """Let the peak of resident memory start from now."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError as error:
        raise InputError("measure: this system does not tell a process's peak memory; accepted is Linux") from error
