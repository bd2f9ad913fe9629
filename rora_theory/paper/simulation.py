"""The paper's setting simulated: w = dM x', the increment of a layer after one optimizer step, by draws.

For every optimizer, law of A, overlap of the inputs, scaling rule and rank, beside the exact law and the paper's Eq. 9.
One stream of draws serves all rules: w carries gamma^2 (SGD) or gamma (Adam) as a factor. On part of the grid the
direct sampler checks this: there each rule's own step is taken by every optimizer, all from the same draws of A and of
the inputs.

    config = SimulationConfig(StepGrid(ranks=(1, 4, 16)), p_in=64)
    sums = {cell: draw_cell(config, cell) for cell in simulation_cells(config)}
    simulation_table([row for cell in sums for row in simulation_rows(config, cell, sums[cell])])
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax
import pandas as pd

from rora_theory.errors import InputError
from rora_theory.inits import entries
from rora_theory.io import frames
from rora_theory.paper import quantities, verdicts
from rora_theory.scaling import exponent
from rora_theory.stats.moments import agreement
from rora_theory.theory import laws, sampling
from rora_theory.theory.grid import StepGrid, exponent_of
from rora_theory.validation.ranges import Count, check_ranges
from rora_theory.validation.rules import check_list, name_of

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

CHECK_RANKS = (1, 8, 64)
CHECK_OVERLAPS = (0.0, 0.5)
CHECK_DRAWS = 1024
"""Where, and by how many draws, the direct sampler checks the reduced ones."""

GROUP = ["optimizer", "init", "overlap", "rule"]


@dataclass(frozen=True)
class SimulationConfig:
    """What to simulate.

    Raises:
      InputError: a value out of range.
    """

    grid: StepGrid = field(default_factory=StepGrid)
    p_in: Count = 4096
    """inputs of the layer (LLaMA-7B's width)"""
    p_out: Count = 4096
    """outputs of the layer"""
    overlaps: tuple[float, ...] = (0.0, 0.1, 0.5, 1.0)
    """correlation of the inputs before and after the step, each from -1 to 1"""
    sampler: Literal["auto", "direct", "reduced"] = "auto"
    """direct draws A and differentiates; reduced draws what w depends on (Gaussian A only); auto takes the cheaper"""

    def __post_init__(self) -> None:
        check_ranges(self)
        check_list("--overlaps", self.overlaps)
        for overlap in self.overlaps:
            try:
                laws.check_overlap(overlap)
            except InputError as error:
                raise InputError(f"--overlaps: {error}") from None
        if self.sampler == "reduced":
            for init in self.grid.inits:
                if not entries(init, rank=1, p_in=1).is_normal:
                    raise InputError(f"--sampler reduced has no {init} init; accepted with it are normal and gaussian")


@dataclass(frozen=True)
class SimulationCell:
    """One stream of draws.

    Attributes:
      setting: what is drawn.
      sampler: how.
      steps: the settings whose own steps are taken from the draws, every optimizer's by every rule; without, the one
        step is the setting's, of unit scaling and rate, from which every rule's follows.
    """

    setting: sampling.RandomStep
    sampler: sampling.Sampler
    steps: tuple[sampling.RandomStep, ...] = ()

    def __str__(self) -> str:
        what = "each rule's own step" if self.steps else self.setting.optimizer
        return f"{what}, overlap {self.setting.overlap:g}, r = {self.setting.rank}"


def simulation_cells(config: SimulationConfig) -> list[SimulationCell]:
    """Every stream: of the grid, in the order of the table, then of the direct check."""
    grid = config.grid
    units = [
        sampling.RandomStep(rank, config.p_in, config.p_out, overlap=overlap, optimizer=optimizer, init=init)
        for optimizer in grid.optimizers
        for init in grid.inits or ("normal",)
        for overlap in config.overlaps
        for rank in grid.ranks
    ]
    found = [
        SimulationCell(unit, "direct" if config.sampler == "direct" else sampling.best_sampler(unit)) for unit in units
    ]
    checked: dict[sampling.RandomStep, list[sampling.RandomStep]] = {}
    for cell in found:
        unit = cell.setting
        if unit.rank in CHECK_RANKS and unit.overlap in CHECK_OVERLAPS and cell.sampler != "direct":
            own = [replace(unit, scaling=gamma, learning_rate=grid.lr) for _, gamma in grid.scalings(unit.rank)]
            checked.setdefault(replace(unit, optimizer=grid.optimizers[0]), []).extend(own)
    return found + [SimulationCell(unit, "direct", tuple(steps)) for unit, steps in checked.items()]


def draw_cell(
    config: SimulationConfig, cell: SimulationCell, devices: Sequence[jax.Device] | None = None
) -> list[sampling.Sums]:
    """The sums of a cell's draws, one for each of its steps, or one alone without.

    ``devices`` change no bit of them, see `sampling.stream`.
    """
    return sampling.estimate_each(
        cell.steps or (cell.setting,),
        cell.sampler,
        sampling.setting_key(config.grid.seed, cell.setting, cell.sampler),
        relative_error=config.grid.relative_error or RELATIVE_ERROR,
        draws=CHECK_DRAWS if cell.steps else config.grid.draws,
        devices=devices,
    )


def simulation_rows(
    config: SimulationConfig, cell: SimulationCell, sums: Sequence[sampling.Sums]
) -> list[dict[str, Any]]:
    """What a cell's draws say of each rule, beside the law and the paper: a row a rule and quantity."""
    grid, unit, found = config.grid, cell.setting, []
    rules, scalings = zip(*grid.scalings(unit.rank), strict=True)
    of_unit = [replace(unit, scaling=gamma, learning_rate=grid.lr) for gamma in scalings]
    for number, (setting, rule) in enumerate(zip(cell.steps or of_unit, itertools.cycle(rules), strict=False)):
        gamma = setting.scaling
        step = 1.0 if cell.steps else grid.lr * gamma ** laws.scaling_power(unit.optimizer)
        own = sums[number if cell.steps else 0]
        exact, printed = quantities.exact(setting), quantities.printed(setting)
        for quantity in quantities.QUANTITIES:
            simulated = quantities.quantity_estimate(own, quantity, step=step)
            found.append(
                {
                    "optimizer": setting.optimizer,
                    "rule": name_of(rule),
                    "kappa": exponent(rule),
                    "init": unit.init,
                    "overlap": unit.overlap,
                    "p_in": unit.p_in,
                    "p_out": unit.p_out,
                    "rank": unit.rank,
                    "alpha": grid.alpha,
                    "scaling": gamma,
                    "quantity": quantity,
                    "estimate": simulated.value,
                    "standard_error": simulated.error,
                    "exact": exact[quantity],
                    "paper": printed[quantity],
                    "draws": own.count,
                    "sampler": cell.sampler,
                }
            )
    return found


def simulation_table(found: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """The frame of some `simulation_rows`; ``paper`` is NaN for Adam, which the paper's Eq. 3 excludes."""
    return frames.of(found, COLUMNS)


def second_moments(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of E[w_i^2] in a `simulation_table`, with what each is of the law (``ratio``) and of the paper's Eq. 9
    (``of_paper``), and how many standard errors it lies from the law (``z``)."""
    own = table[table["quantity"] == "second_moment"]
    scores = agreement(*(own[name].tolist() for name in ("estimate", "standard_error", "exact"))).scores
    return own.assign(ratio=own["estimate"] / own["exact"], of_paper=own["estimate"] / own["paper"], z=scores)


def judge_simulation(
    config: SimulationConfig,
    known: Mapping[sampling.RandomStep, sampling.Sums],
    devices: Sequence[jax.Device] | None = None,
) -> list[verdicts.Verdict]:
    """The verdicts on the paper's equations from a simulation.

    Args:
      config: of the simulation; with fewer than three ranks those of `grid.RANKS` are drawn.
      known: the sums that are there already, of settings of unit scaling and rate; what is missing is drawn.
      devices: as `draw_cell` takes them.
    """
    found = dict(known)

    def sample(setting: sampling.RandomStep) -> sampling.Sums:
        if setting not in found:
            (found[setting],) = draw_cell(config, SimulationCell(setting, sampling.best_sampler(setting)), devices)
        return found[setting]

    ranks = verdicts.enough_ranks(config.grid.ranks)
    return verdicts.judge_equations(sample, ranks=ranks, p_in=config.p_in, p_out=config.p_out)


def simulated_exponents(results: pd.DataFrame) -> pd.DataFrame:
    """Log-log slopes of the norm against the rank, over all ranks and over the lower and upper thirds.

    Args:
      results: of `simulation_table`.

    Returns:
      a row an optimizer, init, overlap, rule and range: ``low`` and ``high`` rank, the simulated ``slope`` with its
      ``standard_error``, and the exact law's under the same fit, ``exact``; no row where there is one rank alone.
    """
    norms = results[results["quantity"] == "norm"]
    ranks = sorted(set(norms["rank"]))
    third = max(len(ranks) // 3, 2)
    parts = [ranks, ranks[:third], ranks[-third:]] if len(ranks) > third else [ranks]
    found = []
    for key, group in norms.groupby(GROUP, sort=False) if len(ranks) > 1 else ():
        for part in parts:
            own = group[group["rank"].isin(part)]
            line = dict(zip(GROUP, key, strict=True)) | {"low": part[0], "high": part[-1]}
            found.append(line | exponent_of(own))
    return pd.DataFrame(found, columns=[*GROUP, "low", "high", "slope", "standard_error", "exact"])
