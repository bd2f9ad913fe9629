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

import jax
import numpy as np

from rora_theory.errors import InputError
from rora_theory.inits import INITS, Init
from rora_theory.scaling import check_positive, exponent, scaling_factor
from rora_theory.seeds import check_seed
from rora_theory.stats import slopes
from rora_theory.toy import dynamics
from rora_theory.toy.dynamics import Measures, ProblemConfig
from sims.common import cli, devices, scalings, tables
from sims.common.cells import Cells
from sims.common.progress import progress_bar
from sims.common.run_folder import RunFolder

NAME = "training_dynamics"

CELL = ("model", "start", "trained", "optimizer", "rule", "kappa", "rank", "scaling", "learning_rate")
QUANTITIES = Measures._fields
SEED_COLUMNS = (*CELL, "seed", "step", "diverged", *QUANTITIES)
COLUMNS = (*CELL, "step", "seeds", "diverged", *(name for q in QUANTITIES for name in (q, f"{q}_se")))
FIT_COLUMNS = (
    "model", "start", "trained", "optimizer", "rule", "kappa", "range", "lowest_rank", "highest_rank", "ranks", "step",
    "quantity", "slope", "standard_error", "seeds", "verdict", "loss_left",
)  # fmt: skip
FITTED = ("output_train", "output_held_out", "delta_frobenius", "delta_spectral", "inner", "grad_A", "grad_B")
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
NAMES = {"sgd": "SGD", "momentum": "SGD with momentum", "adam": "Adam", "adamw": "AdamW"}

CHANGE = 0.05
"""Least difference of two exponents that counts."""

SATURATED = 0.5
"""Below this share of its start, the training loss bounds the output change and no longer the step does."""


@dataclass(frozen=True)
class Config:
    """What to train. Lists are separated by spaces."""

    ranks: tuple[int, ...] = (4, 16, 64, 256, 1024)
    """Ranks of the adapter, at least two; they may exceed the layer's width."""
    rules: tuple[str, ...] = ("lora", "rora", "0.25")
    """Scaling rules: lora, rora, rslora, or the exponent kappa of gamma = alpha / r^kappa."""
    optimizers: tuple[dynamics.Optimizer, ...] = ("sgd", "momentum", "adam", "adamw")
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
    optimizer: dynamics.Optimizer
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
    found = fits(config, rows)
    folder.write_rows(FIT_COLUMNS, found, "exponents.csv")
    answered = answers(config, found)
    folder.write("answers.json", json.dumps([answer._asdict() for answer in answered], indent=2) + "\n")
    folder.finish(last_session_seconds=round(time.monotonic() - started, 1))
    report(config, rows, found, answered)
    tables.print_text(f"{len(todo)} cells in {time.monotonic() - started:.1f} s, written to {folder.path}")


def check(config: Config) -> None:
    """Refuse wrong arguments, naming the option.

    Raises:
      InputError: see the options' ranges.
    """
    scalings.check_ranks(config.ranks)
    for rule in scalings.parse_rules(config.rules).values():
        scalings.alpha_at(rule, gamma=config.gamma, reference_rank=config.reference_rank)
    for name, accepted in (
        ("optimizers", dynamics.OPTIMIZERS),
        ("models", dynamics.MODELS),
        ("starts", dynamics.STARTS),
    ):
        scalings.check_list(name, getattr(config, name))
        for value in getattr(config, name):
            if value not in accepted:
                raise InputError(f"--{name} has {value!r}; accepted are {', '.join(accepted)}")
    if config.init not in INITS:
        raise InputError(f"--init is {config.init!r}; accepted are {', '.join(INITS)}")
    dynamics.check_steps(config.steps)
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


def rate(config: Config, optimizer: dynamics.Optimizer) -> float:
    """The learning rate of an optimizer."""
    return {"sgd": config.sgd_rate, "momentum": config.momentum_rate}.get(optimizer, config.adam_rate)


