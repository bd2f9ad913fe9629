"""Estimate whether a fine-tuning run fits on a GPU, and how long it takes, on any machine and without weights.

    python -m sims.capacity
    python -m sims.capacity --model llama-7b --method dora --rank 128 --device h100 --examples 170420
    python -m sims.capacity --model llama-13b --memory 24 --tflops 120 --replicas 2 --fsdp 4

The first command prints a table of the paper's five models on a 48 GB A6000. The second estimates one model on an
H100. The third estimates a model on eight devices of 24 GB and 120 TFLOP/s, where four devices share a copy of the
weights.

The estimate uses the shapes of the traced training step. ``--compile`` adds the memory analysis of XLA's compiler for
this machine. ``--measure`` runs two steps on this machine, on random weights, and compares them with the estimate.
"""

from dataclasses import dataclass

from rora_theory.errors import InputError
from rora_theory.lab.finetune import capacity
from rora_theory.lab.finetune.capacity import GB, PAPER_MODELS
from rora_theory.lab.finetune.plan import PlanConfig
from rora_theory.lab.finetune.sharding import Layout
from rora_theory.lab.llama import LlamaConfig
from sims.common import answers, cli, tables


@dataclass(frozen=True)
class Config(PlanConfig):
    """Options of the estimate. The defaults are the paper's protocol at its largest rank."""

    compile: bool = False
    """Compile the step for this machine and print XLA's memory analysis"""
    measure: bool = False
    """Run two steps on this machine and print their memory and time"""

    def __post_init__(self) -> None:
        """Validate the options."""
        super().__post_init__()
        if self.model is None and (self.compile or self.measure):
            raise InputError("--compile and --measure require one model. Set --model.")


def run(config: Config) -> None:
    """Print the table of the paper's models, or the estimate of one model."""
    if config.model is None:
        show_table(config)
    else:
        show_model(config, capacity.find_model(config.model))


def show_table(config: Config) -> None:
    """Print the estimates of the paper's models, with and without rematerialisation."""
    device, layout = config.resolve_device(), config.layout()
    estimates = capacity.fit_table(
        PAPER_MODELS, config.finetune(), device, width=config.seq, utilisation=config.utilisation, layout=layout
    )
    # One row for each model and for each setting of rematerialisation.
    count = config.count_steps()
    forms = {"model": "{model}", "remat": "{remat}", "trained %": "{trained:.2f}", "base GB": "{base:.1f}"}
    forms |= {"trained + Adam GB": "{state:.1f}", "activations GB": "{activations:.1f}", "total GB": "{total:.1f}"}
    forms |= {"verdict": "{verdict}", "s per step": "{seconds:.2f}"}
    forms |= {} if count is None else {"whole run": "{hours:.1f} h"}
    shown = estimates.assign(
        remat=estimates["remat"].map({False: "no", True: "yes"}),
        verdict=estimates["fits"].map({False: "does not fit", True: "fits"}),
        hours=estimates["seconds"] * (count or 0) / 3600,
    )
    fitting = [f"{row.model}{' (remat)' * row.remat}" for row in estimates[estimates["fits"]].itertuples()]
    answers.print_answer(f"Models that fit on {device.name}: {', '.join(fitting) or 'none'}.")
    tables.print_records(f"{device.name}, {config.describe()}", shown, forms, left=2)
    tables.print_text(config.describe_assumptions())


def show_model(config: Config, model: LlamaConfig) -> None:
    """Print the estimate of one model by component, then XLA's analysis and the measurement, if requested."""
    run, device = config.finetune(), config.resolve_device()
    layout = config.layout(here=config.compile or config.measure)
    estimate = capacity.estimate_step(model, run, config.seq, layout)
    # Memory by component, from the traced program.
    rows = [[name, f"{size / GB:.2f}"] for name, size in estimate.parts().items()]
    rows += [["total", f"{estimate.total / GB:.2f}"], ["(a block of logits)", f"{estimate.logits / GB:.2f}"]]
    # Time of a step, and of the whole run if its length is known.
    seconds = estimate.seconds(device, run.dtype, config.utilisation)
    count = config.count_steps()
    run_time = "" if count is None else f"; the whole run takes {count * seconds / 3600:.1f} h"
    per_device = "" if layout is None else " per device"
    flops = estimate.flops * estimate.devices
    # Print the verdict first, then what it is based on.
    answers.print_answer(f"{config.model} on {device.name}: {estimate.verdict(device)}.")
    tables.print_table(f"{config.model}, {config.describe()}", ["memory", f"GB{per_device}"], rows)
    if layout is not None:
        show_placement(config, model, layout)
    tables.print_text(
        f"parameters {estimate.parameters:,}, trained {estimate.trainable:,} "
        f"({estimate.trainable / estimate.parameters:.2%})\n"
        f"products {flops / 1e12:.4g} TFLOP per step, {flops / estimate.tokens / 1e9:.3g} GFLOP per token\n"
        f"{seconds:.3g} s per step, {estimate.tokens / seconds:.0f} tokens/s{run_time}\n"
        f"{config.describe_assumptions()}"
    )
    # Compile, and run, the step on this machine to check the estimate, if requested.
    measured = capacity.measure_step(model, run, config.seq, layout) if config.measure else None
    if config.compile:
        xla = measured.program if measured else capacity.analyse_compiled_step(model, run, config.seq, layout)
        arguments = estimate.base + estimate.adapter + estimate.optimizer + estimate.batch
        tables.print_text(
            f"XLA's analysis for this machine ({xla.seconds:.0f} s): arguments {xla.arguments / GB:.2f} GB (estimated "
            f"{arguments / GB:.2f}), temporaries {xla.temporaries / GB:.2f} GB (estimated "
            f"{(estimate.total - arguments) / GB:.2f})."
        )
    if measured:
        tables.print_text(
            f"Measured on this machine: peak{per_device} {measured.peak / GB:.3f} GB, estimated "
            f"{estimate.total / GB:.3f} GB (estimated / measured {estimate.total / measured.peak:.3f}); "
            f"{measured.seconds:.2f} s per step. XLA's analysis gives {measured.program.total / GB:.3f} GB; the rest "
            "is code, stacks and packed operands of products."
        )
    if config.compile or measured:
        tables.print_text(capacity.CPU_MEMORY_NOTE)


def show_placement(config: Config, model: LlamaConfig, layout: Layout) -> None:
    """Print how the arrays of the run are split over the devices."""
    # One line for each kind of array.
    rows = [
        [
            arrays.name,
            f"in {arrays.ways}" if arrays.ways > 1 else "whole",
            f"{arrays.bytes_whole / GB:.2f}",
            f"{arrays.bytes_per_device / GB:.2f}",
        ]
        for arrays in capacity.placement(model, config.finetune(), layout)
    ]
    tables.print_table("Base weights", ["arrays", "split", "GB", "GB per device"], rows, left=2)
    rows_per_device = config.batch_size // layout.parts
    tables.print_text(
        f"The batch and the activations are split in {layout.parts}: {rows_per_device} rows per device. Every device "
        "has the whole adapter, its gradient and the optimizer's state."
    )


main = cli.command(Config, run, __doc__)

if __name__ == "__main__":
    main()
