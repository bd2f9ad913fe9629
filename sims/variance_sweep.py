"""First-step variance against rank and scaling: simulated, exact and printed, and a verdict on every equation.

Simulates w = dM x', the increment of an adapted layer after one optimizer step, for every optimizer, init, overlap of
the inputs, scaling rule and rank; compares with the exact law and with the paper's Eq. 9; fits log-log exponents;
judges Eq. 1-15. One simulation serves all rules: w carries gamma^2 (SGD) or gamma (Adam) as a factor, which the direct
sampler checks by simulating each rule by itself on part of the grid.
"""

import itertools
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax

from rora_theory import seals
from rora_theory.errors import InputError
from rora_theory.files import write_whole
from rora_theory.inits import Init, entries
from rora_theory.paper import quantities, verdicts
from rora_theory.scaling import Rule, check_positive, check_rank, exponent, scaling_factor
from rora_theory.seeds import check_seed
from rora_theory.stats.moments import Moments, agreement, log_log_fit
from rora_theory.theory import laws, sampling
from sims import layer_sweep
from sims.common import cli, devices, tables
from sims.common.cells import Cells
from sims.common.progress import progress_bar
from sims.common.run_folder import RunFolder
from sims.common.scalings import parse_rules

NAME = "variance_sweep"

COLUMNS = (
    "optimizer", "rule", "kappa", "init", "overlap", "p_in", "p_out", "rank", "alpha", "scaling",
    "quantity", "estimate", "standard_error", "exact", "paper", "draws", "sampler",
)  # fmt: skip
UNITS = {
    "mean": "E[w_i]",
    "second_moment": "E[w_i^2]",
    "variance": "Var[w_i]",
    "norm": "root mean square of |w|_2 over draws, sqrt(E|w|_2^2)",
    "exact": "rora_theory.theory.laws",
    "paper": "Eq. 6 (mean), Eq. 9 (second_moment, variance), Eq. 11 (norm); SGD only",
    "loss": "L = sum_i w_i, so delta_i = 1",
}

RELATIVE_ERROR = 0.005

MOST_DRAWS, LEAST_ERROR = 10**9, 5e-5
"""A second moment of n normal draws has the relative error sqrt(2 / n)."""

LARGEST_POWER = 18
"""Of ten, of a scaling or a step."""

CHECK_RANKS = (1, 8, 64)
CHECK_OVERLAPS = (0.0, 0.5)
CHECK_DRAWS = 1024


@dataclass(frozen=True)
class Config:
    """What to sweep. Lists are separated by spaces."""

    ranks: tuple[int, ...] = verdicts.RANKS
    """Ranks of the adapter, each 1 or more."""
    p_in: int = 4096
    """Inputs of the layer (LLaMA-7B's width)."""
    p_out: int = 4096
    """Outputs of the layer."""
    rules: tuple[str, ...] = ("lora", "rora", "0.25")
    """Scaling rules: lora, rora, rslora, or the exponent kappa of gamma = alpha / r^kappa."""
    overlaps: tuple[float, ...] = (0.0, 0.1, 0.5, 1.0)
    """Correlation of the inputs before and after the step, each from -1 to 1."""
    optimizers: tuple[laws.Optimizer, ...] = ("sgd", "adam")
    """Optimizers whose first step is taken."""
    inits: tuple[Init, ...] = ()
    """Distributions of A. By default normal, the paper's N(0, 1); with --layer-data kaiming_uniform, PEFT's default."""
    alpha: float = 16.0
    """Adapter strength, above 0."""
    learning_rate: float = 1e-4
    """Learning rate, above 0."""
    sampler: Literal["auto", "direct", "reduced"] = "auto"
    """direct draws A and differentiates; reduced draws what w depends on (Gaussian A only); auto takes the cheaper."""
    relative_error: float | None = None
    """Draw until the relative standard error is this or less: of the second moment, by default 0.005; with --layer-data
    of the rms, by default 0.01."""
    draws: int | None = None
    """Draw exactly this many times instead."""
    seed: int = 0
    """Seed of all draws."""
    out: Path | None = None
    """Run folder; by default results/variance_sweep/ID with ID from the arguments."""
    devices: int | None = None
    """Devices to use; by default all accelerators, or one host device a core. Does not change the results."""
    layer_data: Path | None = None
    """An .npz of real layers' gradients and inputs: sweep these with the data held fixed instead of random inputs."""


