"""Simulation of the paper's setting: w = dM x', the increment of a layer after one optimizer step.

The grid covers optimizers, initialisations of A, overlaps of the inputs, scaling rules and ranks; the exact law and the
paper's Eq. 9 are tabulated next to the estimates. One stream of draws serves all rules, because w is proportional to
gamma^2 (SGD) or gamma (Adam). The direct sampler checks this on a part of the grid: there it takes a separate step for
every rule and optimizer, from the same draws of A and the inputs.

    config = SimulationConfig(ranks=(1, 4, 16), p_in=64)
    moments = {cell: draw_cell(config, cell) for cell in simulation_cells(config)}
    simulation_table([row for cell in moments for row in simulation_rows(config, cell, moments[cell])])
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import numpy as np
import pandas as pd

from rora_theory.errors import InputError
from rora_theory.inits import INITS, Init, entries
from rora_theory.laws import sampling
from rora_theory.laws.random.seeds import check_seed
from rora_theory.optimizers import OPTIMIZERS, Optimizer, scaling_power
from rora_theory.paper import quantities, verdicts
from rora_theory.paper.verdicts import RANKS
from rora_theory.runs import frames
from rora_theory.scaling import Rule, check_between, check_choice, check_integer, exponent, scaling_factor
from rora_theory.stats.moments import standard_scores
from rora_theory.stats.slopes import log_log_fit
from rora_theory.validation.ranges import AtLeastTwo, Count, Positive, check_ranges
from rora_theory.validation.rules import check_list, check_rules, check_unread, name_of

COLUMNS = (
    "optimizer", "rule", "kappa", "init", "overlap", "p_in", "p_out", "rank", "alpha", "scaling",
    "quantity", "estimate", "standard_error", "exact", "paper", "draws", "sampler",
)  # fmt: skip
"""Columns of the table of results."""

UNITS = {
    "mean": "E[w_i]",
    "second_moment": "E[w_i^2]",
    "variance": "Var[w_i]",
    "norm": "root mean square of |w|_2 over draws, sqrt(E|w|_2^2)",
    "exact": "rora_theory.laws.moments",
    "paper": "Eq. 6 (mean), Eq. 9 (second_moment, variance), Eq. 11 (norm); SGD only",
    "loss": "L = sum_i w_i, so delta_i = 1",
}

RELATIVE_ERROR = 0.005
"""Default relative standard error of the second moment."""

MAX_DRAWS, MIN_RELATIVE_ERROR = 10**9, 5e-5
"""Matching limits: the second moment of n normal draws has the relative standard error sqrt(2 / n)."""

FITTED = ("rank", "estimate", "standard_error", "exact")
"""Columns of a table of results to which `exponent_table` fits."""

MAX_EXPONENT_OF_TEN = 18
"""Largest decimal exponent of a scaling or a step: float32 can represent the square."""

CHECK_RANKS = (1, 8, 64)
CHECK_OVERLAPS = (0.0, 0.5)
CHECK_DRAWS = 1024
"""Ranks, overlaps and number of draws at which the direct sampler checks the reduced ones."""

GROUP = ["optimizer", "init", "overlap", "rule"]
"""Columns that identify a curve over ranks."""


@dataclass(frozen=True)
class SimulationConfig:
    """Settings of a simulation.

    Raises:
      InputError: If a value is out of range.
    """

    ranks: tuple[int, ...] = RANKS
    """Ranks of the adapter, each 1 or more"""
    rules: tuple[Rule, ...] = ("lora", "rora", 0.25)
    """Scaling rules: lora, rora, rslora, or the exponent kappa of gamma = alpha / r^kappa"""
    optimizers: tuple[Optimizer, ...] = ("sgd", "adam")
    """Optimizers of the first step: sgd, adam"""
    inits: tuple[Init, ...] = ("normal",)
    """Initialisations of A; normal is the paper's N(0, 1)"""
    alpha: Positive = 16.0
    """Alpha of the adapter, above 0"""
    lr: Positive = 1e-4
    """Learning rate, above 0"""
    relative_error: Positive | None = None
    """Relative standard error of the second moment at which sampling stops (default: 0.005)"""
    draws: AtLeastTwo | None = None
    """Exact number of draws, instead of a relative error"""
    seed: int = 0
    """Seed of the random draws"""
    p_in: Count = 4096
    """Number of inputs of the layer (default: the width of LLaMA-7B)"""
    p_out: Count = 4096
    """Number of outputs of the layer"""
    overlaps: tuple[float, ...] = (0.0, 0.1, 0.5, 1.0)
    """Correlations of the inputs before and after the step, each from -1 to 1"""
    sampler: Literal["auto", "direct", "reduced"] = "auto"
    """Sampler: direct draws A and differentiates; reduced draws only the variables that w depends on (Gaussian A only);
    auto chooses the cheaper one"""

    def __post_init__(self) -> None:
        check_list("ranks", self.ranks, check_integer)
        check_rules(self.rules)
        for name, known in (("optimizers", OPTIMIZERS), ("inits", INITS)):
            check_list(name, getattr(self, name), partial(check_choice, choices=known))
        check_ranges(self)
        # Sampling stops at a precision or at a number of draws, whose limits match.
        if self.relative_error is not None and self.relative_error < MIN_RELATIVE_ERROR:
            raise InputError(
                f"relative_error must be at least {MIN_RELATIVE_ERROR:.0e} (about {MAX_DRAWS:,} draws), "
                f"got {self.relative_error}"
            )
        if self.draws is not None:
            if self.draws > MAX_DRAWS:
                raise InputError(
                    f"draws must be at most {MAX_DRAWS:,} (a relative error of {MIN_RELATIVE_ERROR:.0e} in E[w^2], "
                    f"one hundredth of the default), got {self.draws}"
                )
            check_unread(self, "relative_error", conflicts_with="draws")
        check_seed("seed", self.seed)
        # Size of every scaling and step, as decimal exponents.
        for rank, optimizer in itertools.product(self.ranks, self.optimizers):
            for _, gamma in self.scalings(rank):
                power = math.log10(self.lr) + scaling_power(optimizer) * math.log10(gamma)
                if max(abs(power), abs(math.log10(gamma))) > MAX_EXPONENT_OF_TEN:
                    raise InputError(
                        f"alpha {self.alpha:g} and lr {self.lr:g} give gamma {gamma:.1e} and a step of "
                        f"1e{power:.0f} at rank {rank} under {optimizer}. Both must be from "
                        f"1e-{MAX_EXPONENT_OF_TEN} to 1e{MAX_EXPONENT_OF_TEN}: float32 must represent their squares."
                    )
        check_list("overlaps", self.overlaps, partial(check_between, low=-1, high=1))
        if self.sampler == "reduced":
            for init in self.inits:
                if not entries(init, rank=1, p_in=1).is_normal:
                    raise InputError(f"sampler reduced requires inits normal or gaussian, got {init}")

    def scalings(self, rank: int) -> Iterator[tuple[Rule, float]]:
        """Yield each rule with its scaling factor at a rank."""
        for rule in self.rules:
            yield rule, scaling_factor(rule, alpha=self.alpha, rank=rank)


