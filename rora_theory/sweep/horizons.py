"""The best rate against gamma r at several horizons: what the law says beforehand, and what runs say."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rora_theory import frames
from rora_theory.adapters.lora import PAPER_TARGETS
from rora_theory.advice.setting import Setting
from rora_theory.advice.transfer import transfer
from rora_theory.data.formats import TrainTemplate
from rora_theory.errors import InputError
from rora_theory.finetune.config import FinetuneConfig, LossOn
from rora_theory.measure.led import PARTS, keeping_exponent, keeping_factor
from rora_theory.measure.regime_run import read_regime_run
from rora_theory.measure.regime_tables import TAKEOVER, TAKEOVER_COLUMNS
from rora_theory.rules import check_list, check_ranks, check_seeds, check_steps
from rora_theory.runs.reading import as_json, finished, read_manifest
from rora_theory.scaling import check_positive
from rora_theory.stats.estimate import Estimate
from rora_theory.stats.paired import mean_per_token, resampled_ratios
from rora_theory.stats.rate_curves import (
    Curve,
    at_shared_seeds,
    best_rates,
    comparison,
    less,
    log2_rates,
    of_log2_rates,
    paired_losses,
)
from rora_theory.sweep.readings import Reading, ReadRun
from rora_theory.theory import horizon, laws

UNITS = {
    "strength": "gamma times the rank: alpha under alpha / r, alpha sqrt(r) under alpha / sqrt(r)",
    "validation_loss, answer_loss": "nats a token of the held-out records; errors are over records",
}
SHARED = ("batch_size", "warmup", "targets", "template", "loss_on", "cutoff")
"""Settings of a grid that all its runs have; the others may differ in a later part of a run."""
QUANTILES = (0.05, 0.5, 0.95)
"""Of the takeover distances of a model's modules: each module has its own, one rate serves all."""

FULL = "full"
"""The rule of a curve of full fine-tuning, which has none."""


@dataclass(frozen=True)
class HorizonCell:
    """One fine-tuning run to do, and the steps it is read at; full fine-tuning has no rank and no strength, gamma r."""

    rank: int | None
    strength: float | None
    rate: float
    seed: int
    read_at: tuple[int, ...]

    def __str__(self) -> str:
        size = "full" if self.rank is None else f"r={self.rank} gamma*r={self.strength:g}"
        return f"{size} lr={self.rate:g} seed={self.seed}"


@dataclass(frozen=True)
class HorizonGrid:
    """Which runs, and where they are read.

    Raises:
      InputError: a value out of range.
    """

    ranks: tuple[int, ...] = (8, 128)
    """ranks of the adapter"""
    strengths: tuple[float, ...] = (64.0, 724.0)
    """gamma r of the adapter: gamma is the strength over the rank"""
    lrs: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    """learning rates after the warm-up"""
    full_lrs: tuple[float, ...] = ()
    """learning rates of full fine-tuning of the same modules; none is no such run"""
    seeds: tuple[int, ...] = (0,)
    """seeds of initialisation and order"""
    read_at: tuple[int, ...] = (16, 64, 256)
    """steps after which the held-out records are read, ascending; the last ends the run"""
    batch_size: int = 4
    """records a step"""
    warmup: int = 4
    """steps of linear warm-up from 0"""
    targets: tuple[str, ...] = PAPER_TARGETS
    """adapted modules"""
    template: TrainTemplate = "clean"
    """training prompt: train (published, to the byte), clean, chat (the model's chat template) or plain"""
    loss_on: LossOn = "all"
    """tokens in the training loss"""
    cutoff: int = 96
    """longest training example in tokens"""

    def __post_init__(self) -> None:
        check_ranks(self.ranks, fewest=1)
        for option, values, fewest in (
            ("--strengths", self.strengths, 1), ("--lrs", self.lrs, 1), ("--full-lrs", self.full_lrs, 0)
        ):  # fmt: skip
            check_list(option, values, fewest=fewest)
            for value in values:
                check_positive(option, value)
        check_seeds(self.seeds)
        try:
            check_steps(self.read_at)
        except InputError as error:
            raise InputError(f"--read-at: {error}") from None
        self.training(next(self.cells()))

    def training(self, cell: HorizonCell) -> FinetuneConfig:
        """The fine-tuning run of a cell."""
        own: dict[str, Any] = {"method": "full"}
        if cell.rank is not None:
            own = {"rule": "lora", "rank": cell.rank, "alpha": cell.strength}
        return FinetuneConfig(
            **own, **self.shared(), lr=cell.rate, seed=cell.seed, schedule="constant", dropout=0.0, held_out=0, widths=3
        )

    def shared(self) -> dict[str, Any]:
        """The settings of `SHARED`."""
        return {name: getattr(self, name) for name in SHARED}

    def cells(self) -> Iterator[HorizonCell]:
        """Every run, a seed after the other; then those of full fine-tuning."""
        for seed, strength, rank, rate in product(self.seeds, self.strengths, self.ranks, self.lrs):
            yield HorizonCell(rank, strength, rate, seed, self.read_at)
        for seed, rate in product(self.seeds, self.full_lrs):
            yield HorizonCell(None, None, rate, seed, self.read_at)