@dataclass(frozen=True)
class Cell:
    """One simulation: everything but the rule."""

    optimizer: laws.Optimizer
    init: Init
    overlap: float
    rank: int

    @property
    def name(self) -> str:
        """As the run's files name it."""
        return f"{self.optimizer} {self.init} overlap={self.overlap!r} r={self.rank}"


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, check, run."""
    cli.run(lambda: run(cli.parse(Config, argv, description=__doc__ or "")))


def run(config: Config) -> None:
    """Run the sweep that ``config`` describes, or go on with it."""
    config = replace(config, inits=config.inits or (("normal",) if config.layer_data is None else ("kaiming_uniform",)))
    if config.layer_data is not None:
        layer_sweep.run(config, check(config))
        return
    check(config)
    started = time.monotonic()
    places = devices.pick(config.devices)
    folder = open_folder(NAME, config, places, UNITS)
    sweep = Sweep(config, folder, places)
    cells = list(sweep.cells())
    with progress_bar("variance sweep", len(cells) + 2, fields="{cell}") as bar:
        for cell in cells:
            label = f"{cell.optimizer}, overlap {cell.overlap:g}, r = {cell.rank}"
            bar.advance(0, cell=label)
            sweep.simulate(cell)
            bar.advance(1, cell=label)
        folder.write_rows(COLUMNS, sweep.rows)
        bar.advance(0, cell="direct check")
        check_rows = sweep.direct_check()
        bar.advance(1, cell="verdicts")
        judged = verdicts.judge(
            sweep.unit_sums, ranks=verdicts.enough_ranks(config.ranks), p_in=config.p_in, p_out=config.p_out
        )
        folder.write("verdicts.json", json.dumps([vars(verdict) for verdict in judged], indent=2) + "\n")
    folder.finish(last_session_seconds=round(time.monotonic() - started, 1))
    report(config, sweep.rows, check_rows, judged)
    tables.print_text(f"{len(cells)} cells in {time.monotonic() - started:.1f} s, {describe_files(folder.path)}")


def check(config: Config) -> dict[str, Rule]:
    """Refuse wrong arguments, naming the option; returns the rules parsed.

    Raises:
      InputError: see the options' ranges.
    """
    for name in ("ranks", "rules", "overlaps", "optimizers", "inits"):
        values = getattr(config, name)
        if not values:
            raise InputError(f"--{name} is empty; accepted is at least one value")
        if len(set(values)) != len(values):
            raise InputError(f"--{name} repeats a value ({' '.join(map(str, values))}); accepted are different ones")
    for rank in config.ranks:
        _named("--ranks", check_rank, rank)
    cli.check_integers(config, p_in=1, p_out=1, draws=2, devices=1)
    for overlap in config.overlaps:
        _named("--overlaps", laws.check_overlap, overlap)
    for name in ("alpha", "learning_rate", "relative_error"):
        if getattr(config, name) is not None:
            check_positive("--" + name.replace("_", "-"), getattr(config, name))
    if config.draws is not None and config.draws > MOST_DRAWS:
        raise InputError(
            f"--draws is {config.draws}; accepted are at most {MOST_DRAWS:,}: E[w^2] is then known to "
            f"{LEAST_ERROR:.0e} of itself, a hundred times finer than by default"
        )
    if config.relative_error is not None and config.relative_error < LEAST_ERROR:
        raise InputError(
            f"--relative-error is {config.relative_error}; accepted is {LEAST_ERROR:.0e} or more, which takes some "
            f"{MOST_DRAWS:,} draws"
        )
    check_seed(config.seed, "--seed")
    if config.sampler == "reduced":
        for init in config.inits:
            if not entries(init, rank=1, p_in=1).is_normal:
                raise InputError(f"--sampler reduced has no {init} init; accepted with it are normal and gaussian")
    rules = parse_rules(config.rules)
    for rule, rank, optimizer in itertools.product(rules.values(), config.ranks, config.optimizers):
        gamma = scaling_factor(rule, alpha=config.alpha, rank=rank)
        power = math.log10(config.learning_rate) + laws.scaling_power(optimizer) * math.log10(gamma)
        if max(abs(power), abs(math.log10(gamma))) > LARGEST_POWER:
            raise InputError(
                f"--alpha {config.alpha:g} and --learning-rate {config.learning_rate:g} give gamma {gamma:.1e} and a "
                f"step of 1e{power:.0f} at rank {rank} under {optimizer}; accepted are 1e-{LARGEST_POWER} to "
                f"1e{LARGEST_POWER}, whose squares float32 holds"
            )
    return rules


def open_folder(name: str, config: Config, places: list[jax.Device], units: dict[str, str]) -> RunFolder:
    """The run's folder; devices and place do not belong to its identity."""
    identity = {key: value for key, value in vars(config).items() if key not in ("out", "devices")}
    extra = {"units": units, "device": devices.describe(places)}
    return RunFolder.open(name, identity, out=config.out, seed=config.seed, extra=extra)


