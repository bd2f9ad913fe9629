"""Loss against rate after some steps of a grid's runs; each curve beside others, at its best rate and at one rate."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from rora_theory.horizon.runs import HorizonRun
from rora_theory.io import frames
from rora_theory.stats.paired import resampled_ratios
from rora_theory.stats.rate_curves import Curve, at_shared_seeds, best_rates, comparison, less, paired_losses

FULL = "full"
"""The rule of a curve of full fine-tuning, which has none."""


def curves_at(runs: Sequence[HorizonRun], tokens: Sequence[int], step: int, *, draws: int = 1000) -> list[Curve]:
    """Loss against rate of every rank and strength after a step, and of full fine-tuning (rule ``full``, rank 0 and
    gamma 1), where three rates or more reach it; see `_shared_grid`.

    Args:
      runs: of the grid, `horizon_runs.distinct`.
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
    frame.insert(2, "strength", [strength_of(curve) if curve.rank else None for curve in found])
    frame["rank"] = pd.array([curve.rank or None for curve in found], dtype="Int64")
    return frames.of(frames.rows(frame), list(frame))


def strength_of(curve: Curve) -> float:
    return round(curve.scaling * curve.rank, 9)


def who_of(curve: Curve) -> dict[str, Any]:
    """The rank and strength of a curve; full fine-tuning has neither."""
    return {"rank": curve.rank or None, "strength": strength_of(curve) if curve.rank else None}


def beside(found: Sequence[Curve], step: int, others: Mapping[str, Sequence[Curve]] | None = None) -> pd.DataFrame:
    """Every curve beside others after a step, each at its own best rate: an adapter beside full fine-tuning of the same
    modules, the largest rank at its strength and the largest strength at its rank, which is LoRA beside RoRA of one
    alpha where the strengths are alpha and alpha sqrt(r); any curve beside the same one of other runs.

    Args:
      found: of `curves_at` the step.
      step: the horizon.
      others: of `curves_at` the step, by what tells those runs from these, see `horizon_runs.read_beside`.

    Returns:
      ``step``, ``rank``, ``strength``, ``beside``; ``ratio``, the best rate over that of what it stands beside, with
      ``ratio_log2_error``; ``difference`` of the least losses, with its 95% ``half_width``, in which is what the grid
      may hide (``grid_error``), ``error_over``, ``seeds`` and ``verdict``, see `stats.rate_curves.comparison`. No row
      where either lacks three rates, or the two share no seed.
    """
    adapters = [curve for curve in found if curve.rule != FULL]
    pairs = [(curve, full, _rank(curve), FULL) for curve in adapters for full in found if full.rule == FULL]
    for curve in adapters:
        largest = max((one for one in adapters if strength_of(one) == strength_of(curve)), key=lambda one: one.rank)
        if largest is not curve:
            pairs.append((curve, largest, _rank(curve), _rank(largest)))
    for curve in adapters:
        strongest = max((one for one in adapters if one.rank == curve.rank), key=strength_of)
        if strongest is not curve:
            pairs.append((curve, strongest, _gamma_r(strength_of(curve)), _gamma_r(strength_of(strongest))))
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
            who = {"step": step} | who_of(first) | {"beside": name} | {name: getattr(own, name) for name in names}
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