def train(config: Config, cell: Cell) -> list[dict[str, Any]]:
    """The rows of a cell: one a seed and recorded step."""
    rule = scalings.parse_rules(config.rules)[cell.rule]
    alpha = scalings.alpha_at(rule, gamma=config.gamma, reference_rank=config.reference_rank)
    scaling = scaling_factor(rule, alpha=alpha, rank=cell.rank)
    learning_rate = rate(config, cell.optimizer)
    setting = problem(config, cell.model)
    keys = jax.vmap(lambda s: jax.random.split(jax.random.fold_in(jax.random.key(config.seed), s)))(
        np.arange(config.seeds)
    )
    drawn = jax.vmap(lambda key: dynamics.draw_problem(key, setting))(keys[:, 0])
    adapters = jax.vmap(
        lambda key: dynamics.draw_adapters(key, setting, rank=cell.rank, start=cell.start, init=config.init)
    )(keys[:, 1])
    measured = dynamics.trajectories(
        adapters,
        drawn,
        scaling,
        learning_rate,
        optimizer=cell.optimizer,
        steps=config.steps,
        frozen=cell.start if cell.frozen else None,
    )
    values = {name: np.asarray(value, np.float64) for name, value in measured._asdict().items()}
    finite = np.all([np.isfinite(value) for value in values.values()], axis=0)
    bounded = values["loss_train"] <= dynamics.DIVERGED * values["loss_train"][:, :1]
    # Once diverged, a run stays so: what it does later means nothing.
    diverged = np.maximum.accumulate(~(finite & bounded), axis=1)
    frame = dict(zip(CELL, (*cell.key[:5], exponent(rule), cell.rank, scaling, learning_rate), strict=True))
    return [
        frame
        | {"seed": seed, "step": step, "diverged": int(diverged[seed, index])}
        | {name: float(f"{value[seed, index]:.6g}") for name, value in values.items()}
        for seed in range(config.seeds)
        for index, step in enumerate((0, *config.steps))
    ]


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds with their standard errors, a row a cell and step; diverged seeds are counted and left out."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((_key(row), row["step"]), []).append(row)
    found = []
    for group in groups.values():
        kept = [row for row in group if not row["diverged"]]
        line = {name: group[0][name] for name in (*CELL, "step")}
        line |= {"seeds": len(group), "diverged": len(group) - len(kept)}
        for name in QUANTITIES if kept else ():
            fit = slopes.over_seeds(np.array([row[name] for row in kept]))
            line[name] = float(f"{fit.slope:.4g}")
            line[f"{name}_se"] = float(f"{fit.standard_error:.2g}") if len(kept) > 1 else None
        found.append(line)
    return found


