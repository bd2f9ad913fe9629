"""Does a fine-tuning run fit on a GPU, and how long does it take? From shapes alone, on any machine.

    python -m sims.capacity
    python -m sims.capacity --model llama-7b --method dora --rank 128 --device h100 --examples 170420
    python -m sims.capacity --model llama-13b --memory 24 --rate 120 --data 2 --fsdp 4

The first is a table of the paper's five models on a 48 GB A6000, the second one model on another card, the third one on
eight devices of 24 GB and 120 TFLOP/s, four of which share a copy of the weights.
The training step is traced without weights. ``--compile`` adds the account of XLA's compiler for the machine at
hand; ``--measure`` runs two steps here, on random weights, and sets what they took beside the prediction.
"""

from dataclasses import dataclass
from typing import Literal

from rora_theory import devices
from rora_theory.errors import InputError
from rora_theory.finetune import capacity, sharding
from rora_theory.finetune.capacity import DEVICES, GB, PAPER_MODELS, Device
from rora_theory.finetune.config import BaseDtype, FinetuneConfig
from rora_theory.finetune.sharding import Layout
from rora_theory.llama import LlamaConfig
from rora_theory.llama.quantised import Quantization
from rora_theory.rules import check_integers, check_positives
from sims.common import answers, cli, tables