def warmed_up(steps: int, warmup: int) -> list[float]:
    """Factor of the rate in each step of a run of the grid: constant after a linear warm-up from 0."""
    return [min(1.0, step / warmup) if warmup else 1.0 for step in range(steps)]


def predictions(
    takeovers: Sequence[float],
    strengths: tuple[float, float],
    *,
    steps: Sequence[int],
    rates: Sequence[float],
    warmup: int,
) -> pd.DataFrame:
    """By what factor the law has the best rate fall between two values of gamma r, given the best rate at the first.

    The rate is constant after a warm-up from 0, the optimizer Adam, the signal leads.

    Args:
      takeovers: distances at which A takes over, of a model's modules (`rora_theory.theory.horizon`).
      strengths: gamma r that the rate is known at, and the other.
      steps: horizons.
      rates: best rates that the first may turn out to have.
      warmup: steps.

    Returns:
      ``steps``, ``rate``, ``quantile`` (of the takeovers), ``takeover``, ``factor`` (rate at the first strength over
      rate at the second) and ``exponent`` (d log rate / d log gamma r).
    """
    rows = []
    for count, rate, quantile in product(steps, rates, QUANTILES):
        takeover = float(np.quantile(takeovers, quantile))
        schedule = warmed_up(count, warmup)
        old = Setting(rank=1, alpha=strengths[0], learning_rate=rate, rule="lora")
        advice = transfer(old, 1, rule="lora", alpha=strengths[1], steps=count, takeover=takeover, schedule=schedule)
        factor = rate / advice.learning_rate
        exponent = -math.log(factor) / math.log(strengths[1] / strengths[0])
        rows.append((count, rate, quantile, takeover, factor, exponent))
    return pd.DataFrame(rows, columns=["steps", "rate", "quantile", "takeover", "factor", "exponent"])


@dataclass(frozen=True)
class HorizonRun:
    """One fine-tuning run of the grid, as far as it was read.

    Attributes:
      rank, strength, rate, seed: which; gamma is the strength over the rank. Full fine-tuning has neither.
      read: its readings.
    """

    rank: int | None
    strength: float | None
    rate: float
    seed: int
    read: ReadRun

    def losses(self, step: int) -> list[float] | None:
        """Of every held-out record after a step; None where the run was not read there, or diverged before."""
        return next((one.losses for one in self.read.readings if one.step == step), None)

    def reaches(self, step: int) -> bool:
        """Whether the run says something of a step: that it was read there, or diverged on the way."""
        return self.losses(step) is not None or (self.read.diverged_at is not None and self.read.diverged_at <= step)


def run_of(cell: Mapping[str, Any], value: Mapping[str, Any]) -> HorizonRun:
    """A finished cell as a `HorizonRun`.

    Args:
      cell: ``rank``, ``strength``, ``rate`` and ``seed``.
      value: a `ReadRun` in JSON types.
    """
    read = ReadRun(value["train_losses"], [Reading(**one) for one in value["readings"]], value["diverged_at"])
    return HorizonRun(cell["rank"], cell["strength"], cell["rate"], cell["seed"], read)


def distinct(runs: Iterable[HorizonRun]) -> list[HorizonRun]:
    """A run for each rank, strength, rate and seed: the longest, with the readings of all of them.

    At a constant rate runs that differ in their length alone are one run, up to rounding. Of two readings at one step
    that of the longer run is kept, or one that has the parts of the change where the other has not.
    """
    by: dict[tuple[Any, ...], list[HorizonRun]] = {}
    for run in runs:
        by.setdefault((run.rank, run.strength, run.rate, run.seed), []).append(run)
    found = []
    for same in by.values():
        same = sorted(same, key=lambda run: len(run.read.train_losses))
        kept: dict[int, Reading] = {}
        for one in (one for run in same for one in run.read.readings):
            if one.step not in kept or one.parts is not None or kept[one.step].parts is None:
                kept[one.step] = one
        found.append(replace(same[-1], read=replace(same[-1].read, readings=[kept[step] for step in sorted(kept)])))
    return found


def read_regime(folder: Path) -> tuple[list[float], list[float]]:
    """The takeover distances, and the linear terms under Adam, at held-out tokens of all modules with PEFT's init.

    Args:
      folder: a run of ``sims.regime``.

    Raises:
      InputError: as `read_regime_run`, or no takeover distance of them.
    """
    found = read_regime_run(folder, optimizer="adam", init="kaiming_uniform", split="heldout")
    rows = frames.read_csv(folder / TAKEOVER, TAKEOVER_COLUMNS)
    own = rows[(rows["init"] == "kaiming_uniform") & (rows["split"] == "heldout")]
    if own.empty:
        raise InputError(f"{folder / TAKEOVER}: has no held-out row of kaiming_uniform; accepted is a run that has")
    return own["takeover"].astype(float).tolist(), list(found.linear_terms.values())


