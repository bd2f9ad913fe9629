"""Losses by rank and learning rate: the runs of a table, as curves of loss against rate.

A table has one run on each line, with the columns `COLUMNS`. Runs of one model that share the number of steps and the
batch size are a `Sweep`: its curves differ in the rank and the scaling alone, so that a best rate can be transferred
from one of them to another.
"""

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Bool, Float

from rora_theory.errors import InputError, shown
from rora_theory.evidence.sources import PACKAGE, SOURCES, original_path
from rora_theory.runs import frames
from rora_theory.scaling import KAPPAS, LARGEST, Rule, exponent, scaling_factor
from rora_theory.stats.estimate import Estimate
from rora_theory.stats.rate_curves import EDGE_SHARE, REPEATS, Curve
from rora_theory.stats.trained_runs import TrainedRun, curve_of_runs

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("model", "rank", "alpha", "rule", "learning_rate", "loss")
"""Columns that every table of runs has."""

OPTIONAL_COLUMNS = ("steps", "batch_size", "seed")
"""Columns that a table of runs may have."""

REACH = math.log(3.5)
"""Distance in log rate from the lowest loss up to which rates belong to the fit of the best rate: half a decade.

On a grid of half decades these are the two neighbours. On a denser grid all rates nearby reduce the noise.
"""

DRAWS = 200
"""Number of draws of the noise of repeated runs, which give the error of a best rate."""

MIN_CELLS = 3
"""Minimum number of repeated settings behind a standard deviation of the noise."""


Place = Literal["inside", "low end", "high end", "beside a diverged run"]
"""Where a best rate lies in its grid. Only one inside is fitted; any other is a bound, or known to a grid step."""


@dataclass(frozen=True)
class BestRateFit:
    """Best rate of a curve.

    Attributes:
      curve: Loss against learning rate.
      log2_rate: log2 of the best rate, the mean over seeds, with the error from seeds or from repeated runs.
      place: Where the best rate lies in its grid, with the noise of a run taken into account: it is not inside if in
        more draws of the noise than a 95% interval excludes it is not.
    """

    curve: Curve
    log2_rate: Estimate
    place: Place

    @property
    def best_rate(self) -> float:
        """Best rate; not fitted but that of the lowest loss where it is a bound."""
        return self.curve.best_rate

    @property
    def is_inside(self) -> bool:
        """Whether the best rate lies inside its grid, with finite losses on both sides."""
        return self.place == "inside"


def fit_curve(curve: Curve) -> BestRateFit:
    """Fit the best rate of a curve."""
    place: Place = "inside"
    if curve.edge:
        place = "low end" if curve.edge == "low" else "high end"
    elif any(np.mean(_is_beside_diverged(rows)) >= EDGE_SHARE for rows in (curve.losses, curve.replicates.losses)):
        place = "beside a diverged run"
    return BestRateFit(curve, replace(curve.log2_optimum, bound=0.0), place)


def _is_beside_diverged(losses: Float[np.ndarray, "rows rates"]) -> Bool[np.ndarray, " rows"]:
    """Return for each row whether a neighbour of its lowest loss diverged."""
    padded = np.pad(losses, ((0, 0), (1, 1)))
    rows, lowest = np.arange(len(losses)), np.argmin(losses, axis=1) + 1
    return ~np.isfinite(padded[rows, lowest - 1] + padded[rows, lowest + 1])


@dataclass(frozen=True)
class Sweep:
    """Curves of loss against learning rate that differ in the rank and the scaling alone.

    Attributes:
      source: Name of the source.
      model: Name of the model.
      steps: Number of optimizer steps; None if it is not known.
      batch_size: Number of examples in a batch; None if it is not known.
      curves: Curves with three or more rates, of which one did not diverge, by rank and scaling.
    """

    source: str
    model: str
    steps: int | None
    batch_size: int | None
    curves: tuple[Curve, ...]

    @cached_property
    def fits(self) -> tuple[BestRateFit, ...]:
        """Best rate of every curve."""
        return tuple(fit_curve(curve) for curve in self.curves)