class Sweep:
    """The cells of a sweep, the rows of those that are done, and the file that holds them."""

    def __init__(self, config: Config, folder: RunFolder, places: list[jax.Device]) -> None:
        self.config, self.folder, self.places = config, folder, places
        self.rules = check(config)
        self.kept = Cells(folder)
        self.done: dict[Cell, list[dict[str, Any]]] = {}
        self._sums: dict[sampling.Setting, sampling.Sums] = {}
        self._written = 0.0

    def cells(self) -> Iterator[Cell]:
        """All cells, in the order of the rows."""
        config = self.config
        for optimizer in config.optimizers:
            for init in config.inits:
                for overlap in config.overlaps:
                    for rank in config.ranks:
                        yield Cell(optimizer, init, overlap, rank)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Rows of the finished cells, in order."""
        return [row for cell in self.cells() for row in self.done.get(cell, [])]

    def setting(self, cell: Cell) -> sampling.Setting:
        """The cell at unit scaling and learning rate."""
        return sampling.Setting(
            rank=cell.rank,
            p_in=self.config.p_in,
            p_out=self.config.p_out,
            overlap=cell.overlap,
            optimizer=cell.optimizer,
            init=cell.init,
        )

    def sampler(self, cell: Cell) -> sampling.Sampler:
        """The cell's sampler."""
        return "direct" if self.config.sampler == "direct" else sampling.best_sampler(self.setting(cell))

    def frame(self, cell: Cell) -> list[dict[str, Any]]:
        """The cell's rows without their figures: what the arguments alone determine."""
        config = self.config
        sampler = self.sampler(cell)
        rows = []
        for text, rule in self.rules.items():
            gamma = scaling_factor(rule, alpha=config.alpha, rank=cell.rank)
            frame = {
                "optimizer": cell.optimizer,
                "rule": text,
                "kappa": exponent(rule),
                "init": cell.init,
                "overlap": cell.overlap,
                "p_in": config.p_in,
                "p_out": config.p_out,
                "rank": cell.rank,
                "alpha": config.alpha,
                "scaling": gamma,
                "sampler": sampler,
            }
            setting = replace(self.setting(cell), scaling=gamma, learning_rate=config.learning_rate)
            exact, printed = quantities.exact(setting), quantities.printed(setting)
            rows += [
                frame | {"quantity": name, "exact": exact[name], "paper": printed[name]}
                for name in quantities.QUANTITIES
            ]
        return rows

    def simulate(self, cell: Cell) -> None:
        """Draw a cell to its end, unless an earlier part of the run did, and write the table with it."""

        def draw() -> list[dict[str, Any]]:
            sums = self.sums(self.setting(cell), self.sampler(cell))
            power = laws.scaling_power(cell.optimizer)
            return [
                row | estimate(sums, self.config.learning_rate * row["scaling"] ** power, row["quantity"])
                for row in self.frame(cell)
            ]

        fresh = cell.name not in self.kept
        self.done[cell] = self.kept.do(cell.name, draw)
        if fresh:
            self.folder.write_rows(COLUMNS, self.rows)

    def unit_sums(self, setting: sampling.Setting) -> sampling.Sums:
        """Sums of a setting of the paper (for the verdicts), by the sweep's own stopping rule."""
        return self.sums(setting, sampling.best_sampler(setting))

    def sums(self, setting: sampling.Setting, sampler: sampling.Sampler, draws: int | None = None) -> sampling.Sums:
        """Sums of one stream; a kill loses a few seconds of them."""
        if setting not in self._sums:
            key = sampling.stream_key(self.config.seed, setting, sampler)
            path, name = self.folder.path / "partial.json", repr((setting, sampler))

            def keep(done: int, sums: sampling.Sums) -> None:
                if time.monotonic() - self._written > 5:
                    self._written = time.monotonic()
                    state = {"stream": name, "blocks": done}
                    state |= {"first": sums.first.to_json(), "norm2": sums.norm2.to_json()}
                    write_whole(path, json.dumps(seals.seal(state, of=self.folder.identity)))

            self._sums[setting] = sampling.estimate(
                setting,
                sampler,
                key,
                relative_error=self.config.relative_error or RELATIVE_ERROR,
                draws=draws or self.config.draws,
                devices=self.places,
                start=_partial(path, name, self.folder.identity),
                on_block=keep,
            )
            path.unlink(missing_ok=True)
        return self._sums[setting]

    def direct_check(self) -> list[dict[str, Any]]:
        """The direct sampler on part of the grid, each rule simulated by itself; written to direct_check.csv."""
        config = self.config
        rows: list[dict[str, Any]] = []
        chosen = [
            cell
            for cell in self.cells()
            if cell.rank in CHECK_RANKS and cell.overlap in CHECK_OVERLAPS and self.sampler(cell) != "direct"
        ]

        def draw(cell: Cell) -> list[dict[str, Any]]:
            found = []
            for row in self.frame(cell):
                setting = replace(self.setting(cell), scaling=row["scaling"], learning_rate=config.learning_rate)
                sums = self.sums(setting, "direct", draws=CHECK_DRAWS)
                found.append(row | {"sampler": "direct"} | estimate(sums, 1.0, row["quantity"]))
            return found

        for cell in chosen:
            rows += self.kept.do(f"direct check, {cell.name}", partial(draw, cell))
        self.folder.write_rows(COLUMNS, rows, "direct_check.csv")
        return rows