def horizon_table(runs: Sequence[HorizonRun], tokens: Sequence[int], answer_tokens: Sequence[int]) -> pd.DataFrame:
    """A row a run and reading: losses a token with their errors over records; a diverged run has one row more.

    Args:
      runs: of the grid.
      tokens, answer_tokens: of every held-out record.
    """
    rows: list[dict[str, Any]] = []
    for run in runs:
        gamma = run.strength / run.rank if run.strength and run.rank else None
        who: dict[str, Any] = {"rank": run.rank, "strength": run.strength, "gamma": gamma}
        who |= {"learning_rate": run.rate, "seed": run.seed}
        for one in run.read.readings:
            loss, answer = mean_per_token(one.losses, tokens), mean_per_token(one.answer_losses, answer_tokens)
            rows.append(
                who
                | {"step": one.step, "status": "complete"}
                | {"validation_loss": loss.value, "validation_error": loss.error}
                | {"answer_loss": answer.value, "answer_error": answer.error}
            )
        if run.read.diverged_at is not None:
            rows.append(who | {"step": run.read.diverged_at, "status": "diverged"})
    return frames.of(rows, list(dict.fromkeys(name for row in rows for name in row)))


def led_table(runs: Sequence[HorizonRun], *, takeovers: Sequence[float], warmup: int) -> pd.DataFrame:
    """Which part of the change leads in every run and reading where this was measured, beside the law.

    Args:
      runs: of the grid.
      takeovers, warmup: see `predictions`; no takeovers leave the law's column out.

    Returns:
      ``rank``, ``strength``, ``learning_rate``, ``seed``, ``step``; over the modules the median and the 5% and 95%
      quantiles of ``ratio``, A-led over B-led rms, and of ``exponent``, see `measure.led.keeping_exponent`;
      ``change``, the root of the mean square over modules of their outputs' change; ``law_ratio``, of the median
      takeover at a constant gradient.
    """
    rows: list[dict[str, Any]] = []
    takeover = float(np.median(takeovers)) if takeovers else None
    for run in runs:
        for one in run.read.readings:
            if one.parts is None:
                continue
            b, a, w = (np.asarray(one.parts[name]) for name in PARTS)
            row: dict[str, Any] = {"rank": run.rank, "strength": run.strength, "learning_rate": run.rate}
            row |= {"seed": run.seed, "step": one.step}
            for name, values in (("ratio", a / b), ("exponent", keeping_exponent(b, a, w))):
                low, middle, high = np.quantile(values, QUANTILES).tolist()
                row |= {name: middle, f"{name}_low": low, f"{name}_high": high}
            row["change"] = float(np.sqrt(np.mean(w**2)))
            if takeover is not None:
                rates = [run.rate * factor for factor in warmed_up(one.step, warmup)]
                row["law_ratio"] = horizon.distances(rates, takeover=takeover).A / takeover
            rows.append(row)
    return pd.DataFrame(rows)


def change_at_best(best: pd.DataFrame, led: pd.DataFrame) -> pd.DataFrame:
    """The size of the change at each best rate: equal ones bear out that the best rate is the one that keeps it.

    Args:
      best: of `bests`, at every step.
      led: of `led_table`.

    Returns:
      ``step``, ``rank``, ``strength``, ``best_rate``; ``change`` there, between the two nearest rates along a line in
      logs, the mean of the logs over ``seeds``; ``log2_error``, a standard error: that of the best rate times the slope
      of that line; ``edge``, of the best rate: where it is at the grid's end there is no error. The seeds are those of
      which it was measured at every strength of the rank. No row without such a seed, and none where the best rate lies
      outside the rates at which the change was measured.
    """
    found: dict[tuple[int, int], dict[float, dict[int, tuple[float, float]]]] = {}
    rows = frames.rows(best[best["rank"].notna()]) if len(led) else []
    for row in rows:
        own = led[(led["rank"] == row["rank"]) & np.isclose(led["strength"], row["strength"])]
        for seed, one in own[own["step"] == row["step"]].groupby("seed"):
            x, y = (np.log2(one.sort_values("learning_rate")[name].to_numpy()) for name in ("learning_rate", "change"))
            at = math.log2(row["best_rate"])  # of five digits: at the end of the grid it may lie a little beyond
            if len(x) > 1 and x[0] - 1e-4 <= at <= x[-1] + 1e-4:
                right = min(max(int(np.searchsorted(x, at)), 1), len(x) - 1)
                slope = (y[right] - y[right - 1]) / (x[right] - x[right - 1])
                by_seed = found.setdefault((row["step"], row["rank"]), {}).setdefault(row["strength"], {})
                by_seed[int(seed)] = (y[right] + (at - x[right]) * slope, slope)
    table: list[dict[str, Any]] = []
    for row in rows:
        measured = found.get((row["step"], row["rank"]), {})
        seeds = set.intersection(*map(set, measured.values())) if row["strength"] in measured else set()
        if seeds:
            logs, slopes = np.mean([measured[row["strength"]][seed] for seed in sorted(seeds)], axis=0)
            error = row["log2_error"]
            table.append(
                {"step": int(row["step"]), "rank": int(row["rank"])}
                | {name: row[name] for name in ("strength", "best_rate")}
                | {"change": float(2**logs)}
                | {"log2_error": None if error is None else float(slopes) * error, "seeds": len(seeds)}
                | {"edge": row["edge"]}
            )
    return pd.DataFrame(table)


