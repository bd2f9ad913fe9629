"""Best learning rates measured in fine-tuning runs, which the advice quotes beside the law.

`measured.json` holds the rows of the published runs that are quoted. ``python docs/fill.py`` copies them from
``results/published``, and ``--check`` fails if they differ.
"""

import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

ROWS: dict[str, dict[str, Any]] = {
    name: entry["columns"]
    for name, entry in json.loads(files("rora_theory.advice").joinpath("measured.json").read_text()).items()
}
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
