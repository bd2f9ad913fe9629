"""A fine-tuning run that is planned: which model, how it is trained, on which devices, for how long.

plan = PlanConfig("llama-7b", rank=64, device="h100")
account(find_model(plan.model), plan.finetune(), plan.seq, plan.layout()).verdict(plan.place())
"""

from dataclasses import dataclass
from typing import Literal

from rora_theory.errors import InputError
from rora_theory.finetune import sharding
from rora_theory.finetune.capacity import DEVICES, GB, RESERVE, Device
from rora_theory.finetune.config import BaseDtype, FinetuneConfig
from rora_theory.finetune.sharding import Layout
from rora_theory.llama.quantised import Quantization
from rora_theory.runs import devices
from rora_theory.validation.ranges import Count, Positive, Share, check_ranges
from rora_theory.validation.rules import check_unread


@dataclass(frozen=True)
class PlanConfig:
    """The run to fit. The defaults are the paper's protocol at its largest rank.

    Raises:
      InputError: a value out of range, or settings that exclude each other.

    Examples:
      >>> plan = PlanConfig(rank=64, examples=1600, epochs=2, fsdp=2)
      >>> plan.in_words(), plan.count_steps()
      ('rora, rank 64, batch 16 x 256, bfloat16 base, 2 devices (replicas 1 x fsdp 2)', 200)
    """

    model: str | None = None
    """llama-7b, llama-13b, llama2-7b, llama2-70b, llama3-8b, sheared-llama-1.3b, mistral-7b, qwen2.5-7b, qwen3-8b,
    smollm2-135m, gemma3-270m, or a folder with config.json; none is the table of the paper's five"""
    method: Literal["lora", "rora", "dora", "full"] = "rora"
    """lora and rora differ by their scaling alone, so they take the same; dora trains magnitudes too; full the weights
    themselves, in float32, beside the frozen ones that they started from"""
    rank: Count = 128
    """rank of the adapter, on q, k, v, up and down; full, on the same modules, has none"""
    batch_size: Count = 16
    """records a step"""
    accumulation: Count = 1
    """parts a batch is worked in, one after another"""
    seq: Count = 256
    """tokens of a record, padding included"""
    device: str = "a6000"
    """a6000, rtx4090, l40s, a100-40gb, a100-80gb, h100 or h200"""
    memory: Positive | None = None
    """GB of a device of your own, with --tflops, in place of --device"""
    tflops: Positive | None = None
    """TFLOP/s of its products in --dtype"""
    bandwidth: Positive | None = None
    """GB/s of its memory; none leaves the time of reading the weights out"""
    replicas: Count = 1
    """copies of the base weights, each on --fsdp devices: replicas x fsdp devices in all"""
    fsdp: Count = 1
    """devices that share one copy of the base weights"""
    dtype: BaseDtype = "bfloat16"
    """type of the frozen base weights"""
    quantization: Quantization = "none"
    """how the base's linear weights are held, made dense a layer at a time: none, q8_0, q4_0 or q4_1"""
    remat: bool | Literal["mlp"] = False
    """made again in the backward pass: False elementwise work, mlp the feed-forward too, True all; the table shows
    False and True"""
    dropout: float = 0.05
    """dropout of the adapter's input; above 0, the masked inputs are kept too"""
    utilisation: Share = 0.4
    """share of the device's peak rate of products that the run reaches"""
    steps: Count | None = None
    """number of steps, for the whole time"""
    examples: Count | None = None
    """number of training records instead, each seen --epochs times"""
    epochs: Count = 3
    """passes over --examples"""

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise InputError(f"--device is {self.device!r}; accepted are {', '.join(DEVICES)}")
        if self.steps is not None and self.examples is not None:
            raise InputError("--steps and --examples are both given; accepted is one of them")
        if (self.memory is None) != (self.tflops is None) or (self.bandwidth is not None and self.memory is None):
            raise InputError(
                "--memory, --tflops and --bandwidth are of a device of your own; accepted are the first two together, "
                "or none of them, with --device"
            )
        check_ranges(self)
        self.place()
        if self.memory is not None:
            check_unread(self, "device", beside="--memory")
        if self.examples is None:
            check_unread(self, "epochs", without="--examples")
        if self.method == "full":
            check_unread(self, "rank", beside="--method full")
        self.finetune()

    def finetune(self) -> FinetuneConfig:
        """The run's own configuration."""
        names = ("batch_size", "accumulation", "dropout", "dtype", "quantization", "remat")
        own = {name: getattr(self, name) for name in names}
        if self.method != "full":
            own |= {"rule": "lora" if self.method == "lora" else "rora", "rank": self.rank}
        return FinetuneConfig(method="lora" if self.method == "rora" else self.method, **own)

    def place(self) -> Device:
        """The device to plan for."""
        if self.memory is None or self.tflops is None:
            return DEVICES[self.device]
        return Device.of(
            1e9 * self.memory, 1e12 * self.tflops, None if self.bandwidth is None else 1e9 * self.bandwidth
        )

    def layout(self, *, here: bool = False) -> Layout | None:
        """Where the arrays of several devices lie, of this machine's own where the step runs ``here``; one has none.

        Raises:
          InputError: this machine has fewer devices.
        """
        if self.replicas * self.fsdp == 1:
            return None
        if not here:
            return Layout(sharding.abstract_mesh(self.replicas, self.fsdp))
        return Layout(sharding.mesh(self.replicas, self.fsdp, devices=devices.pick(self.replicas * self.fsdp)))

    def count_steps(self) -> int | None:
        """Steps of the whole run; None where nothing says."""
        if self.examples is None:
            return self.steps
        return -(-self.examples // self.batch_size) * self.epochs

    def in_words(self) -> str:
        """The run in words."""
        parts = f" in {self.accumulation} parts" if self.accumulation > 1 else ""
        size = "" if self.method == "full" else f" rank {self.rank},"
        base = self.dtype if self.quantization == "none" else f"{self.quantization} (multiplied in {self.dtype})"
        words = f"{self.method},{size} batch {self.batch_size} x {self.seq}{parts}, {base} base"
        count = self.replicas * self.fsdp
        return words if count == 1 else f"{words}, {count} devices (replicas {self.replicas} x fsdp {self.fsdp})"

    def basis(self) -> str:
        """What the figures rest on, in words."""
        device = self.place()
        return (
            f"times at {100 * self.utilisation:.0f}% of {device.peak(self.dtype) / 1e12:.0f} TFLOP/s; "
            f"{RESERVE / GB:.0f} GB of {device.memory / GB:.1f} GB left to the driver and libraries"
        )