@dataclass(frozen=True)
class RunRecord:
    """A run of a sweep.

    Attributes:
      model: Name of the model.
      rank: Rank of the adapter.
      alpha: Alpha of the adapter.
      rule: Scaling rule, as a name or as the exponent kappa.
      learning_rate: Peak learning rate.
      loss: Loss in nats per token; infinite if the run diverged.
      steps: Number of optimizer steps; None if it is not known.
      batch_size: Number of examples in a batch; None if it is not known.
      seed: Seed, or number of the repetition.
    """

    model: str
    rank: int
    alpha: float
    rule: Rule
    learning_rate: float
    loss: float
    steps: int | None = None
    batch_size: int | None = None
    seed: int = 0


def read_run_table(path: Path) -> list[RunRecord]:
    """Read a table of runs.

    Args:
      path: CSV file with the columns `COLUMNS`, and any of `OPTIONAL_COLUMNS`; other columns are ignored. An empty
        loss, ``inf`` or ``nan`` states that the run diverged.

    Returns:
      The runs, in the order of the file.

    Raises:
      InputError: If the file is not a table, a column is missing, or a value is invalid. The message names the line and
        the column.
    """
    # Cells are read as text, so that a bad value does not change how others of its column are read.
    columns = (*COLUMNS, *OPTIONAL_COLUMNS)
    frame = frames.read_csv(path, text_columns=columns, accepted="a table of runs")
    advice = f"A table of runs has the columns {', '.join(COLUMNS)}, and optionally {', '.join(OPTIONAL_COLUMNS)}."
    frames.check_columns(path, frame, COLUMNS, advice=advice)
    if frame.empty:
        raise InputError(f"{path} must have at least one run, got none")
    return [_run_of(row, f"{path}: line {number}") for number, row in enumerate(frames.rows(frame), start=2)]


def _run_of(cells: Mapping[str, Any], where: str) -> RunRecord:
    """Return the run of a line.

    Args:
      cells: Text of each column; None if it is empty.
      where: File and line, for errors.

    Raises:
      InputError: If a value is invalid.
    """

    def check(column: str, is_valid: bool, valid_values: str) -> None:
        if not is_valid:
            raise InputError(f"{where}: {column} must be {valid_values}, got {shown(cells[column] or '')}")

    def number(column: str) -> float:
        with contextlib.suppress(TypeError, ValueError):
            return float(cells[column])
        return math.nan

    def positive(column: str) -> float:
        value = number(column)
        check(column, 0 < value < math.inf, "a finite number above 0")
        return value

    def integer(column: str, minimum: float) -> int:
        value = number(column)
        is_valid = minimum <= value <= LARGEST and value == round(value)
        check(column, is_valid, f"an integer of {minimum:g} or more")
        return int(value)

    check("model", bool(cells["model"]), "a name")
    rule: Any = cells["rule"]
    if rule not in KAPPAS:
        rule = number("rule")
        check("rule", math.isfinite(rule), f"{', '.join(KAPPAS)} or a finite exponent kappa such as 0.25")
    # An empty field, inf and nan state that the run diverged. Any other text is a mistake.
    loss = math.inf if cells["loss"] is None else number("loss")
    is_nan = (cells["loss"] or "").strip().lower() == "nan"
    check("loss", loss > 0 or is_nan, "a number above 0, or inf if the run diverged")
    optional = {
        column: integer(column, minimum)
        for column, minimum in zip(OPTIONAL_COLUMNS, (1, 1, 0), strict=True)
        if cells.get(column) is not None
    }
    return RunRecord(
        model=cells["model"],
        rank=integer("rank", 1),
        alpha=positive("alpha"),
        rule=rule,
        learning_rate=positive("learning_rate"),
        loss=math.inf if is_nan else loss,
        **optional,
    )


