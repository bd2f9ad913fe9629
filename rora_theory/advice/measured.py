"""Results of fine-tuning runs that the advice uses: displacement constants, exponents in the steps, and regret.

`measured.json` holds the values. ``python docs/fill.py`` copies them from ``results/published``, and ``--check`` fails
if they differ.
"""

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from rora_theory.optimizers import Schedule
from rora_theory.scaling import check_integer

ENTRIES: dict[str, dict[str, Any]] = json.loads(files("rora_theory.advice").joinpath("measured.json").read_text())
"""Entries of `measured.json` by name."""

ROWS: dict[str, dict[str, Any]] = {name: entry["columns"] for name, entry in ENTRIES.items() if "columns" in entry}
"""Values of the entries that quote one row, by name."""

Changed = Literal["rank", "strength", "steps"]
"""What differs between a tuned and a new setting; the strength is gamma r."""


def _range_of(entry: str, column: str) -> tuple[float, float]:
    low, high = ENTRIES[entry]["ranges"][column]
    return low, high


COST_MODELS = sorted({entry["model"] for name, entry in ENTRIES.items() if name.startswith("cost_")})
"""Models in whose runs the regret was measured."""

MEASURED_RANKS = _range_of("measured_settings", "rank")
"""Lowest and highest rank of the runs."""

MEASURED_STRENGTHS = _range_of("measured_settings", "strength")
"""Lowest and highest value of gamma r in the runs."""

MEASURED_STEPS: dict[Schedule, tuple[float, float]] = {
    entry["schedule"]: _range_of(name, "step") for name, entry in ENTRIES.items() if name.startswith("measured_steps_")
}
"""Lowest and highest number of optimizer steps after which the best rate was measured, by schedule."""

MEASURED_SCHEDULE: Schedule = "constant"
"""Schedule of most runs."""

MEASURED_STEPS_EXPONENTS: dict[Schedule, tuple[float, float]] = {
    entry["schedule"]: _range_of(name, "exponent")
    for name, entry in ENTRIES.items()
    if name.startswith("steps_exponents_")
}
"""Lowest and highest exponent of the best peak rate in the number of steps, by schedule.

Exponents of pairs whose best rates lie inside their grids: to 256 steps at a constant rate with two seeds or more, to
256 and 1,024 under the cosine schedule with one. Pairs that end at 64 steps are left out: planned runs are longer.
"""


def is_constant_rate(*schedules: Schedule | None) -> bool:
    """Return whether all schedules are a constant rate, which None stands for."""
    return all(schedule in (None, MEASURED_SCHEDULE) for schedule in schedules)


def measured_steps(schedule: Schedule | None) -> tuple[float, float]:
    """Return the lowest and highest number of optimizer steps after which the best rate was measured.

    Args:
      schedule: Schedule of the runs; None and schedules that were not measured count as a constant rate.

    Examples:
      >>> measured_steps("constant")
      (16, 256)
    """
    return MEASURED_STEPS.get(schedule or MEASURED_SCHEDULE, MEASURED_STEPS[MEASURED_SCHEDULE])


def steps_exponents(*schedules: Schedule | None) -> tuple[float, float]:
    """Return the range of the exponent of the best peak rate in the number of optimizer steps.

    A schedule other than a constant rate has the range of all schedules that were measured.

    Args:
      schedules: Schedules of the runs; None and no schedule stand for a constant rate.

    Returns:
      Lowest and highest exponent, rounded to one decimal, since their standard errors are 0.03 to 0.3.

    Examples:
      >>> steps_exponents("constant")
      (-0.6, -0.4)
    """
    ranges = list(MEASURED_STEPS_EXPONENTS.values())
    if is_constant_rate(*schedules):
        ranges = [MEASURED_STEPS_EXPONENTS[MEASURED_SCHEDULE]]
    return round(min(low for low, _ in ranges), 1), round(max(high for _, high in ranges), 1)


class RankExponent(NamedTuple):
    """95% interval of the exponent of the best rate in the rank, at an unchanged gamma r.

    Attributes:
      model: Model of the runs.
      schedule: Schedule of the runs.
      low: Lower end of the interval.
      high: Upper end of the interval.
    """

    model: str
    schedule: Schedule
    low: float
    high: float

    @classmethod
    def from_entry(cls, entry: dict[str, Any]) -> "RankExponent":
        """Return the interval of an entry ``from_rank_*`` of `measured.json`."""
        exponent, half_width = entry["columns"]["exponent"], entry["columns"]["half_width"]
        return cls(entry["model"], entry["schedule"], exponent - half_width, exponent + half_width)


