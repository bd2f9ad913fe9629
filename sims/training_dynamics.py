"""How the change of an adapted layer depends on the rank, after 1, 2, 5, 10, 30 and 100 steps.

A student with a low-rank adapter learns from a teacher (`toy.dynamics`: a linear layer and a small MLP), with
SGD, SGD with momentum, Adam and AdamW, from A random and B = 0, the reverse, and with A random and frozen.
The scaling rules meet at the reference rank. Every quantity's log-log slope against the rank is fitted seed by seed; a
slope of 0 is what a rule promises.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rora_theory.errors import InputError
from rora_theory.inits import INITS, Init
from rora_theory.optimizers import OPTIMIZER_NAMES, OptimizerName
from rora_theory.rules import alpha_at, check_list, check_ranks, check_steps
from rora_theory.scaling import check_positive, exponent, scaling_factor
from rora_theory.seeds import check_seed
from rora_theory.toy import dynamics, ensemble
from rora_theory.toy.dynamics import ProblemConfig
from rora_theory.toy.exponents import CELL, QUANTITIES, SATURATED, Answer, answers, fits, summarise
from sims.common import cli, devices, scalings, tables
from sims.common.cells import Cells
from sims.common.progress import progress_bar
from sims.common.run_folder import RunFolder

NAME = "training_dynamics"

SEED_COLUMNS = (*CELL, "seed", "step", "diverged", *QUANTITIES)
COLUMNS = (*CELL, "step", "seeds", "diverged", *(name for q in QUANTITIES for name in (q, f"{q}_se")))
FIT_COLUMNS = (
    "model", "start", "trained", "optimizer", "rule", "kappa", "range", "lowest_rank", "highest_rank", "ranks", "step",
    "quantity", "slope", "standard_error", "seeds", "verdict", "loss_left",
)  # fmt: skip
UNITS = {
    "loss": "squared error / 2, summed over outputs, averaged over inputs",
    "output_train, output_held_out": "root mean square of the change of the model's output",
    "delta_frobenius, delta_spectral": "|gamma B A|_F over layers together, largest |gamma B A|_2 of a layer",
    "inner": "root mean square of A x on training inputs",
    "grad_A, grad_B": "Frobenius norm of the gradient at that step's parameters",
    "_se": "standard error of the mean over the seeds that did not diverge",
    "loss_left": "least training loss among the fitted ranks, over its start: near 0 the output can grow no more",
    "trained": "both factors, or B alone with A frozen",
}


@dataclass(frozen=True)
class Config:
    """What to train. Lists are separated by spaces."""

    ranks: tuple[int, ...] = (4, 16, 64, 256, 1024)
    """Ranks of the adapter, at least two; they may exceed the layer's width."""
    rules: tuple[str, ...] = ("lora", "rora", "0.25")
    """Scaling rules: lora, rora, rslora, or the exponent kappa of gamma = alpha / r^kappa."""
    optimizers: tuple[OptimizerName, ...] = ("sgd", "momentum", "adam", "adamw")
    """Optimizers: momentum is 0.9; adamw decays by 0.01."""
    models: tuple[dynamics.Model, ...] = ("linear", "mlp")
    """The problems."""
    starts: tuple[dynamics.Start, ...] = ("A", "B")
    """The factor that starts random; the other starts at zero."""
    freeze_control: bool = True
    """Train from A random once more with A frozen."""
    steps: tuple[int, ...] = (1, 2, 5, 10, 30, 100)
    """Updates after which to measure, ascending; the start is measured too."""
    seeds: int = 8
    """Number of problems and adapters, 2 or more for error bars."""
    gamma: float = 1.0
    """Scaling of every rule at the reference rank."""
    reference_rank: int = 4
    """Rank at which the rules meet."""
    sgd_rate: float = 0.003
    """Learning rate of sgd."""
    momentum_rate: float = 3e-4
    """Learning rate of momentum."""
    adam_rate: float = 1e-4
    """Learning rate of adam and adamw."""
    init: Init = "kaiming_uniform"
    """Law of A where it starts random."""
    p_in: int = 512
    """Inputs of the model."""
    hidden: int = 128
    """Hidden units of the MLP."""
    p_out: int = 32
    """Outputs of the model."""
    samples: int = 8
    """Training inputs, all in every step."""
    held_out: int = 32
    """Held-out inputs."""
    overlap: float = 0.0
    """Overlap of any two inputs, from 0 to 1."""
    teacher_rank: int = 4
    """Rank of the change to learn, in each layer."""
    noise: float = 0.1
    """Standard deviation of the noise on the targets."""
    seed: int = 0
    """Seed of all draws."""
    out: Path | None = None
    """Run folder; by default results/training_dynamics/ID with ID from the arguments."""