def fits(config: Config, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Slopes against the rank, over all ranks and over the upper half; ranks with a diverged seed are left out."""
    table = {(_key(row), row["step"], row["seed"]): row for row in rows}
    ranks = sorted(config.ranks)
    ranges = {"all": ranks} if len(ranks) < 4 else {"all": ranks, "upper": ranks[len(ranks) // 2 :]}
    groups = dict.fromkeys((cell.model, cell.start, cell.frozen, cell.optimizer, cell.rule) for cell in cells(config))
    found = []
    for model, start, frozen, optimizer, rule in groups:
        for span, members in ranges.items():
            for step in (0, *config.steps):
                by_rank = {
                    rank: [
                        table[Cell(model, start, frozen, optimizer, rank, rule).key, step, seed]
                        for seed in range(config.seeds)
                    ]
                    for rank in members
                }
                kept = {rank: group for rank, group in by_rank.items() if not any(row["diverged"] for row in group)}
                if len(kept) < 2:
                    continue
                origin = {
                    rank: [
                        table[Cell(model, start, frozen, optimizer, rank, rule).key, 0, seed]["loss_train"]
                        for seed in range(config.seeds)
                    ]
                    for rank in kept
                }
                left = min(
                    float(np.mean([row["loss_train"] for row in group]) / np.mean(origin[rank]))
                    for rank, group in kept.items()
                )
                for quantity in FITTED:
                    values = np.array([[row[quantity] for row in group] for group in kept.values()]).T
                    if not (values > 0).all():
                        continue  # nothing has moved yet
                    by_seed = slopes.seed_slopes(list(kept), values)
                    fit = slopes.over_seeds(by_seed)
                    found.append(
                        {name: kept[min(kept)][0][name] for name in CELL[:6]}
                        | {"range": span, "lowest_rank": min(kept), "highest_rank": max(kept), "ranks": len(kept)}
                        | {"step": step, "quantity": quantity, "slope": float(f"{fit.slope:.5f}")}
                        | {"standard_error": float(f"{fit.standard_error:.2g}"), "seeds": fit.seeds}
                        | {"verdict": slopes.judge(fit), "loss_left": float(f"{left:.3g}"), "by_seed": by_seed}
                    )
    return found


class Answer(NamedTuple):
    """A question that the run settles, or doesn't."""

    question: str
    answer: str
    figures: str


def answers(config: Config, found: Sequence[dict[str, Any]]) -> list[Answer]:
    """What the slopes say of the claims in the literature, for every model with A random at the start."""
    kappas = {exponent(rule) for rule in scalings.parse_rules(config.rules).values()}
    listed = []

    ranks = sorted(config.ranks)
    far = f"from r = {ranks[len(ranks) // 2]} on" if len(ranks) >= 4 else ""

    def add(model: str, optimizer: str, quantity: str, kappa: float, question: str, span: str = "all") -> None:
        if optimizer in config.optimizers and kappa in kappas:
            rows = _line(found, model, optimizer, quantity, kappa, span=span)
            listed.append(Answer(f"{model}, {question}", by_step(rows), slopes_by_step(rows)))

    apart = f"output change on held-out inputs (overlap {config.overlap:g})"
    for model in config.models if "A" in config.starts else ():
        for span, where in {"all": "", "upper": far}.items():
            if span == "all" or where:
                theorem = f"SGD: output change on training inputs flat under alpha/sqrt(r) (rsLoRA's theorem) {where}"
                add(model, "sgd", "output_train", 0.5, theorem.strip() + "?", span)
                theta = f"Adam: output change on training inputs flat under alpha/r, so as r at fixed gamma {where}"
                add(model, "adam", "output_train", 1.0, theta.strip() + "?", span)
        add(model, "sgd", "output_held_out", 0.25, f"SGD: {apart} flat under kappa = 1/4?")
        add(model, "adam", "output_held_out", 0.5, f"Adam: {apart} flat under kappa = 1/2?")
        for optimizer, power in (("sgd", 2), ("adam", 1)):
            if optimizer not in config.optimizers or not config.freeze_control or 1.0 not in kappas:
                continue
            both, frozen = (
                _line(found, model, optimizer, "delta_frobenius", 1.0, trained) for trained in ("both", "B")
            )
            question = f"{model}, {NAMES[optimizer]}: exponent of |dM|_F changes once A moves?"
            shown = f"A trained: {at_gamma_one(both, power)}; A frozen: {at_gamma_one(frozen, power)}"
            listed.append(Answer(question, changed(both, frozen), f"under alpha/r, plus {power}: {shown}"))
    return listed


def _line(
    found: Sequence[dict[str, Any]],
    model: str,
    optimizer: str,
    quantity: str,
    kappa: float,
    trained: str = "both",
    span: str = "all",
) -> list[dict[str, Any]]:
    """The fits of one curve, A random at the start, along the steps."""
    return [
        row
        for row in found
        if (row["model"], row["start"], row["trained"], row["range"]) == (model, "A", trained, span)
        and (row["optimizer"], row["quantity"], row["kappa"]) == (optimizer, quantity, kappa)
        and row["step"] > 0
    ]


def by_step(rows: Sequence[dict[str, Any]]) -> str:
    """The verdicts along the steps, in words; steps at which the loss has come below half are named so."""
    if not rows:
        return "not measured: the runs diverged"
    parts = []
    for row in rows:
        ended = row["loss_left"] < SATURATED
        parts.append((row["verdict"] + (" (loss below half)" if ended else ""), str(row["step"])))
    groups: list[tuple[str, list[str]]] = []
    for verdict, step in parts:
        if not groups or groups[-1][0] != verdict:
            groups.append((verdict, []))
        groups[-1][1].append(step)
    return "; ".join(f"{verdict} at step{'s' if len(steps) > 1 else ''} {' '.join(steps)}" for verdict, steps in groups)


def slopes_by_step(rows: Sequence[dict[str, Any]]) -> str:
    """Slopes with standard errors along the steps."""
    return ", ".join(f"{row['step']}: {row['slope']:+.3f} ± {row['standard_error']:.3f}" for row in rows)


def at_gamma_one(rows: Sequence[dict[str, Any]], power: int) -> str:
    """Exponents with the first step's power of gamma divided out."""
    return ", ".join(
        f"{row['step']}: {row['slope'] + power * row['kappa']:.2f} ± {row['standard_error']:.2f}" for row in rows
    )


def changed(both: Sequence[dict[str, Any]], frozen: Sequence[dict[str, Any]]) -> str:
    """Whether training A changes the exponent, seed by seed, at the last step before the loss is below half."""
    pairs = [
        (a, b)
        for a in both
        for b in frozen
        if a["step"] == b["step"] and min(a["loss_left"], b["loss_left"]) >= SATURATED
    ]
    if not pairs:
        return "not settled: the loss is below half of its start at every step"
    a, b = pairs[-1]
    fit = slopes.over_seeds(a["by_seed"] - b["by_seed"])
    word = {"flat": "no", "undecided": "undecided"}.get(slopes.judge(fit, CHANGE), "yes")
    return f"{word}: by {fit.slope:+.3f} ± {fit.standard_error:.3f} at step {a['step']}"


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
    ended = dict.fromkeys((*_key(row)[:5], row["rank"]) for row in last)
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


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return (row["model"], row["start"], row["trained"], row["optimizer"], row["rule"], str(row["rank"]))


if __name__ == "__main__":
    main(sys.argv[1:])
