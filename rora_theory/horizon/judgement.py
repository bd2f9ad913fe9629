"""What runs of a grid of horizons come to: best rates, each beside others, and how they move beside the law."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pandas as pd

from rora_theory.horizon.curves import FULL, at_one_rate, beside, bests, curves_at
from rora_theory.horizon.law import horizon_exponents, step_exponents
from rora_theory.horizon.parts import change_at_best, led_table
from rora_theory.horizon.regret import constants_by_steps, policies, regret_by_policy, regret_table
from rora_theory.horizon.runs import HorizonRun, distinct

UNITS = {
    "strength": "gamma times the rank: alpha under alpha / r, alpha sqrt(r) under alpha / sqrt(r)",
    "validation_loss, answer_loss": "nats a token of the held-out records; errors are over records",
}


@dataclass(frozen=True, eq=False)
class HorizonJudgement:
    """What runs come to. A frame is empty where nothing can be said.

    Attributes:
      best: `horizon_curves.bests` of every step that was read.
      beside: each beside others, `horizon_curves.beside`.
      one_rate: the same at one rate, `horizon_curves.at_one_rate`.
      exponents: how the best rates move, `horizon_law.horizon_exponents`.
      steps: how they move with the steps, `horizon_law.step_exponents`.
      led: which part of the change leads in every run, `horizon_parts.led_table`.
      change: how large the change is at the best rates, `horizon_parts.change_at_best`.
      constants: Displacement constants K, `horizon_regret.constants_by_steps`.
      regret: Cost of policies between all measured conditions, `horizon_regret.regret_table`.
      policies: Its summary, `horizon_regret.regret_by_policy`.
    """

    best: pd.DataFrame
    beside: pd.DataFrame
    one_rate: pd.DataFrame
    exponents: pd.DataFrame
    steps: pd.DataFrame
    led: pd.DataFrame
    change: pd.DataFrame
    constants: pd.DataFrame
    regret: pd.DataFrame
    policies: pd.DataFrame

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
      runs: of one grid; those of one setting are taken as one, see `horizon_runs.distinct`.
      tokens: of each held-out record.
      takeovers: of a model's modules, for the law's exponents; none leaves these out.
      warmup: steps.
      linear_terms: of the modules, see `horizon_law.horizon_exponents`.
      others: runs to stand beside these, see `horizon_runs.read_beside`.
    """
    runs = distinct(runs)
    steps = sorted({one.step for run in runs for one in run.read.readings})
    curves = {step: curves_at(runs, tokens, step) for step in steps}
    best = _joined(bests(found, step) for step, found in curves.items())
    led = led_table(runs, takeovers=takeovers, warmup=warmup)
    if best.empty:
        none = pd.DataFrame()
        return HorizonJudgement(best, none, none, none, none, led, none, none, none, none)
    other = {name: distinct(own) for name, own in (others or {}).items()}
    pairs = [
        beside(found, step, {name: curves_at(own, tokens, step) for name, own in other.items()})
        for step, found in curves.items()
    ]
    constants = constants_by_steps(led, best)
    by_steps = constants.groupby("step") if len(constants) else ()
    ranges = {int(step): (float(rows["constant"].min()), float(rows["constant"].max())) for step, rows in by_steps}
    found = moved = pd.DataFrame()
    if takeovers:
        law: dict[str, Any] = {"takeovers": takeovers, "warmup": warmup}
        found = _joined(
            horizon_exponents(one, step, **law, runs=runs, linear_terms=linear_terms, constants=ranges)
            for step, one in curves.items()
        )
        moved = step_exponents(curves, **law)
    same = _joined(at_one_rate(runs, tokens, step) for step in steps)
    costs = pd.DataFrame()
    if ranges:
        middle = {step: math.sqrt(low * high) for step, (low, high) in ranges.items()}
        takeover = float(np.median(takeovers)) if takeovers else None
        costs = regret_table(runs, tokens, policies(middle, takeover=takeover))
    return HorizonJudgement(
        best,
        _joined(pairs),
        same,
        found,
        moved,
        led,
        change_at_best(best, led),
        constants,
        costs,
        regret_by_policy(costs),
    )


def _joined(parts: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Those that have rows, one below the other: an empty one would make floats of whole numbers."""
    kept = [part for part in parts if len(part)]
    return pd.concat(kept) if kept else pd.DataFrame()


def horizon_in_words(runs: int, best: pd.DataFrame, found: pd.DataFrame, *, law: bool) -> str:
    """What the runs say of the law, or what they lack to say it.

    Args:
      runs: how many.
      best: of `horizon_curves.bests`, at every step.
      found: of `horizon_law.horizon_exponents`, at every step.
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


def against_in_words(found: pd.DataFrame) -> pd.DataFrame:
    """The frame of `horizon_law.horizon_exponents` with what a rate is compared ``against`` in words."""
    return found.assign(against=found["over"].map({"strength": "gamma r at r =", "rank": "r at gamma r ="}))


def size_in_words(frame: pd.DataFrame) -> pd.DataFrame:
    """A frame of a judgement by rank, with the ``size`` of the adapter in words."""
    if "rank" not in frame:  # a summary over ranks
        return frame
    return frame.assign(size=frame["rank"].map("{:g}".format, na_action="ignore").fillna(FULL))