@dataclass(frozen=True)
class Config:
    """The run to fit. The defaults are the paper's protocol at its largest rank."""

    model: str | None = None
    """llama-7b, llama-13b, llama2-7b, llama2-70b, llama3-8b, sheared-llama-1.3b, mistral-7b, qwen2.5-7b, qwen3-8b,
    smollm2-135m, or a folder with config.json; none is the table of the paper's five"""
    method: Literal["lora", "rora", "dora", "full"] = "rora"
    """lora and rora differ by their scaling alone, so they take the same; dora trains magnitudes too; full the weights
    themselves, in float32, beside the frozen ones that they started from"""
    rank: int = 128
    """rank of the adapter, on q, k, v, up and down; full, on the same modules, has none"""
    batch_size: int = 16
    """records a step"""
    accumulation: int = 1
    """parts a batch is worked in, one after another"""
    seq: int = 256
    """tokens of a record, padding included"""
    device: str = "a6000"
    """a6000, rtx4090, l40s, a100-40gb, a100-80gb, h100 or h200"""
    memory: float | None = None
    """GB of a device of your own, with --rate, in place of --device"""
    rate: float | None = None
    """TFLOP/s of its products in --dtype"""
    bandwidth: float | None = None
    """GB/s of its memory; none leaves the time of reading the weights out"""
    data: int = 1
    """copies of the base weights, each on --fsdp devices: data x fsdp devices in all"""
    fsdp: int = 1
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
    utilisation: float = 0.4
    """share of the device's peak rate of products that the run reaches"""
    steps: int | None = None
    """number of steps, for the whole time"""
    examples: int | None = None
    """number of training records instead, each seen --epochs times"""
    epochs: int = 3
    """passes over --examples"""
    compile: bool = False
    """compile the step for this machine and show XLA's account of it"""
    measure: bool = False
    """run two steps on this machine and show what they took"""

    def finetune(self) -> FinetuneConfig:
        """The run's own configuration."""
        names = ("batch_size", "accumulation", "dropout", "dtype", "quantization", "remat")
        own = {name: getattr(self, name) for name in names}
        if self.method != "full":
            own |= {"rule": "lora" if self.method == "lora" else "rora", "rank": self.rank}
        return FinetuneConfig(method="lora" if self.method == "rora" else self.method, **own)

    def place(self) -> Device:
        """The device to plan for."""
        if self.memory is None or self.rate is None:
            return DEVICES[self.device]
        return Device.of(1e9 * self.memory, 1e12 * self.rate, None if self.bandwidth is None else 1e9 * self.bandwidth)

    def layout(self) -> Layout | None:
        """Where the arrays of several devices lie: real ones where the step is compiled or run here."""
        if self.data * self.fsdp == 1:
            return None
        if not (self.compile or self.measure):
            return Layout(sharding.abstract_mesh(self.data, self.fsdp))
        return Layout(sharding.mesh(self.data, self.fsdp, devices=devices.pick(self.data * self.fsdp)))

    def count_steps(self) -> int | None:
        """Steps of the whole run; None where the command does not say."""
        if self.examples is None:
            return self.steps
        return -(-self.examples // self.batch_size) * self.epochs

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise InputError(f"--device is {self.device!r}; accepted are {', '.join(DEVICES)}")
        if self.steps is not None and self.examples is not None:
            raise InputError("--steps and --examples are both given; accepted is one of them")
        if (self.memory is None) != (self.rate is None) or (self.bandwidth is not None and self.memory is None):
            raise InputError(
                "--memory, --rate and --bandwidth are of a device of your own; accepted are the first two together, or "
                "none of them, with --device"
            )
        check_positives(self, "memory", "rate", "bandwidth")
        check_integers(self, data=1, fsdp=1)
        self.place()
        check_integers(self, rank=1, batch_size=1, accumulation=1, steps=1, examples=1, epochs=1, seq=1)
        self.finetune()
        if not 0 < self.utilisation <= 1:
            raise InputError(f"--utilisation is {self.utilisation}; accepted is a number above 0, at most 1")
        if self.model is None and (self.compile or self.measure):
            raise InputError("--compile and --measure take one model; accepted is --model NAME with them")


def run(config: Config) -> None:
    """The paper's models, or one by part."""
    if config.model is None:
        show_table(config, config.finetune(), config.place())
    else:
        show_model(config, capacity.find_model(config.model), config.finetune(), config.place())


def show_table(config: Config, run: FinetuneConfig, device: Device) -> None:
    """The paper's models, with and without rematerialisation."""
    found = capacity.fit_table(
        PAPER_MODELS, run, device, width=config.seq, utilisation=config.utilisation, layout=config.layout()
    )
    count = config.count_steps()
    forms = {"model": "{model}", "remat": "{remat}", "trained %": "{trained:.2f}", "base GB": "{base:.1f}"}
    forms |= {"trained + Adam GB": "{state:.1f}", "activations GB": "{activations:.1f}", "total GB": "{total:.1f}"}
    forms |= {"verdict": "{verdict}", "s a step": "{seconds:.2f}"}
    forms |= {} if count is None else {"whole run": "{hours:.1f} h"}
    shown = found.assign(
        remat=found["remat"].map({False: "no", True: "yes"}),
        verdict=found["fits"].map({False: "does not fit", True: "fits"}),
        hours=found["seconds"] * (count or 0) / 3600,
    )
    fitting = [f"{row.model}{' (remat)' * row.remat}" for row in found[found["fits"]].itertuples()]
    answers.say(f"On {device.name} fit: {', '.join(fitting) or 'none'}.")
    tables.print_records(f"{device.name}, {describe(config)}", shown, forms, left=2)
    tables.print_text(basis(config, device))


def show_model(config: Config, model: LlamaConfig, run: FinetuneConfig, device: Device) -> None:
    """One model, by part; then what the compiler and the machine at hand say, where asked."""
    layout = config.layout()
    found = capacity.account(model, run, config.seq, layout)
    rows = [[name, f"{size / GB:.2f}"] for name, size in found.parts().items()]
    rows += [["total", f"{found.total / GB:.2f}"], ["(a block of logits)", f"{found.logits / GB:.2f}"]]
    seconds = found.seconds(device, run.dtype, config.utilisation)
    count = config.count_steps()
    whole = "" if count is None else f"; the whole run {count * seconds / 3600:.1f} h"
    each = "" if layout is None else " a device"
    total = found.flops * found.devices
    answers.say(f"{config.model} on {device.name}: {found.verdict(device)}.")
    tables.print_table(f"{config.model}, {describe(config)}", ["memory", f"GB{each}"], rows)
    if layout is not None:
        show_placement(model, run, layout)
    tables.print_text(
        f"parameters {found.parameters:,}, trained {found.trainable:,} ({found.trainable / found.parameters:.2%})\n"
        f"products {total / 1e12:.4g} TFLOP a step, {total / found.tokens / 1e9:.3g} GFLOP a token\n"
        f"{seconds:.3g} s a step, {found.tokens / seconds:.0f} tokens/s{whole}\n"
        f"{basis(config, device)}"
    )
    if config.compile:
        xla = capacity.compile_here(model, run, config.seq, layout)
        arguments = found.base + found.adapter + found.optimizer + found.batch
        tables.print_text(
            f"XLA for this machine ({xla.seconds:.0f} s): arguments {xla.arguments / GB:.2f} GB (here "
            f"{arguments / GB:.2f}), temporaries {xla.temporaries / GB:.2f} GB (here "
            f"{(found.total - arguments) / GB:.2f}). A CPU's compiler widens bfloat16 products, a GPU's does not."
        )
    if config.measure:
        own = capacity.measure_step(model, run, config.seq, layout)
        tables.print_text(
            f"measured here: peak{each} {own.peak / GB:.3f} GB, predicted {found.total / GB:.3f} GB "
            f"(predicted / measured {found.total / own.peak:.3f}); {own.seconds:.2f} s a step"
        )


def show_placement(model: LlamaConfig, run: FinetuneConfig, layout: Layout) -> None:
    """What of the run is split over the devices."""
    rows = [
        [one.name, f"in {one.ways}" if one.ways > 1 else "whole", *(f"{size / GB:.2f}" for size in sizes)]
        for one in capacity.placement(model, run, layout)
        for sizes in [(one.bytes_whole, one.bytes_each)]
    ]
    tables.print_table("the base", ["arrays", "split", "GB", "GB a device"], rows, left=2)
    rows_each = run.batch_size // layout.parts
    tables.print_text(
        f"batch and activations are split in {layout.parts}: {rows_each} rows a device; adapter, its gradient and the "
        "optimizer's state are whole on each"
    )


def describe(config: Config) -> str:
    """The run in words."""
    parts = f" in {config.accumulation} parts" if config.accumulation > 1 else ""
    size = "" if config.method == "full" else f" rank {config.rank},"
    base = config.dtype if config.quantization == "none" else f"{config.quantization} (multiplied in {config.dtype})"
    words = f"{config.method},{size} batch {config.batch_size} x {config.seq}{parts}, {base} base"
    count = config.data * config.fsdp
    return words if count == 1 else f"{words}, {count} devices (data {config.data} x fsdp {config.fsdp})"


def basis(config: Config, device: Device) -> str:
    """What the figures rest on."""
    return (
        f"times at {100 * config.utilisation:.0f}% of {device.peak(config.dtype) / 1e12:.0f} TFLOP/s; "
        f"{capacity.RESERVE / GB:.0f} GB of {device.memory / GB:.1f} GB left to the driver and libraries"
    )


main = cli.command(Config, run, __doc__)

if __name__ == "__main__":
    main()
