"""Best learning rates measured in fine-tuning runs, which the advice quotes beside the law.

`measured.json` holds the rows of the published runs that are quoted. ``python docs/fill.py`` copies them from
``results/published``, and ``--check`` fails if they differ.
"""

import json
import math
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import numpy as np

from rora_theory.scaling import check_integer

ENTRIES: dict[str, dict[str, Any]] = json.loads(files("rora_theory.advice").joinpath("measured.json").read_text())
"""Entries of `measured.json` by name."""

ROWS: dict[str, dict[str, Any]] = {name: entry["columns"] for name, entry in ENTRIES.items() if "columns" in entry}
"""Quoted rows by name: how the best rate moves with the rank or with `gamma * r`, as a power."""


def _factor(row: Mapping[str, float]) -> str:
    """Format the change of the best rate from the first value to the second, with its 95% interval."""
    growth = row["second"] / row["first"]
    powers = (row["exponent"], row["exponent"] - row["half_width"], row["exponent"] + row["half_width"])
    value, low, high = (growth**power for power in powers)
    if row["exponent"] < 0:  # a fall, told as a factor above 1
        value, low, high = 1 / value, 1 / high, 1 / low
    return f"{value:.1f} ({low:.1f} to {high:.1f})"


def _highest(row: Mapping[str, float]) -> str:
    """Format the largest change that the law allows."""
    return f"{(row['second'] / row['first']) ** row['law_high']:.1f}"


_WHERE = "in SmolLM2-135M, the one model that was measured (AdamW, batches of 4, constant rate),"

MEASURED_RANKS = (
    f"Measured, {_WHERE} over 64 steps: the best rate was {_factor(ROWS['from_rank_8'])} times as high at rank 128 as "
    f"at rank 8, where the law allows 1 to {_highest(ROWS['from_rank_8'])}, and {_factor(ROWS['from_rank_32'])} times "
    f"as high as at rank 32, where it allows 1 to {_highest(ROWS['from_rank_32'])}."
)
"""Sentence on measured best rates of several ranks at one `gamma * r`, under Adam."""

MEASURED_STRENGTHS = (
    f"Measured, {_WHERE} where gamma r grew 11.3 times: the best rate fell {_factor(ROWS['strengths_64_steps'])} times "
    f"after 64 steps and {_factor(ROWS['strengths_256_steps'])} times after 256."
)
"""Sentence on measured best rates of one rank at two values of `gamma * r`, under Adam."""

MEASURED_POWERS = tuple(round(ROWS[name]["exponent"], 2) for name in ("strengths_64_steps", "strengths_256_steps"))
"""Exponents of the best rate in `gamma * r` after 64 and 256 steps."""


def default_displacement_constants(steps: int | None = None) -> tuple[float, float]:
    """Return the range of the displacement constant K that was measured after a number of optimizer steps.

    Between two measured numbers of steps the ends are interpolated, log K in log steps. Outside of them the nearest
    measured number is used. The range covers all models that were measured.

    Args:
      steps: Number of optimizer steps; None covers all measured numbers of steps.

    Returns:
      Lowest and highest K, see `rora_theory.theory.displacement`.

    Raises:
      InputError: If the number of steps is not an integer of 1 or more.

    Examples:
      >>> [round(constant) for constant in default_displacement_constants(64)]
      [88, 167]
    """
    if steps is not None:
        check_integer("steps", steps)
    ranges = [_constants_of_model(model, steps) for model in MEASURED_CONSTANTS]
    return min(low for low, _ in ranges), max(high for _, high in ranges)


def _constants_of_model(model: str, steps: int | None) -> tuple[float, float]:
    by_steps = MEASURED_CONSTANTS[model]
    if steps is None:
        return min(low for low, _ in by_steps.values()), max(high for _, high in by_steps.values())
    measured_steps = sorted(by_steps)
    low, high = (
        math.exp(
            np.interp(
                math.log(steps), np.log(measured_steps), [math.log(by_steps[count][end]) for count in measured_steps]
            )
        )
        for end in (0, 1)
    )
    return low, high


def _measured_constants() -> dict[str, dict[int, tuple[float, float]]]:
    by_model: dict[str, dict[int, tuple[float, float]]] = {}
    for name, entry in ENTRIES.items():
        if name.startswith("displacement_constant_"):
            low, high = entry["ranges"]["constant"]
            by_model.setdefault(entry["model"], {})[entry["steps"]] = (low, high)
    return by_model


MEASURED_CONSTANTS = _measured_constants()
"""Lowest and highest displacement constant K by model and number of optimizer steps."""

STEPS_EXPONENTS: tuple[float, float] = (
    round(ENTRIES["steps_exponents"]["ranges"]["exponent"][0], 1),
    round(ENTRIES["steps_exponents"]["ranges"]["exponent"][1], 1),
)
"""Lowest and highest exponent of the best rate in the number of steps, over conditions with two seeds or more.

Rounded to one decimal, since the standard errors are 0.03 to 0.3.
"""
