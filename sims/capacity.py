"""Does a fine-tuning run fit on a GPU, and how long does it take? From shapes alone, on any machine.

    python -m sims.capacity
    python -m sims.capacity --model llama-7b --method dora --rank 128 --device h100 --examples 170420
    python -m sims.capacity --model llama-13b --memory 24 --tflops 120 --replicas 2 --fsdp 4

The first is a table of the paper's five models on a 48 GB A6000, the second one model on another card, the third one on
eight devices of 24 GB and 120 TFLOP/s, four of which share a copy of the weights.
The training step is traced without weights. ``--compile`` adds the account of XLA's compiler for the machine at
hand; ``--measure`` runs two steps here, on random weights, and sets what they took beside the prediction.
"""

from dataclasses import dataclass

from rora_theory.errors import InputError
from rora_theory.finetune import capacity
from rora_theory.finetune.capacity import GB, PAPER_MODELS
from rora_theory.finetune.plan import PlanConfig
from rora_theory.finetune.sharding import Layout
from rora_theory.llama import LlamaConfig
from sims.common import answers, cli, tables


@dataclass(frozen=True)
class Config(PlanConfig):
    """The run to fit. The defaults are the paper's protocol at its largest rank."""

    compile: bool = False
    """compile the step for this machine and show XLA's account of it"""
    measure: bool = False
    """run two steps on this machine and show what they took"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model is None and (self.compile or self.measure):
            raise InputError("--compile and --measure take one model; accepted is --model NAME with them")


def run(config: Config) -> None:
    """The paper's models, or one by part."""
    if config.model is None:
        show_table(config)
    else:
        show_model(config, capacity.find_model(config.model))


def show_table(config: Config) -> None:
    """The paper's models, with and without rematerialisation."""
    device, layout = config.place(), config.layout()
    found = capacity.fit_table(
        PAPER_MODELS, config.finetune(), device, width=config.seq, utilisation=config.utilisation, layout=layout
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
    tables.print_records(f"{device.name}, {config.in_words()}", shown, forms, left=2)
    tables.print_text(config.basis())


def show_model(config: Config, model: LlamaConfig) -> None:
    """One model, by part; then what the compiler and the machine at hand say, where asked."""
    run, device, layout = config.finetune(), config.place(), config.layout(here=config.compile or config.measure)
    found = capacity.account(model, run, config.seq, layout)
    rows = [[name, f"{size / GB:.2f}"] for name, size in found.parts().items()]
    rows += [["total", f"{found.total / GB:.2f}"], ["(a block of logits)", f"{found.logits / GB:.2f}"]]
    seconds = found.seconds(device, run.dtype, config.utilisation)
    count = config.count_steps()
    whole = "" if count is None else f"; the whole run {count * seconds / 3600:.1f} h"
    each = "" if layout is None else " a device"
    total = found.flops * found.devices
    answers.say(f"{config.model} on {device.name}: {found.verdict(device)}.")
    tables.print_table(f"{config.model}, {config.in_words()}", ["memory", f"GB{each}"], rows)
    if layout is not None:
        show_placement(config, model, layout)
    tables.print_text(
        f"parameters {found.parameters:,}, trained {found.trainable:,} ({found.trainable / found.parameters:.2%})\n"
        f"products {total / 1e12:.4g} TFLOP a step, {total / found.tokens / 1e9:.3g} GFLOP a token\n"
        f"{seconds:.3g} s a step, {found.tokens / seconds:.0f} tokens/s{whole}\n"
        f"{config.basis()}"
    )
    own = capacity.measure_step(model, run, config.seq, layout) if config.measure else None
    if config.compile:
        xla = own.program if own else capacity.compile_here(model, run, config.seq, layout)
        arguments = found.base + found.adapter + found.optimizer + found.batch
        tables.print_text(
            f"XLA for this machine ({xla.seconds:.0f} s): arguments {xla.arguments / GB:.2f} GB (here "
            f"{arguments / GB:.2f}), temporaries {xla.temporaries / GB:.2f} GB (here "
            f"{(found.total - arguments) / GB:.2f})."
        )
    if own:
        tables.print_text(
            f"measured here: peak{each} {own.peak / GB:.3f} GB, predicted {found.total / GB:.3f} GB "
            f"(predicted / measured {found.total / own.peak:.3f}); {own.seconds:.2f} s a step. XLA's own account of "
            f"it is {own.program.total / GB:.3f} GB; the rest is code, stacks and packed operands of products."
        )
    if config.compile or own:
        tables.print_text(capacity.CPU_MEMORY_NOTE)


def show_placement(config: Config, model: LlamaConfig, layout: Layout) -> None:
    """What of the run is split over the devices."""
    rows = [
        [one.name, f"in {one.ways}" if one.ways > 1 else "whole", *(f"{size / GB:.2f}" for size in sizes)]
        for one in capacity.placement(model, config.finetune(), layout)
        for sizes in [(one.bytes_whole, one.bytes_per_device)]
    ]
    tables.print_table("the base", ["arrays", "split", "GB", "GB a device"], rows, left=2)
    rows_each = config.batch_size // layout.parts
    tables.print_text(
        f"batch and activations are split in {layout.parts}: {rows_each} rows a device; adapter, its gradient and the "
        "optimizer's state are whole on each"
    )


main = cli.command(Config, run, __doc__)

if __name__ == "__main__":
    main()