def estimate(sums: sampling.Sums, step: float, quantity: quantities.Quantity) -> dict[str, Any]:
    """A row's estimate, error and number of draws."""
    found = quantities.estimate(sums, quantity, step=step)
    return {"estimate": found.value, "standard_error": found.error, "draws": found.n}


def _partial(path: Path, name: str, identity: str) -> tuple[int, sampling.Sums]:
    """Blocks and sums that an interrupted run, of this ``identity``, kept of the stream ``name``."""
    try:
        state = json.loads(path.read_text())
        if not seals.is_sealed(state, of=identity):
            raise ValueError("was changed since the run wrote it")
        if state["stream"] == name:
            return state["blocks"], sampling.Sums(Moments.from_json(state["first"]), Moments.from_json(state["norm2"]))
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: is damaged ({error}); remove it to draw its cell anew") from error
    return 0, sampling.Sums()


def _named(option: str, checker: Any, value: Any) -> None:
    try:
        checker(value)
    except InputError as error:
        raise InputError(f"{option}: {error}") from None


def report(
    config: Config,
    rows: list[dict[str, Any]],
    check_rows: list[dict[str, Any]],
    judged: list[verdicts.Verdict],
) -> None:
    """Print the tables: second moments, exponents, the direct check, the verdicts."""
    seconds = [row for row in rows if row["quantity"] == "second_moment"]
    for optimizer in config.optimizers:
        for init in config.inits:
            for overlap in config.overlaps:
                group = [
                    row
                    for row in seconds
                    if (row["optimizer"], row["init"], row["overlap"]) == (optimizer, init, overlap)
                ]
                tables.print_table(
                    f"E[w_i^2], {optimizer}, A {init}, overlap {overlap:g}, p_in = {config.p_in}",
                    [
                        "rule",
                        "rank",
                        "scaling",
                        "estimate ± s.e.",
                        "exact",
                        "estimate / exact",
                        "Eq. 9",
                        "estimate / Eq. 9",
                    ],
                    [
                        [
                            row["rule"],
                            row["rank"],
                            f"{row['scaling']:.4g}",
                            f"{row['estimate']:.4g} ± {row['standard_error']:.1g}",
                            f"{row['exact']:.4g}",
                            f"{row['estimate'] / row['exact']:.4f}",
                            "" if row["paper"] is None else f"{row['paper']:.4g}",
                            "" if row["paper"] is None else f"{row['estimate'] / row['paper']:.4g}",
                        ]
                        for row in sorted(group, key=lambda row: config.rules.index(row["rule"]))
                    ],
                )
    print_exponents(config, rows)
    if check_rows:
        print_check(check_rows)
    tables.print_table(
        "Verdicts on the paper's equations",
        ["Eq.", "verdict", "claim; where it holds; figures"],
        [
            [v.equation, v.status, "\n".join(filter(None, (v.claim, v.where, v.evidence)))]
            for v in sorted(judged, key=_equation_order)
        ],
        left=3,
    )


