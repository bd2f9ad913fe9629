"""Constants of the advice, each with its spread and the runs that it comes from.

`constants.json` holds all values. ``python docs/fill.py`` copies them from ``results/published``, where
``benchmarks/advice_constants.py`` fits them, and ``--check`` fails if they differ.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

ENTRIES: dict[str, dict[str, Any]] = json.loads(files("rora_theory.advice").joinpath("constants.json").read_text())
"""Entries of `constants.json` by name."""


@dataclass(frozen=True)
class Constant:
    """Constant of the law of the best rate.

    Attributes:
      value: Central value.
      spread: Standard deviation over models and settings, in the unit of the value.
      source: Models and runs that the constant comes from, in words.
    """

    value: float
    spread: float
    source: str


def _constants(prefix: str) -> dict[str, Constant]:
    return {
        name.removeprefix(prefix): Constant(
            entry["columns"]["value"], entry["columns"]["spread"], entry["columns"]["source"]
        )
        for name, entry in ENTRIES.items()
        if name.startswith(prefix)
    }


CONSTANTS: Mapping[str, Constant] = _constants("constant_")
"""Constants by name.

- ``displacement_constant``: K of the displacement law; its spread is that of log K.
- ``gain_exponent``: spread of the exponent in G around the displacement law.
- ``rank_exponent``: exponent of the best rate in the rank at one G.
- ``steps_exponent``: exponent in the number of optimizer steps.
- ``batch_exponent``: exponent in the number of records of a step, at one number of steps.
- ``pair``: spread of the logarithm of a ratio of two best rates, whatever changes between them.
"""

SCHEDULE_FACTORS: Mapping[str, Constant] = {"constant": Constant(1.0, 0.0, "definition")} | _constants("factor_")
"""Best peak rate under a schedule over the best constant rate, by schedule; the spread is that of its logarithm."""

EVIDENCE: Mapping[str, Mapping[str, Any]] = {
    name.removeprefix("evidence_"): entry["columns"] for name, entry in ENTRIES.items() if name.startswith("evidence_")
}
"""Regrets in the public sweeps and in our runs that sentences quote, by name."""

GROWTH: Mapping[str, Mapping[str, Any]] = {
    name.removeprefix("growth_"): entry["columns"] for name, entry in ENTRIES.items() if name.startswith("growth_")
}
"""Regrets in the public sweep with alpha = r by the factor by which the gain changes."""

MEASURED_RANKS: tuple[int, int] = tuple(ENTRIES["measured_settings"]["ranges"]["rank"])
"""Lowest and highest rank of the runs behind the constants."""

MEASURED_GAINS: tuple[float, float] = tuple(ENTRIES["measured_settings"]["ranges"]["gain"])
"""Lowest and highest gain of those runs."""

MEASURED_STEPS: tuple[int, int] = tuple(ENTRIES["measured_settings"]["ranges"]["steps"])
"""Lowest and highest number of optimizer steps of those runs."""
