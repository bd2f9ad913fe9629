"""Results of fine-tuning runs that a probe of the learning rate uses: exponents in the steps, and regret.

`constants.json` holds the values. ``python docs/fill.py`` copies them from ``results/published``, and ``--check`` fails
if they differ.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal, NamedTuple

from rora_theory.optimizers import Schedule

ENTRIES: dict[str, dict[str, Any]] = json.loads(files("rora_theory.advice").joinpath("constants.json").read_text())
"""Entries of `constants.json` by name."""

ROWS: dict[str, dict[str, Any]] = {name: entry["columns"] for name, entry in ENTRIES.items() if "columns" in entry}
"""Values of the entries that quote one row, by name."""


def _range_of(entry: str, column: str) -> tuple[float, float]:
    low, high = ENTRIES[entry]["ranges"][column]
    return low, high


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
        """Return the interval of an entry ``from_rank_*`` of `constants.json`."""
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