def curves_at(runs: Sequence[HorizonRun], tokens: Sequence[int], step: int, *, draws: int = 1000) -> list[Curve]:
    """Loss against rate of every rank and strength after a step, and of full fine-tuning (rule ``full``, rank 0 and
    gamma 1), where three rates or more reach it; see `_shared_grid`.

    Args:
      runs: of the grid, `distinct`.
      tokens: of every held-out record.
      step: the horizon.
      draws: of the bootstrap over records.
    """
    sizes, found = np.asarray(tokens, np.float64), []
    reached = [run for run in runs if run.reaches(step)]
    for rank, strength in sorted({(run.rank or 0, run.strength or 0.0) for run in reached}):
        own = {(run.seed, run.rate): run for run in reached if (run.rank or 0, run.strength or 0.0) == (rank, strength)}
        seeds, rates = _shared_grid({key: run.losses(step) is not None for key, run in own.items()})
        if not seeds:
            continue
        sums = np.full((len(seeds), len(rates), len(sizes)), np.inf)
        for (i, seed), (j, rate) in product(enumerate(seeds), enumerate(rates)):
            losses = own[seed, rate].losses(step)
            if losses is not None:
                sums[i, j] = losses
        drawn = [resampled_ratios(list(one), sizes, draws=draws) for one in sums]  # the same records for every seed
        found.append(
            Curve(
                "adamw", "both", "lora" if rank else FULL, 1.0, rank, strength / rank if rank else 1.0, np.array(rates),
                sums.sum(axis=2) / sizes.sum(), np.stack(drawn, axis=1), tuple(seeds),
            )
        )  # fmt: skip
    return found


def _shared_grid(trained: Mapping[tuple[int, float], bool]) -> tuple[list[int], list[float]]:
    """The seeds of a curve and the rates that all of them ran at, both ascending; none where there is no such curve.

    A seed with more rates comes first. One that leaves fewer than three rates, or no rate at which it trained, is left
    out: a folder grows seed by seed, and what diverged in a short run says nothing of the rates beside it.

    Args:
      trained: by seed and rate whether the run was read, not diverged.
    """
    by_seed: dict[int, set[float]] = {}
    for seed, rate in trained:
        by_seed.setdefault(seed, set()).add(rate)
    seeds: list[int] = []
    rates: set[float] = set()
    for seed in sorted(by_seed, key=lambda seed: (-len(by_seed[seed]), seed)):
        both = rates & by_seed[seed] if seeds else by_seed[seed]
        if len(both) >= 3 and all(any(trained[each, rate] for rate in both) for each in (*seeds, seed)):
            seeds, rates = [*seeds, seed], both
    return sorted(seeds), sorted(rates)


def bests(found: Sequence[Curve], step: int) -> pd.DataFrame:
    """The best rate and the least loss of every curve after a step."""
    frame = pd.DataFrame(best_rates(found)).drop(columns=["optimizer", "trained", "rule", "kappa"], errors="ignore")
    if not len(frame):
        return frame
    frame.insert(0, "step", step)
    frame.insert(2, "strength", [_strength(curve) if curve.rank else None for curve in found])
    frame["rank"] = pd.array([curve.rank or None for curve in found], dtype="Int64")
    return frames.of(frames.rows(frame), list(frame))


def _strength(curve: Curve) -> float:
    return round(curve.scaling * curve.rank, 9)


def _who(curve: Curve) -> dict[str, Any]:
    """The rank and strength of a curve; full fine-tuning has neither."""
    return {"rank": curve.rank or None, "strength": _strength(curve) if curve.rank else None}