def sweeps_of(runs: Iterable[RunRecord], source: str) -> list[Sweep]:
    """Group runs into sweeps, with the noise of repeated runs as the error of their curves.

    Args:
      runs: Runs of one source.
      source: Name of the source.

    Returns:
      A sweep for each model, number of steps and batch size, in the order of the runs.
    """
    grouped: dict[tuple[str, int | None, int | None], dict[tuple[int, float, float], list[RunRecord]]] = {}
    for run in runs:
        sweep = grouped.setdefault((run.model, run.steps, run.batch_size), {})
        sweep.setdefault((run.rank, exponent(run.rule), run.alpha), []).append(run)
    sweeps = []
    for (model, steps, batch_size), by_setting in grouped.items():
        curves = [_curve_of(by_setting[setting]) for setting in sorted(by_setting)]
        # A best rate needs three rates, of which one did not diverge.
        long_curves = tuple(curve for curve in curves if len(curve.rates) >= 3 and np.isfinite(curve.losses).any())
        sweeps.append(Sweep(source, model, steps, batch_size, long_curves))
    noise = noise_of(sweeps, grouped.values())
    return [replace(sweep, curves=tuple(_with_noise(curve, noise) for curve in sweep.curves)) for sweep in sweeps]


def _curve_of(runs: Sequence[RunRecord]) -> Curve:
    """Return the curve of the runs of one setting.

    Seeds are rows if every rate has the same ones. Otherwise the repetitions of a rate are averaged; a rate diverged if
    none of its runs ended.
    """
    first = runs[0]
    seeds_of_rate: dict[float, set[int]] = {}
    for run in runs:
        seeds_of_rate.setdefault(run.learning_rate, set()).add(run.seed)
    is_grid = len(set(map(frozenset, seeds_of_rate.values()))) == 1
    # Losses of repeated runs.
    by_cell: dict[tuple[float, int], list[float]] = {}
    for run in runs:
        by_cell.setdefault((run.learning_rate, run.seed if is_grid else 0), []).append(run.loss)
    rule = first.rule if isinstance(first.rule, str) else f"{first.rule:g}"
    scaling = scaling_factor(first.rule, alpha=first.alpha, rank=first.rank)
    merged = []
    for (rate, seed), losses in by_cell.items():
        ended = [loss for loss in losses if math.isfinite(loss)]
        mean = sum(ended) / len(ended) if ended else math.inf
        merged.append(TrainedRun(rule, first.rank, scaling, rate, seed, mean, kappa=exponent(first.rule)))
    return replace(curve_of_runs(merged), reach=REACH)