@dataclass(frozen=True)
class SimulationCell:
    """One stream of draws.

    Attributes:
      setting: Setting to simulate.
      sampler: Sampler of the stream.
      steps: Settings with a separate step from the same draws, for every optimizer and rule. If empty, the only step
        is that of ``setting`` at unit scaling and rate, from which the steps of all rules follow.
    """

    setting: sampling.RandomStep
    sampler: sampling.Sampler
    steps: tuple[sampling.RandomStep, ...] = ()

    def __str__(self) -> str:
        step = "separate steps of all rules" if self.steps else self.setting.optimizer
        return f"{step}, overlap {self.setting.overlap:g}, r = {self.setting.rank}"


def simulation_cells(config: SimulationConfig) -> list[SimulationCell]:
    """Return the streams of the grid in the order of the table, then those of the direct check.

    Returns:
      The cells to draw.
    """
    # Settings at unit scaling and rate, from which all rules follow.
    settings = [
        sampling.RandomStep(rank, config.p_in, config.p_out, overlap=overlap, optimizer=optimizer, init=init)
        for optimizer in config.optimizers
        for init in config.inits
        for overlap in config.overlaps
        for rank in config.ranks
    ]
    cells = [
        SimulationCell(setting, "direct" if config.sampler == "direct" else sampling.best_sampler(setting))
        for setting in settings
    ]
    # Direct check: the steps of all optimizers and rules of a setting share one stream.
    checked: dict[sampling.RandomStep, list[sampling.RandomStep]] = {}
    for cell in cells:
        setting = cell.setting
        if setting.rank in CHECK_RANKS and setting.overlap in CHECK_OVERLAPS and cell.sampler != "direct":
            steps = [
                replace(setting, scaling=gamma, learning_rate=config.lr) for _, gamma in config.scalings(setting.rank)
            ]
            checked.setdefault(replace(setting, optimizer=config.optimizers[0]), []).extend(steps)
    return cells + [SimulationCell(setting, "direct", tuple(steps)) for setting, steps in checked.items()]