def beside(found: Sequence[Curve], step: int, others: Mapping[str, Sequence[Curve]] | None = None) -> pd.DataFrame:
    """Every curve beside others after a step, each at its own best rate: an adapter beside full fine-tuning of the same
    modules, the largest rank at its strength and the largest strength at its rank, which is LoRA beside RoRA of one
    alpha where the strengths are alpha and alpha sqrt(r); any curve beside the same one of other runs.

    Args:
      found: of `curves_at` the step.
      step: the horizon.
      others: of `curves_at` the step, by what tells those runs from these, see `read_beside`.

    Returns:
      ``step``, ``rank``, ``strength``, ``beside``; ``ratio``, the best rate over that of what it stands beside, with
      ``ratio_log2_error``; ``difference`` of the least losses, with its 95% ``half_width``, in which is what the grid
      may hide (``grid_error``), ``error_over``, ``seeds`` and ``verdict``, see `stats.rate_curves.comparison`. No row
      where either lacks three rates, or the two share no seed.
    """
    adapters = [curve for curve in found if curve.rule != FULL]
    pairs = [(curve, full, _rank(curve), FULL) for curve in adapters for full in found if full.rule == FULL]
    for curve in adapters:
        largest = max((one for one in adapters if _strength(one) == _strength(curve)), key=lambda one: one.rank)
        if largest is not curve:
            pairs.append((curve, largest, _rank(curve), _rank(largest)))
    for curve in adapters:
        strongest = max((one for one in adapters if one.rank == curve.rank), key=_strength)
        if strongest is not curve:
            pairs.append((curve, strongest, _gamma_r(_strength(curve)), _gamma_r(_strength(strongest))))
    for name, curves in (others or {}).items():
        by = {(one.rank, one.scaling): one for one in curves}
        pairs += [(one, by[key], _rank(one), name) for one in found if (key := (one.rank, one.scaling)) in by]
    rows = []
    for first, second, own_name, name in pairs:
        shared = at_shared_seeds(first, second)
        if shared:
            one, other = replace(shared[0], rule=own_name), replace(shared[1], rule=name)
            own = comparison(one, other, less(one, other))
            names = ["ratio", "ratio_log2_error", "ratio_log2_half_width", "difference", "half_width"]
            names += ["grid_error", "error_over"]
            who = {"step": step} | _who(first) | {"beside": name} | {name: getattr(own, name) for name in names}
            rows.append(who | {"seeds": len(one.losses), "verdict": own.verdict})
    return frames.of(rows, list(rows[0])) if rows else pd.DataFrame()


def _rank(curve: Curve) -> str:
    return f"r = {curve.rank}" if curve.rank else FULL


def _gamma_r(strength: float) -> str:
    return f"gamma r = {strength:g}"


def at_one_rate(runs: Sequence[HorizonRun], tokens: Sequence[int], step: int) -> pd.DataFrame:
    """The strengths of one rank beside its largest after a step at every rate and seed that both ran: what a comparison
    at one rate sees, where `beside` has each at its own best rate.

    Args:
      runs, tokens, step: see `curves_at`.

    Returns:
      ``step``, ``rank``, ``strength``, ``beside``, ``learning_rate``; ``difference`` of the losses, with its 95%
      ``half_width``, ``error_over`` and ``seeds``, see `paired_losses`. A seed of which either diverged is left out.
    """
    by: dict[tuple[int, float, float], dict[int, list[float]]] = {}
    for run in runs:
        if run.rank and run.strength and (losses := run.losses(step)) is not None:
            by.setdefault((run.rank, run.strength, run.rate), {})[run.seed] = losses
    strongest = {rank: strength for rank, strength, _ in sorted(by)}  # the last of a rank's
    sizes, rows = np.asarray(tokens, np.float64), []
    for rank, strength, rate in sorted(by):
        own, other = by[rank, strength, rate], by.get((rank, strongest[rank], rate), {})
        seeds = sorted(own.keys() & other.keys())
        if strength == strongest[rank] or not seeds:
            continue
        first, second = (np.array([each[seed] for seed in seeds]) for each in (own, other))
        apart = paired_losses(
            first.sum(axis=1) / sizes.sum(),
            second.sum(axis=1) / sizes.sum(),
            (first.mean(axis=0), second.mean(axis=0)),
            sizes,
        )
        row = {"step": step, "rank": rank, "strength": strength, "beside": _gamma_r(strongest[rank])}
        row |= {"learning_rate": rate, "difference": apart.value}
        row |= {"half_width": apart.half_width() if apart.has_error else None}
        rows.append(row | {"error_over": apart.over, "seeds": len(seeds)})
    return frames.of(rows, list(rows[0])) if rows else pd.DataFrame()


def read_beside(path: Path, identity: Mapping[str, Any]) -> tuple[str, list[HorizonRun]]:
    """The runs of another folder of ``sims.horizon``, of the same model and records, and what they differ in.

    Args:
      path: the folder.
      identity: the settings of these runs, as their own manifest has them.

    Returns:
      The settings of those runs that differ, in words, and the runs.

    Raises:
      InputError: no such run, one of another model or of other records, or one that differs in nothing.
    """
    manifest = read_manifest(path, ("experiment", "config"))
    if manifest is None or manifest["experiment"] != "horizon":
        raise InputError(f"--beside {path}: accepted is a run folder of sims.horizon")
    other, own = manifest["config"], as_json(identity)
    for name in ("model_sha256", "records"):
        if other.get(name) != own[name]:
            raise InputError(f"--beside {path}: has another {name}; accepted is a run of the same model and records")
    differ = [name for name in own if name != "model" and own[name] != other.get(name)]
    if not differ:
        raise InputError(f"--beside {path}: differs in no setting; accepted is a run that does, as in --targets")
    values = {name: other.get(name) for name in differ}
    words = [f"{key} {' '.join(each) if isinstance(each, list) else each}" for key, each in values.items()]
    return ", ".join(words), [run_of(one.cell, one.value) for one in finished(path).values()]