@dataclass(frozen=True)
class Noise:
    """Standard deviation of the log loss of one run, by learning rate.

    Attributes:
      rates: Highest rate to which each deviation applies, ascending.
      deviations: Standard deviation of the log loss.
      degrees: Number of degrees of freedom behind all deviations; 0 if nothing was repeated.
    """

    rates: tuple[float, ...] = ()
    deviations: tuple[float, ...] = ()
    degrees: int = 0

    def at(self, rates: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """Return the deviation at each rate: that of the nearest group of rates at or above it, or of the last."""
        indices = np.searchsorted(self.rates, np.asarray(rates) * (1 - 1e-9))
        return np.asarray(self.deviations)[np.minimum(indices, len(self.rates) - 1)]


def noise_of(
    sweeps: Sequence[Sweep], groups: Iterable[Mapping[tuple[int, float, float], Sequence[RunRecord]]] = ()
) -> Noise:
    """Estimate the noise of one run from repeated runs, or from the scatter of dense curves around their parabola.

    Neighbouring rates are pooled until a group has `MIN_CELLS` repeated settings.

    Args:
      sweeps: Sweeps of one source.
      groups: Runs of every sweep, by setting.

    Returns:
      The noise; without repeated runs and without dense curves, it has no degrees of freedom.
    """
    # Sum of squares and degrees of freedom of every repeated cell.
    cells: list[tuple[float, float, int]] = []
    for by_setting in groups:
        for runs in by_setting.values():
            by_rate: dict[float, list[float]] = {}
            for run in runs:
                if math.isfinite(run.loss):
                    by_rate.setdefault(run.learning_rate, []).append(math.log(run.loss))
            cells += [
                (rate, float(np.var(logs) * len(logs)), len(logs) - 1)
                for rate, logs in by_rate.items()
                if len(logs) > 1
            ]
    if not cells:
        return _scatter_of(sweeps)
    # Pool neighbouring rates; a remainder joins the last group.
    pooled: list[list[tuple[float, float, int]]] = [[]]
    for rate in sorted({cell[0] for cell in cells}):
        if len(pooled[-1]) >= MIN_CELLS:
            pooled.append([])
        pooled[-1] += [cell for cell in cells if cell[0] == rate]
    if len(pooled) > 1 and len(pooled[-1]) < MIN_CELLS:
        remainder = pooled.pop()
        pooled[-1] += remainder
    deviations = tuple(math.sqrt(sum(c[1] for c in group) / sum(c[2] for c in group)) for group in pooled)
    return Noise(tuple(max(c[0] for c in group) for group in pooled), deviations, sum(cell[2] for cell in cells))


def _scatter_of(sweeps: Sequence[Sweep]) -> Noise:
    """Return the scatter of the rates within `REACH` of each lowest loss around a parabola in log loss."""
    squares, degrees, highest = 0.0, 0, 0.0
    for curve in (curve for sweep in sweeps for curve in sweep.curves):
        x, y = np.log(curve.rates), np.log(np.mean(curve.losses, axis=0))
        is_near = np.isfinite(y) & (np.abs(x - x[int(np.nanargmin(y))]) <= REACH)
        if np.sum(is_near) > 3:
            residuals = y[is_near] - np.polyval(np.polyfit(x[is_near], y[is_near], 2), x[is_near])
            squares, degrees = squares + float(residuals @ residuals), degrees + int(np.sum(is_near)) - 3
            highest = max(highest, float(curve.rates[-1]))
    return Noise((highest,), (math.sqrt(squares / degrees),), degrees) if degrees else Noise()


def _with_noise(curve: Curve, noise: Noise) -> Curve:
    """Add draws of the noise to a curve of one seed, from which the errors of its best rate and regrets follow."""
    if not noise.degrees or len(curve.losses) > 1:
        return curve
    random = np.random.default_rng([curve.rank, round(1000 * curve.gain)])
    factors = np.exp(noise.at(curve.rates) * random.normal(size=(DRAWS, 1, len(curve.rates))))
    return replace(curve, resampled=curve.losses * factors, records=noise.degrees + 1, resampled_over=REPEATS)


def load_sweeps(source: str, folder: Path | None = None) -> list[Sweep]:
    """Load the sweeps of a public source.

    Args:
      source: Name of the source, see `sources.SWEEPS`.
      folder: Folder with the original files. It is only needed for sources without a licence, which the package
        represents by figures that were computed from them (`sources.read_table`).

    Returns:
      The sweeps; empty if the source has no licence and there is no folder.

    Raises:
      InputError: If the folder does not have the file of the source.
    """
    if (name := SOURCES[source].file) is not None:
        return sweeps_of(read_run_table(Path(str(PACKAGE.joinpath(name)))), source)
    if folder is None:
        return []
    return sweeps_of(_original_runs(original_path(source, folder)), source)


def _original_runs(path: Path) -> list[RunRecord]:
    """Return the runs with adapters of an original file; runs of full fine-tuning are left out."""
    frame = frames.read_csv(path, text_columns=("model", "rank"), accepted="the losses as they were published")
    loss = "val_loss" if "val_loss" in frame else "test_nll"
    return [
        RunRecord(
            row["model"], int(row["rank"]), float(row["alpha"]), "lora", float(row["learning_rate"]), float(row[loss]),
            int(row["steps"]), int(row["batch_size"]), int(row.get("seed") or 0),
        )
        for row in frames.rows(frame)
        if row["rank"] != "full"
    ]  # fmt: skip


def full_rates(source: str, folder: Path) -> "pd.DataFrame":
    """Return the runs of full fine-tuning of an original file, with the columns ``learning_rate`` and ``loss``."""
    frame = frames.read_csv(original_path(source, folder), text_columns=("model", "rank"))
    full = frame[frame["rank"] == "full"]
    loss = "val_loss" if "val_loss" in full else "test_nll"
    return full.rename(columns={loss: "loss"})[["learning_rate", "loss"]].sort_values("learning_rate")