class Cell(NamedTuple):
    """One compiled scan over all seeds."""

    model: dynamics.Model
    start: dynamics.Start
    frozen: bool
    optimizer: OptimizerName
    rank: int
    rule: str

    @property
    def trained(self) -> str:
        return "B" if self.frozen else "both"

    @property
    def key(self) -> tuple[str, ...]:
        """The cell as its rows name it."""
        return (self.model, self.start, self.trained, self.optimizer, self.rule, str(self.rank))


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, check, run."""
    cli.run(lambda: run(cli.parse(Config, argv, description=__doc__ or "")))


def run(config: Config) -> None:
    """Train every cell, or those that an earlier part of the run left; fit, judge and print."""
    check(config)
    started = time.monotonic()
    places = devices.pick(1)
    identity = {name: value for name, value in asdict(config).items() if name != "out"}
    extra = {"units": UNITS, "device": devices.describe(places)}
    folder = RunFolder.open(NAME, identity, out=config.out, seed=config.seed, extra=extra)
    kept = Cells(folder)
    rows: list[dict[str, Any]] = []
    todo = list(cells(config))
    written = time.monotonic()
    with progress_bar("training dynamics", len(todo), fields="{cell}") as bar:
        for cell in todo:
            label = f"{cell.model}, {cell.optimizer}, {cell.start} random, r = {cell.rank}"
            bar.advance(0, cell=label)
            rows += kept.do(" ".join(cell.key), partial(train, config, cell))
            if time.monotonic() - written > 5:
                folder.write_rows(SEED_COLUMNS, rows, "seeds.csv")
                written = time.monotonic()
            bar.advance(1, cell=label)
    folder.write_rows(SEED_COLUMNS, rows, "seeds.csv")
    folder.write_rows(COLUMNS, summarise(rows))
    found = fits(rows)
    folder.write_rows(FIT_COLUMNS, found, "exponents.csv")
    answered = answers(
        found,
        models=config.models if "A" in config.starts else (),
        optimizers=config.optimizers,
        kappas=[exponent(rule) for rule in scalings.parse_rules(config.rules).values()],
        ranks=config.ranks,
        overlap=config.overlap,
        freeze_control=config.freeze_control,
    )
    folder.write("answers.json", json.dumps([answer._asdict() for answer in answered], indent=2) + "\n")
    folder.finish(last_session_seconds=round(time.monotonic() - started, 1))
    report(config, rows, found, answered)
    tables.print_text(f"{len(todo)} cells in {time.monotonic() - started:.1f} s, written to {folder.path}")


def check(config: Config) -> None:
    """Refuse wrong arguments, naming the option.

    Raises:
      InputError: see the options' ranges.
    """
    check_ranks(config.ranks)
    for rule in scalings.parse_rules(config.rules).values():
        alpha_at(rule, gamma=config.gamma, reference_rank=config.reference_rank)
    for name, accepted in (
        ("optimizers", OPTIMIZER_NAMES),
        ("models", dynamics.MODELS),
        ("starts", dynamics.STARTS),
    ):
        check_list("--" + name, getattr(config, name))
        for value in getattr(config, name):
            if value not in accepted:
                raise InputError(f"--{name} has {value!r}; accepted are {', '.join(accepted)}")
    if config.init not in INITS:
        raise InputError(f"--init is {config.init!r}; accepted are {', '.join(INITS)}")
    check_steps(config.steps)
    for name in ("sgd_rate", "momentum_rate", "adam_rate"):
        check_positive("--" + name.replace("_", "-"), getattr(config, name))
    cli.check_integers(config, seeds=2)
    check_seed(config.seed, "--seed")
    for model in config.models:
        problem(config, model)


def problem(config: Config, model: dynamics.Model) -> ProblemConfig:
    """The problem's configuration."""
    names = ("p_in", "hidden", "p_out", "samples", "held_out", "overlap", "teacher_rank", "noise")
    return ProblemConfig(model=model, **{name: getattr(config, name) for name in names})