def exponent_of_parts(
    runs: Sequence[HorizonRun],
    step: int,
    *,
    rank: int,
    strengths: tuple[float, float],
    rate: float,
    seeds: Sequence[int],
) -> list[float]:
    """The exponent of the rate in gamma r that keeps the change of all modules together, by the parts that were
    measured in runs at the first strength (`measure.led.keeping_factor`), a seed each: along a line in the log of the
    rate between the two runs beside it, no further apart than a grid step, or of the one within half a step, an eighth
    of a decade. None of a seed without such a run; a run whose parts tell no factor is none.

    Args:
      runs: of the grid.
      step: the horizon.
      rank: of the runs.
      strengths: gamma r of the runs, and the other.
      rate: the best one at the first.
      seeds: whose runs.
    """
    grows = strengths[1] / strengths[0]
    measured: dict[int, dict[float, float]] = {}
    for run in runs:
        parts = next((one.parts for one in run.read.readings if one.step == step), None)
        if parts is None or run.strength is None or run.rank != rank or run.seed not in seeds:
            continue
        if math.isclose(run.strength, strengths[0], rel_tol=1e-6):
            factor = keeping_factor(grows, *(np.asarray(parts[name]) for name in PARTS))
            if math.isnan(factor):
                continue
            measured.setdefault(run.seed, {})[math.log10(run.rate / rate)] = math.log(factor) / math.log(grows)
    found = []
    for seed in sorted(measured):
        apart, slopes = zip(*sorted(measured[seed].items()), strict=True)
        right = int(np.searchsorted(apart, 0.0))
        if 0 < right < len(apart) and apart[right] - apart[right - 1] <= 1 / 4 + 1e-3:
            found.append(float(np.interp(0.0, apart, slopes)))
        elif abs(nearest := min(apart, key=abs)) <= 1 / 8 + 1e-3:
            found.append(measured[seed][nearest])
    return found


def horizon_exponents(
    found: Sequence[Curve],
    step: int,
    *,
    takeovers: Sequence[float],
    warmup: int,
    runs: Sequence[HorizonRun] = (),
    linear_terms: Sequence[float] = (),
) -> pd.DataFrame:
    """How the best rate moves with gamma r at every rank, and with the rank at every gamma r, each from every other to
    the largest, beside the law.

    Args:
      found: of `curves_at` the step.
      step: the horizon.
      takeovers, warmup: see `predictions`.
      runs: whose parts were measured, see `exponent_of_parts`.
      linear_terms: of the modules, c of the first step under Adam; none takes the signal to lead.

    Returns:
      ``step``, ``over`` (``strength`` or ``rank``), ``at`` (the other), ``first``, ``second``; ``exponent`` with
      ``standard_error``, ``half_width`` (95%) and ``error_over``, of the ``seeds`` that both ends have; ``law_low``,
      ``law``, ``law_high``; ``verdict``, see `judge_exponent`. Over the strength the law is of the modules' takeovers,
      at the measured best rate. In the rank it goes from 0, where the signal or A leads, to what keeps the first step
      of the median module and of 95% of them, see `laws.keeping_rank_exponent`.
      Over the strength ``by_parts``, the mean of `exponent_of_parts` over seeds, ``by_parts_low`` and ``by_parts_high``
      their range, and ``by_parts_verdict`` on that in place of the law's.
    """
    rows = []
    by = {(curve.rank, _strength(curve)): curve for curve in found}
    for over, index in (("strength", 1), ("rank", 0)):
        pairs = [
            (key, max(other for other in by if other[1 - index] == key[1 - index]))
            for key in sorted(by, key=lambda key: (key[1 - index], key[index]))
        ]
        for first, last in pairs:
            ends = at_shared_seeds(by[first], by[last]) if first != last else ()
            if not ends:
                continue
            at, low, high = first[1 - index], first[index], last[index]
            slope = of_log2_rates((-1.0, 1.0), *ends).times(1 / math.log2(high / low))
            law: tuple[float, ...] = (0.0, 0.0, 0.0)
            by_parts: list[float] = []
            rivals = RIVALS[over]
            if over == "strength":
                rate = _best_rate(ends[0])
                told = predictions(takeovers, (low, high), steps=[step], rates=[rate], warmup=warmup)
                law = tuple(told["exponent"])
                by_parts = exponent_of_parts(
                    runs, step, rank=int(at), strengths=(low, high), rate=rate, seeds=tuple(ends[0].by_seed)
                )
            elif len(linear_terms):
                kept = laws.keeping_rank_exponent(low, high, np.asarray(linear_terms))
                law = (0.0, *np.quantile(kept, QUANTILES[1:]).tolist())
            edge, seeds = any(curve.edge for curve in ends), len(ends[0].losses)
            judged = partial(judge_exponent, slope, edge=edge)
            rows.append(
                {"step": step, "over": over, "at": at, "first": low, "second": high, "exponent": slope.value}
                | _errors(slope)
                | {"law_low": min(law), "law": law[1], "law_high": max(law), "seeds": seeds}
                | {"verdict": judged((min(law), max(law)), rivals, seeds=seeds)}
                | {"by_parts": float(np.mean(by_parts)) if by_parts else None}
            )
            if by_parts:
                ends_of_parts = min(by_parts), max(by_parts)
                rows[-1] |= dict(zip(("by_parts_low", "by_parts_high"), ends_of_parts, strict=True))
                rows[-1]["by_parts_verdict"] = judged(ends_of_parts, (*rivals, law[1]), seeds=len(by_parts))
    return pd.DataFrame(rows)