RANK_EXPONENTS = tuple(
    RankExponent.from_entry(entry) for name, entry in ENTRIES.items() if name.startswith("from_rank_")
)
"""Exponents that were measured from rank 8 to 128."""


def rank_exponents(schedule: Schedule) -> list[RankExponent]:
    """Return the measured exponents in the rank that apply to a schedule.

    A schedule other than a constant rate has those of all schedules that were measured, as in `steps_exponents`.

    Args:
      schedule: Schedule of the runs.
    """
    return [row for row in RANK_EXPONENTS if not is_constant_rate(schedule) or is_constant_rate(row.schedule)]


@dataclass(frozen=True)
class ProbeRegret:
    """Regret of the learning rates that published probes advise, in nats per token.

    The regret is the held-out loss at the rate that a probe advises minus the lowest loss that was measured for the
    planned run. It includes the error of the probe's own best rate. Most probes were replayed on the beginnings of
    published runs and on a part of their held-out records, see `benchmarks/tune.py`.

    Attributes:
      median: Median over pairs of a probe and a planned run.
      largest: Largest regret of a pair.
      is_lower_bound: Whether a rate lies outside the measured ones, so that both regrets may be larger.
      pairs: Number of pairs.
      probes: Number of probes.
      is_edge: Whether the pairs are those in which the best rate of the probe or of the planned run lay at an end of
        its learning rates, or all others.
      changed: Names of the settings that differ between a probe and a planned run.
      source: Models, numbers of steps, schedule, seeds and folder of the probes.
    """

    median: float
    largest: float
    is_lower_bound: bool
    pairs: int
    probes: int
    is_edge: bool
    changed: str
    source: str

    def sentence(self) -> str:
        """Return a sentence with the numbers and their scope."""
        bound = "at least " if self.is_lower_bound else ""
        place = "at an end of" if self.is_edge else "inside"
        return (
            f"The rates of {self.probes} {'probe' if self.probes == 1 else 'probes'} of published runs, carried to "
            f"another {self.changed}, cost a median of {bound}{self.median:.4f} and at worst {bound}{self.largest:.4f} "
            f"nats per token in {self.pairs} pairs of a probe and a planned run whose best rates lay {place} the "
            f"measured ones ({self.source})."
        )


Probes = Literal["same_rank", "other_rank", "short", "at_edge"]
"""Published probes with the planned run's rank, with another, of few steps, or whose best rate lay at an end."""


def probe_regret(probes: Probes, schedule: Schedule) -> ProbeRegret:
    """Return the regret that published probes had.

    Args:
      probes: Kind of the probes. Those of few steps (measured under cosine decay alone) and those at an end of their
        rates are not distinguished by rank or schedule.
      schedule: Schedule of the probe and of the planned run. Cosine decay stands for every schedule with a decay.
    """
    kind = "constant" if is_constant_rate(schedule) else "cosine"
    name = f"probe_regret_{kind}_{probes}" if probes in ("same_rank", "other_rank") else f"probe_regret_{probes}"
    entry = ENTRIES[name]
    ranges, counts = entry["ranges"], {name: count["number"] for name, count in entry["distinct"].items()}
    seeds = counts["seeds"]
    return ProbeRegret(
        median=entry["medians"]["regret"],
        largest=ranges["regret"][1],
        is_lower_bound="True" in ranges["is_lower_bound"],
        pairs=counts["pairs"],
        probes=counts["probes"],
        is_edge=probes == "at_edge",
        changed={"same_rank": "number of steps", "other_rank": "rank and number of steps"}.get(
            probes, "number of steps, at the same rank or another"
        ),
        source=f"{entry['model']}, probes of {_describe_range(ranges['probe_steps'])} steps, runs of "
        f"{_describe_range(ranges['steps'])} steps, {entry['schedule']} schedule, "
        f"{'one seed' if seeds == 1 else f'up to {seeds} seeds'}; results/published/{entry['rows'].partition('/')[0]}",
    )


def _describe_range(values: Sequence[float]) -> str:
    """Return a range of integers in words, or its value if both ends are equal."""
    low, high = values
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _constants_by_model() -> dict[str, dict[int, tuple[float, float]]]:
    by_model: dict[str, dict[int, tuple[float, float]]] = {}
    for name, entry in ENTRIES.items():
        if name.startswith("displacement_constant_"):
            by_model.setdefault(entry["model"], {})[entry["steps"]] = _range_of(name, "constant")
    return by_model


MEASURED_CONSTANTS = _constants_by_model()
"""Lowest and highest displacement constant K by model and number of optimizer steps."""

CONSTANT_MODELS = sorted(MEASURED_CONSTANTS)
"""Models in whose runs the displacement constant was measured."""