def draw_cell(
    config: SimulationConfig, cell: SimulationCell, devices: Sequence[jax.Device] | None = None
) -> list[sampling.StreamMoments]:
    """Draw a cell.

    Args:
      cell: Cell to draw.
      devices: Devices that share the draws; the results do not depend on them, see `sampling.stream`.

    Returns:
      The moments of each of the cell's steps.
    """
    return sampling.estimate_settings(
        cell.steps or (cell.setting,),
        cell.sampler,
        sampling.setting_key(config.seed, cell.setting, cell.sampler),
        relative_error=config.relative_error or RELATIVE_ERROR,
        draws=CHECK_DRAWS if cell.steps else config.draws,
        devices=devices,
    )


def simulation_rows(
    config: SimulationConfig, cell: SimulationCell, moments: Sequence[sampling.StreamMoments]
) -> list[dict[str, Any]]:
    """Return a cell's estimates next to the exact law and the paper's formulas.

    Args:
      cell: Drawn cell.
      moments: Moments from `draw_cell`.

    Returns:
      One row for each rule and quantity.
    """
    unit, rows = cell.setting, []
    rules, scalings = zip(*config.scalings(unit.rank), strict=True)
    # Setting and moments of every step, with the factor by which the simulated w is multiplied.
    steps: list[tuple[sampling.RandomStep, sampling.StreamMoments, float]] = []
    if cell.steps:
        # Separate steps are used as they are.
        steps = [(setting, step_moments, 1.0) for setting, step_moments in zip(cell.steps, moments, strict=True)]
    else:
        # The step at unit scaling and rate is multiplied by the factor of each rule.
        for gamma in scalings:
            factor = config.lr * gamma ** scaling_power(unit.optimizer)
            steps.append((replace(unit, scaling=gamma, learning_rate=config.lr), moments[0], factor))
    # Separate steps repeat the rules for every optimizer.
    for (setting, step_moments, factor), rule in zip(steps, itertools.cycle(rules), strict=False):
        exact, printed = quantities.exact(setting), quantities.printed(setting)
        for quantity in quantities.QUANTITIES:
            simulated = quantities.quantity_estimate(step_moments, quantity, step=factor)
            rows.append(
                {
                    "optimizer": setting.optimizer,
                    "rule": name_of(rule),
                    "kappa": exponent(rule),
                    "init": unit.init,
                    "overlap": unit.overlap,
                    "p_in": unit.p_in,
                    "p_out": unit.p_out,
                    "rank": unit.rank,
                    "alpha": config.alpha,
                    "scaling": setting.scaling,
                    "quantity": quantity,
                    "estimate": simulated.value,
                    "standard_error": simulated.error,
                    "exact": exact[quantity],
                    "paper": printed[quantity],
                    "draws": step_moments.count,
                    "sampler": cell.sampler,
                }
            )
    return rows