def print_exponents(config: Config, rows: list[dict[str, Any]]) -> None:
    """Log-log slopes of the norm against the rank, over all ranks and over the lower and upper thirds."""
    ranks = sorted(config.ranks)
    if len(ranks) < 2:
        return
    third = max(len(ranks) // 3, 2)
    parts = [ranks, ranks[:third], ranks[-third:]] if len(ranks) > third else [ranks]
    norms = [row for row in rows if row["quantity"] == "norm"]
    for optimizer in config.optimizers:
        for init in config.inits:
            table = []
            for overlap in config.overlaps:
                for rule in config.rules:
                    key = (optimizer, init, overlap, rule)
                    group = [r for r in norms if (r["optimizer"], r["init"], r["overlap"], r["rule"]) == key]
                    line = [f"{overlap:g}", rule]
                    for part in parts:
                        chosen = [row for row in group if row["rank"] in part]
                        x = [row["rank"] for row in chosen]
                        errors = [row["standard_error"] for row in chosen]
                        fit = log_log_fit(x, [row["estimate"] for row in chosen], errors)
                        exact = log_log_fit(x, [row["exact"] for row in chosen], [0.0] * len(x))
                        line.append(f"{fit.slope:+.3f} ± {fit.standard_error:.3f} ({exact.slope:+.3f})")
                    table.append(line)
            tables.print_table(
                f"{optimizer}, A {init}: exponent of the rms norm |w| in the rank, fitted ± s.e. (exact law, same fit)",
                ["overlap", "rule", *[f"r = {part[0]}..{part[-1]}" for part in parts]],
                table,
                left=2,
            )


def print_check(rows: list[dict[str, Any]]) -> None:
    """The direct sampler's second moments beside the exact law."""
    chosen = [row for row in rows if row["quantity"] == "second_moment"]
    found = agreement(*(([row[name] for row in chosen]) for name in ("estimate", "standard_error", "exact")))
    tables.print_table(
        f"Direct sampler (draws A, differentiates, steps with optax, reads at x'), {CHECK_DRAWS} draws a cell: "
        f"{len(found.scores)} cells, largest |z| {found.largest_score:.2f}",
        ["optimizer", "rule", "overlap", "rank", "estimate ± s.e.", "exact", "z"],
        [
            [
                row["optimizer"],
                row["rule"],
                f"{row['overlap']:g}",
                row["rank"],
                f"{row['estimate']:.4g} ± {row['standard_error']:.1g}",
                f"{row['exact']:.4g}",
                f"{score:+.2f}",
            ]
            for row, score in zip(chosen, found.scores, strict=True)
        ],
        left=2,
    )


def describe_files(path: Path) -> str:
    """What was written, in words."""
    written = sorted(file.name for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    return f"written to {path}: " + ", ".join(written)


def _equation_order(verdict: verdicts.Verdict) -> float:
    return {"gradient A": 2.1, "gradient B": 2.2}.get(verdict.equation) or float(verdict.equation)


if __name__ == "__main__":
    main(sys.argv[1:])