def step_exponents(curves: Mapping[int, Sequence[Curve]], *, takeovers: Sequence[float], warmup: int) -> pd.DataFrame:
    """How the best rate moves with the number of steps, from each horizon to the longest, beside a constant gradient's.

    Along constant signs both factors move by the sum of the rates, so that the rate that keeps the change at one gamma
    r falls as one over that sum, whichever part leads; Adam follows a gradient that grows faster, see
    `rora_theory.theory.horizon.keeping_rate`.
    Entries that walk at random move by the root of the sum: -1/2. A step up to which the rate was 0 throughout has
    no best rate and is left out.

    Args:
      curves: of `curves_at`, by step.
      takeovers, warmup: see `predictions`.

    Returns:
      ``rank``, ``strength``, ``first``, ``second`` (steps); ``exponent`` of the best rate in the steps, with
      ``standard_error``, ``half_width`` (95%) and ``error_over``, of the ``seeds`` that both have; ``law_low``,
      ``law``, ``law_high``, a constant gradient's of the modules' takeovers at the first best rate, and ``verdict`` on
      them, see `judge_exponent`.
    """
    rows = []
    by: dict[tuple[int, float], dict[int, Curve]] = {}
    for step in sorted(curves):
        for curve in curves[step] if any(warmed_up(step, warmup)) else ():
            by.setdefault((curve.rank, curve.scaling), {})[step] = curve
    for own in by.values():
        *earlier, second = own
        for first in earlier:
            curve = own[first]
            ends = at_shared_seeds(curve, own[second])
            if not ends:
                continue
            octaves = math.log2(second / first)
            slope = of_log2_rates((-1.0, 1.0), *ends).times(1 / octaves)
            rate = _best_rate(ends[0])
            taken = np.quantile(takeovers, QUANTILES).tolist() if curve.rank else [math.inf]
            schedules = (warmed_up(first, warmup), warmed_up(second, warmup))
            kept = [horizon.keeping_rate(rate, *schedules, takeover=each) for each in taken]
            law = sorted(math.log2(each / rate) / octaves for each in kept)
            edge, seeds = any(one.edge for one in ends), len(ends[0].losses)
            rows.append(
                _who(curve)
                | {"first": first, "second": second, "exponent": slope.value}
                | _errors(slope)
                | {"seeds": seeds, "law_low": law[0], "law": law[len(law) // 2], "law_high": law[-1]}
                | {"verdict": judge_exponent(slope, (law[0], law[-1]), RIVALS["step"], edge=edge, seeds=seeds)}
            )
    return frames.of(rows, list(rows[0])) if rows else pd.DataFrame()


def _best_rate(curve: Curve) -> float:
    """The geometric mean of the seeds' best rates."""
    return 2 ** float(np.mean(log2_rates(curve.spread)))


def _errors(slope: Estimate) -> dict[str, Any]:
    return {"standard_error": slope.error, "half_width": slope.half_width(), "error_over": slope.over}


RIVALS = {"strength": (-1.0, 0.0), "rank": (0.5,), "step": (-0.5,)}
"""What else is said of the exponent: in gamma r, -1 (the first step's law) and 0 (nothing to change); in the rank at
one gamma r, 1/2 (cross-talk leads, so that the step falls as the root of the rank); in the steps, -1/2 (entries walk
at random)."""


def judge_exponent(
    slope: Estimate, law: tuple[float, float], rivals: Sequence[float], *, edge: bool, seeds: int
) -> str:
    """Whether a measured exponent of the best rate bears the law out.

    ``agrees``: its 95% interval meets the law's range and leaves out what else is said, where the law's range does;
    ``contradicts``: it misses the law's range; ``undecided``: it could not tell, a best rate lies at the grid's edge,
    or there is one seed: its error is over records and leaves out how one training run differs from the next.

    Args:
      slope: measured.
      law: the range of what is judged.
      rivals: what else is said, see `RIVALS`.
      edge: whether a best rate is at the grid's edge.
      seeds: whose curves both ends have.
    """
    if edge or seeds < 2 or not math.isfinite(slope.half_width()):
        return "undecided"
    low, high = slope.value - slope.half_width(), slope.value + slope.half_width()
    if high < law[0] or low > law[1]:
        return "contradicts"
    others = [other for other in rivals if not law[0] <= other <= law[1]]
    return "undecided" if any(low <= other <= high for other in others) else "agrees"


@dataclass(frozen=True, eq=False)
class HorizonJudgement:
    """What runs come to: best rates (`bests`), each beside others (`beside`; at one rate `at_one_rate`), and how they
    move (`horizon_exponents`), of every step that was read; how they move with the steps (`step_exponents`); which part
    of the change leads in every run (`led_table`), and how large the change is at the best rates (`change_at_best`).
    A frame is empty where nothing can be said."""

    best: pd.DataFrame
    beside: pd.DataFrame
    one_rate: pd.DataFrame
    exponents: pd.DataFrame
    steps: pd.DataFrame
    led: pd.DataFrame
    change: pd.DataFrame

    def files(self) -> dict[str, pd.DataFrame]:
        """The frames that are not empty, by the names of their files."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {f"{name}.csv": frame for name, frame in found.items() if not frame.empty}


def judge_runs(
    runs: Sequence[HorizonRun],
    tokens: Sequence[int],
    *,
    takeovers: Sequence[float],
    warmup: int,
    linear_terms: Sequence[float] = (),
    others: Mapping[str, Sequence[HorizonRun]] | None = None,
) -> HorizonJudgement:
    """Find the best rates at every step that was read, and judge them.

    Args:
      runs: of one grid; those of one setting are taken as one, see `distinct`.
      tokens: of each held-out record.
      takeovers: of a model's modules, for the law's exponents; none leaves these out.
      warmup: steps.
      linear_terms: of the modules, see `horizon_exponents`.
      others: runs to stand beside these, see `read_beside`.
    """
    runs = distinct(runs)
    steps = sorted({one.step for run in runs for one in run.read.readings})
    curves = {step: curves_at(runs, tokens, step) for step in steps}
    best = _joined(bests(found, step) for step, found in curves.items())
    led = led_table(runs, takeovers=takeovers, warmup=warmup)
    if best.empty:
        none = pd.DataFrame()
        return HorizonJudgement(best, none, none, none, none, led, none)
    other = {name: distinct(own) for name, own in (others or {}).items()}
    pairs = [
        beside(found, step, {name: curves_at(own, tokens, step) for name, own in other.items()})
        for step, found in curves.items()
    ]
    found = moved = pd.DataFrame()
    if takeovers:
        law: dict[str, Any] = {"takeovers": takeovers, "warmup": warmup}
        found = _joined(
            horizon_exponents(one, step, **law, runs=runs, linear_terms=linear_terms) for step, one in curves.items()
        )
        moved = step_exponents(curves, **law)
    same = _joined(at_one_rate(runs, tokens, step) for step in steps)
    return HorizonJudgement(best, _joined(pairs), same, found, moved, led, change_at_best(best, led))


def _joined(parts: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Those that have rows, one below the other: an empty one would make floats of whole numbers."""
    kept = [part for part in parts if len(part)]
    return pd.concat(kept) if kept else pd.DataFrame()


def horizon_in_words(runs: int, best: pd.DataFrame, found: pd.DataFrame, *, law: bool) -> str:
    """What the runs say of the law, or what they lack to say it.

    Args:
      runs: how many.
      best: of `bests`, at every step.
      found: of `horizon_exponents`, at every step.
      law: whether takeover distances were known.
    """
    if best.empty:
        return f"No rank and strength has three rates yet; {runs} runs are there."
    if not law:
        return f"{runs} runs tell {len(best)} best rates; --regime gives the law beside their exponents."
    if found.empty:
        return f"{runs} runs are there; no two of their best rates can be compared yet."
    count = found["verdict"].value_counts().to_dict()
    words = [f"{name} {count[name]} times" for name in ("agrees", "contradicts", "undecided") if name in count]
    return f"The law against {runs} runs: {', '.join(words)}."


def rows_in_words(frame: pd.DataFrame) -> pd.DataFrame:
    """A frame of a judgement with what a rate is compared ``against``, or with the ``size`` of an adapter, in words."""
    if "over" in frame:
        return frame.assign(against=frame["over"].map({"strength": "gamma r at r =", "rank": "r at gamma r ="}))
    return frame.assign(size=frame["rank"].map("{:g}".format, na_action="ignore").fillna(FULL))