def default_displacement_constants(steps: int | None = None) -> tuple[float, float]:
    """Return the range of the displacement constant K that was measured after a number of optimizer steps.

    Between two measured numbers of steps the ends are interpolated, log K in log steps. Outside of them the nearest
    measured number is used. The range covers all models that were measured.

    Args:
      steps: Number of optimizer steps; None covers all measured numbers of steps.

    Returns:
      Lowest and highest K, see `rora_theory.laws.displacement`.

    Raises:
      InputError: If the number of steps is not an integer of 1 or more.

    Examples:
      >>> [round(constant) for constant in default_displacement_constants(64)]
      [17, 167]
    """
    if steps is not None:
        check_integer("steps", steps)
    ranges = [_constants_of_model(model, steps) for model in MEASURED_CONSTANTS]
    return min(low for low, _ in ranges), max(high for _, high in ranges)


def _constants_of_model(model: str, steps: int | None) -> tuple[float, float]:
    """Return the range of K of one model, interpolated to a number of steps; None covers all measured numbers."""
    by_steps = MEASURED_CONSTANTS[model]
    if steps is None:
        return min(low for low, _ in by_steps.values()), max(high for _, high in by_steps.values())
    # Interpolate both ends in logarithms; beyond the measured numbers of steps the nearest value is used.
    counts = sorted(by_steps)
    log_steps = np.log(counts)
    log_lows, log_highs = ([math.log(by_steps[count][end]) for count in counts] for end in (0, 1))
    low = math.exp(np.interp(math.log(steps), log_steps, log_lows))
    high = math.exp(np.interp(math.log(steps), log_steps, log_highs))
    return low, high


MEASURED_SCHEDULE_FACTORS: dict[Schedule, tuple[float, float]] = {MEASURED_SCHEDULE: (1.0, 1.0)} | {
    entry["schedule"]: _range_of(name, "ratio")
    for name, entry in ENTRIES.items()
    if name.startswith("schedule_factor_")
}
"""Range of the best peak rate under a schedule, divided by the best constant rate, where it was measured.

An entry ``schedule_factor_NAME`` of `measured.json` with the keys ``schedule`` and ``ranges.ratio`` adds a schedule.
"""


def schedule_factors(old: Schedule, new: Schedule) -> tuple[float, float] | None:
    """Return the range of the factor by which the best peak rate changes with the schedule.

    Args:
      old: Schedule with which the rate was tuned.
      new: Schedule of the new run.

    Returns:
      Lowest and highest factor; None if one of the two schedules was not measured.
    """
    if old == new:
        return 1.0, 1.0
    if old not in MEASURED_SCHEDULE_FACTORS or new not in MEASURED_SCHEDULE_FACTORS:
        return None
    # Both factors are relative to a constant rate. The extremes of their ratio combine opposite ends.
    (old_low, old_high), (new_low, new_high) = MEASURED_SCHEDULE_FACTORS[old], MEASURED_SCHEDULE_FACTORS[new]
    return new_low / old_high, new_high / old_low


class MeasuredCost(NamedTuple):
    """Regret of the advised choice over pairs of measured settings, in nats per token.

    Attributes:
      pairs: Number of pairs of a tuned and a new setting.
      median: Median regret.
      largest: Largest regret.
      largest_error: Standard error of the largest regret.
    """

    pairs: int
    median: float
    largest: float
    largest_error: float


def measured_cost(changed: Collection[Changed]) -> MeasuredCost | None:
    """Return the regret of the advised choice in runs that differ from the tuned ones in the same settings.

    The choice is to keep the rate if only the rank changes, and the displacement law otherwise.

    Args:
      changed: Names of the quantities that differ between the tuned and the new setting.

    Returns:
      The regret; None if nothing changes.
    """
    name = "_".join(["cost", *(setting for setting in get_args(Changed) if setting in changed)])
    if name not in ENTRIES:
        return None
    columns = ENTRIES[name]["columns"]
    return MeasuredCost(*(columns[field] for field in MeasuredCost._fields))


_USE_RSLORA = ENTRIES["cost_of_use_rslora_at_the_tuned_rate"]["columns"]
COST_OF_USE_RSLORA = float(_USE_RSLORA["regret"])
"""Regret, in nats per token, of switching on ``use_rslora`` and keeping alpha 64 and the rate, after 64 steps."""
RANKS_OF_USE_RSLORA: tuple[int, int] = (_USE_RSLORA["old_rank"], _USE_RSLORA["rank"])
"""Tuned and new rank of the runs behind `COST_OF_USE_RSLORA`."""