def cells(config: Config) -> Iterator[Cell]:
    """All cells; those that share a compiled function follow each other."""
    for model in config.models:
        for optimizer in config.optimizers:
            for rank in sorted(config.ranks):
                for start in config.starts:
                    for frozen in frozens(config, start):
                        for rule in config.rules:
                            yield Cell(model, start, frozen, optimizer, rank, rule)


def frozens(config: Config, start: dynamics.Start) -> tuple[bool, ...]:
    """Whether the factor that starts random is held, in each of a start's runs."""
    return (False, True) if config.freeze_control and start == "A" else (False,)


def rate(config: Config, optimizer: OptimizerName) -> float:
    """The learning rate of an optimizer."""
    return {"sgd": config.sgd_rate, "momentum": config.momentum_rate}.get(optimizer, config.adam_rate)


def train(config: Config, cell: Cell) -> list[dict[str, Any]]:
    """The rows of a cell: one a seed and recorded step."""
    rule = scalings.parse_rules(config.rules)[cell.rule]
    alpha = alpha_at(rule, gamma=config.gamma, reference_rank=config.reference_rank)
    scaling = scaling_factor(rule, alpha=alpha, rank=cell.rank)
    learning_rate = rate(config, cell.optimizer)
    adapters, problems = ensemble.draw(
        problem(config, cell.model),
        rank=cell.rank,
        seeds=range(config.seeds),
        seed=config.seed,
        start=cell.start,
        init=config.init,
    )
    values, diverged = ensemble.trajectories(
        adapters,
        problems,
        scaling=scaling,
        learning_rate=learning_rate,
        optimizer=cell.optimizer,
        steps=config.steps,
        frozen=cell.start if cell.frozen else None,
    )
    frame = dict(zip(CELL, (*cell.key[:5], exponent(rule), cell.rank, scaling, learning_rate), strict=True))
    return [
        frame
        | {"seed": seed, "step": step, "diverged": int(diverged[seed, index])}
        | {name: float(f"{value[seed, index]:.6g}") for name, value in values.items()}
        for seed in range(config.seeds)
        for index, step in enumerate((0, *config.steps))
    ]


def report(
    config: Config, rows: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]], answered: Sequence[Answer]
) -> None:
    """Print slopes at the first, a middle and the last step, the diverged cells, and the answers."""
    shown = dict.fromkeys((config.steps[0], config.steps[len(config.steps) // 2], config.steps[-1]))
    quantities = {"output_train": "training", "output_held_out": "held-out", "delta_frobenius": "|dM|_F"}
    for model in config.models:
        for start in config.starts:
            for frozen in frozens(config, start):
                trained = Cell(model, start, frozen, "sgd", 1, "").trained
                table = {
                    (row["optimizer"], row["rule"], row["quantity"], row["step"]): row
                    for row in found
                    if (row["model"], row["start"], row["trained"], row["range"]) == (model, start, trained, "all")
                }
                tables.print_table(
                    f"{model}, {start} random at the start, {trained} trained: slope in the rank of the output change "
                    "and of |dM|_F, ± s.e., by step; * loss below half its start, † ranks left out as diverged",
                    ["optimizer", "rule", *[f"{label} {step}" for label in quantities.values() for step in shown]],
                    [
                        [
                            optimizer,
                            rule,
                            *[
                                _slope_text(table.get((optimizer, rule, quantity, step)), len(config.ranks))
                                for quantity in quantities
                                for step in shown
                            ],
                        ]
                        for optimizer in config.optimizers
                        for rule in config.rules
                    ],
                    left=2,
                )
    last = [row for row in rows if row["step"] == config.steps[-1] and row["diverged"]]
    ended = dict.fromkeys(tuple(row[name] for name in (*CELL[:5], "rank")) for row in last)
    if ended:
        tables.print_text("diverged by the last step (model, start, trained, optimizer, rule, rank): ")
        for cell in ended:
            tables.print_text("  " + ", ".join(map(str, cell)))
    else:
        tables.print_text("no run diverged")
    tables.print_table("Answers", ["question", "answer", "slope ± s.e. at each step"], answered, left=3)


def _slope_text(row: dict[str, Any] | None, ranks: int) -> str:
    if row is None:
        return "diverged"
    marks = ("*" if row["loss_left"] < SATURATED else "") + ("†" if row["ranks"] < ranks else "")
    return f"{row['slope']:+.2f} ± {row['standard_error']:.2f}{marks}"


if __name__ == "__main__":
    main(sys.argv[1:])
