"""Configuration of a planned fine-tuning run: model, method, devices and duration.

Examples:
  >>> from rora_theory.lab.finetune.capacity import estimate_step, find_model
  >>> plan = PlanConfig(model="llama-7b", rank=64, device="h100")
  >>> estimate = estimate_step(find_model(plan.model), plan.finetune(), plan.seq, plan.layout())  # doctest: +SKIP
  >>> estimate.verdict(plan.resolve_device())  # doctest: +SKIP
"""

from dataclasses import dataclass, fields
from typing import Literal

from rora_theory.errors import InputError
from rora_theory.lab.finetune import sharding
from rora_theory.lab.finetune.capacity import DEVICES, GB, RESERVE, Device
from rora_theory.lab.finetune.config import BaseDtype, CostConfig, FinetuneConfig
from rora_theory.lab.finetune.sharding import Layout
from rora_theory.runs import devices
from rora_theory.scaling import check_choice
from rora_theory.validation.ranges import Count, Positive, Share, check_ranges
from rora_theory.validation.rules import check_unread


@dataclass(frozen=True)
class PlanConfig(CostConfig):
    """Configuration of a planned run, with the paper's protocol at its largest rank as defaults.

    Raises:
      InputError: If a value is out of range, or if settings exclude each other.

    Examples:
      >>> plan = PlanConfig(rank=64, examples=1600, epochs=2, fsdp=2)
      >>> plan.describe(), plan.count_steps()
      ('rora, rank 64, batch 16 x 256, bfloat16 base, 2 devices (replicas 1 x fsdp 2)', 200)
    """

    method: Literal["lora", "rora", "dora", "full"] = "rora"
    """Fine-tuning method: lora or rora (which differ in scaling only and cost the same); dora (also trains magnitudes);
    full (trains the weights in float32 and keeps the frozen initial weights)"""
    rank: Count = 128
    dtype: BaseDtype = "bfloat16"
    model: str | None = None
    """Base model: llama-7b, llama-13b, llama2-7b, llama2-70b, llama3-8b, sheared-llama-1.3b, mistral-7b, qwen2.5-7b,
    qwen3-8b, smollm2-135m, gemma3-270m, or a folder with config.json; by default a table of the paper's five models"""
    seq: Count = 256
    """Number of tokens per record, padding included"""
    device: str = "a6000"
    """Accelerator: a6000, rtx4090, l40s, a100-40gb, a100-80gb, h100 or h200"""
    memory: Positive | None = None
    """Memory in GB of a custom device, with --tflops and in place of --device"""
    tflops: Positive | None = None
    """Peak rate of a custom device for products in --dtype, in TFLOP/s"""
    bandwidth: Positive | None = None
    """Memory bandwidth of a custom device in GB/s; by default the time of reading the weights is ignored"""
    replicas: Count = 1
    """Number of copies of the base weights, each on --fsdp devices; the run uses replicas x fsdp devices"""
    fsdp: Count = 1
    """Number of devices that share one copy of the base weights"""
    utilisation: Share = 0.4
    """Fraction of the device's peak rate that the products reach"""
    examples: Count | None = None
    """Number of training records, to estimate the total time in place of --steps"""

    def __post_init__(self) -> None:
        """Validate the settings."""
        check_choice("--device", self.device, DEVICES)
        # Combinations of options that contradict each other.
        if self.steps is not None and self.examples is not None:
            raise InputError("--steps and --examples cannot be combined. Set one of them.")
        if (self.memory is None) != (self.tflops is None) or (self.bandwidth is not None and self.memory is None):
            raise InputError(
                "--memory, --tflops and --bandwidth describe a custom device. Set both --memory and --tflops, or use "
                "--device instead."
            )
        check_ranges(self)
        # Construct the device and the configuration: both validate their own fields.
        self.resolve_device()
        if self.memory is not None:
            check_unread(self, "device", conflicts_with="--memory")
        # Options that have no effect without, or beside, another one.
        if self.examples is None:
            check_unread(self, "epochs", requires="--examples")
        if self.method == "full":
            check_unread(self, "rank", conflicts_with="--method full")
        self.finetune()

    def finetune(self) -> FinetuneConfig:
        """Return the fine-tuning configuration of the planned run."""
        settings = {entry.name: getattr(self, entry.name) for entry in fields(CostConfig)}
        if self.method == "full":
            del settings["rank"]
        else:
            settings["rule"] = "lora" if self.method == "lora" else "rora"
        return FinetuneConfig(**settings | {"method": "lora" if self.method == "rora" else self.method})

    def resolve_device(self) -> Device:
        """Return the device to plan for: the one named by ``device``, or the custom one."""
        if self.memory is None or self.tflops is None:
            return DEVICES[self.device]
        return Device.from_specification(
            1e9 * self.memory, 1e12 * self.tflops, None if self.bandwidth is None else 1e9 * self.bandwidth
        )

    def layout(self, *, here: bool = False) -> Layout | None:
        """Return the layout of the arrays on several devices, or None for a single device.

        Args:
          here: Whether to use this machine's devices, so that the step can run; otherwise the mesh is abstract.

        Raises:
          InputError: If this machine has too few devices.
        """
        if self.replicas * self.fsdp == 1:
            return None
        if not here:
            return Layout(sharding.abstract_mesh(self.replicas, self.fsdp))
        return Layout(sharding.mesh(self.replicas, self.fsdp, devices=devices.pick(self.replicas * self.fsdp)))

    def count_steps(self) -> int | None:
        """Return the number of steps of the whole run, or None if it is not set."""
        if self.examples is None:
            return self.steps
        return -(-self.examples // self.batch_size) * self.epochs

    def describe(self) -> str:
        """Return a one-line description of the run."""
        microbatches = f" in {self.accumulation} parts" if self.accumulation > 1 else ""
        size = "" if self.method == "full" else f" rank {self.rank},"
        base = self.dtype if self.quantization == "none" else f"{self.quantization} (multiplied in {self.dtype})"
        text = f"{self.method},{size} batch {self.batch_size} x {self.seq}{microbatches}, {base} base"
        count = self.replicas * self.fsdp
        return text if count == 1 else f"{text}, {count} devices (replicas {self.replicas} x fsdp {self.fsdp})"

    def describe_assumptions(self) -> str:
        """Return a phrase with the assumptions behind the estimated times and memory."""
        device = self.resolve_device()
        return (
            f"times at {100 * self.utilisation:.0f}% of {device.peak(self.dtype) / 1e12:.0f} TFLOP/s; "
            f"{RESERVE / GB:.0f} GB of {device.memory / GB:.1f} GB reserved for the driver and libraries"
        )