def simulation_table(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Build the table of `simulation_rows`; ``paper`` is NaN for Adam, which the paper's Eq. 3 excludes."""
    return frames.from_rows(rows, COLUMNS)


def largest_score(table: pd.DataFrame) -> float:
    """Return the largest distance of E[w_i^2] from the exact law, in standard errors.

    Args:
      table: Table from `simulation_table`.

    Returns:
      The largest absolute score; NaN if one is undefined, which must not look small.
    """
    rows = table[table["quantity"] == "second_moment"]
    scores = standard_scores(*(rows[name].tolist() for name in ("estimate", "standard_error", "exact")))
    return float(np.max(np.abs(scores)))


def judge_simulation(
    config: SimulationConfig,
    known: Mapping[sampling.RandomStep, sampling.StreamMoments],
    devices: Sequence[jax.Device] | None = None,
) -> list[verdicts.Verdict]:
    """Compare the paper's equations with a simulation.

    Args:
      config: Settings of the simulation. With fewer than three ranks the ranks of `verdicts.RANKS` are used.
      known: Moments that have already been drawn, by setting at unit scaling and rate. Missing ones are drawn.
      devices: Devices that share the draws.

    Returns:
      One verdict per equation.
    """
    drawn = dict(known)

    def sample(setting: sampling.RandomStep) -> sampling.StreamMoments:
        if setting not in drawn:
            (drawn[setting],) = draw_cell(config, SimulationCell(setting, sampling.best_sampler(setting)), devices)
        return drawn[setting]

    ranks = verdicts.choose_ranks(config.ranks)
    return verdicts.judge_equations(sample, ranks=ranks, p_in=config.p_in, p_out=config.p_out)


def simulated_exponents(results: pd.DataFrame) -> pd.DataFrame:
    """Fit log-log slopes of the norm against the rank, over all ranks and over the lower and upper thirds.

    Args:
      results: Table from `simulation_table`.

    Returns:
      One row for each optimizer, init, overlap, rule and range of ranks: ``low`` and ``high`` rank, the simulated
      ``slope`` with its ``standard_error``, and the exact law's slope under the same fit, ``exact``. The table is empty
      for a single rank.
    """
    norms = results[results["quantity"] == "norm"]
    # Ranges of ranks: all, the lowest third and the highest third.
    ranks = sorted(set(norms["rank"]))
    third = max(len(ranks) // 3, 2)
    ranges = [ranks, ranks[:third], ranks[-third:]] if len(ranks) > third else [ranks]
    return exponent_table(norms, GROUP, ranges if len(ranks) > 1 else [])


def exponent_table(results: pd.DataFrame, columns: Sequence[str], ranges: Sequence[Sequence[int]]) -> pd.DataFrame:
    """Fit the log-log slopes of ``estimate`` and of ``exact`` against ``rank`` for every curve and range of ranks.

    Args:
      results: Table with the columns ``rank``, ``estimate``, ``standard_error`` and ``exact``.
      columns: Columns that identify a curve.
      ranges: Ranks of each fit, in ascending order.

    Returns:
      A row for each curve and range: the ``low`` and ``high`` rank, the ``slope`` of the estimates with its
      ``standard_error``, and the slope of ``exact``; NaN for fewer than two ranks.
    """
    rows = []
    for (key, group), ranks in itertools.product(results.groupby(list(columns), sort=False), ranges):
        row = dict(zip(columns, key, strict=True)) | {"low": ranks[0], "high": ranks[-1]}
        row |= dict.fromkeys(("slope", "standard_error", "exact"), math.nan)
        if len(in_range := group[group["rank"].isin(ranks)]) > 1:
            x, y, errors, exact = (in_range[name].to_numpy(np.float64) for name in FITTED)
            slope = log_log_fit(x, y, errors)
            row |= {"slope": slope.value, "standard_error": slope.error}
            row |= {"exact": log_log_fit(x, exact, 0 * exact).value}
        rows.append(row)
    return pd.DataFrame(rows, columns=[*columns, "low", "high", "slope", "standard_error", "exact"])
