"""Grid of simulated first steps: ranks, scaling rules, optimizers, initialisations and the required precision."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from rora_theory.errors import InputError
from rora_theory.inits import INITS, Init
from rora_theory.laws.random.seeds import check_seed
from rora_theory.optimizers import OPTIMIZERS, Optimizer, scaling_power
from rora_theory.scaling import Rule, check_choice, check_integer, scaling_factor
from rora_theory.stats.moments import log_log_fit
from rora_theory.validation.ranges import AtLeastTwo, Positive, check_ranges
from rora_theory.validation.rules import check_list, check_rules, check_unread

if TYPE_CHECKING:
    import pandas as pd

RANKS = tuple(2**n for n in range(11))
"""Default ranks, 1 to 1024. Verdicts on growth use them unless a sweep has three or more ranks of its own."""

MAX_DRAWS, MIN_RELATIVE_ERROR = 10**9, 5e-5
"""Matching limits: the second moment of n normal draws has the relative standard error sqrt(2 / n)."""

MAX_EXPONENT_OF_TEN = 18
"""Largest decimal exponent of a scaling or a step: float32 can represent the square."""


@dataclass(frozen=True)
class StepGrid:
    """Adapters to simulate, and the precision to reach.

    Raises:
      InputError: If a value is out of range.
    """

    ranks: tuple[int, ...] = RANKS
    """Ranks of the adapter, each 1 or more"""
    rules: tuple[Rule, ...] = ("lora", "rora", 0.25)
    """Scaling rules: lora, rora, rslora, or the exponent kappa of gamma = alpha / r^kappa"""
    optimizers: tuple[Optimizer, ...] = ("sgd", "adam")
    """Optimizers of the first step: sgd, adam"""
    inits: tuple[Init, ...] = ()
    """Initialisations of A. Default: normal, the paper's N(0, 1), for random inputs; kaiming_uniform, PEFT's default,
    for layers of a model"""
    alpha: Positive = 16.0
    """Alpha of the adapter, above 0"""
    lr: Positive = 1e-4
    """Learning rate, above 0"""
    relative_error: Positive | None = None
    """Relative standard error at which sampling stops. Default: 0.005 of the second moment for random inputs; 0.01 of
    the rms for layers of a model"""
    draws: AtLeastTwo | None = None
    """Exact number of draws, instead of a relative error"""
    seed: int = 0
    """Seed of the random draws"""

    def __post_init__(self) -> None:
        check_list("--ranks", self.ranks, check_integer)
        check_rules(self.rules)
        for name, known, fewest in (("optimizers", OPTIMIZERS, 1), ("inits", INITS, 0)):
            check_list(f"--{name}", getattr(self, name), partial(check_choice, choices=known), fewest=fewest)
        check_ranges(self)
        # Sampling stops at a precision or at a number of draws, whose limits match.
        if self.relative_error is not None and self.relative_error < MIN_RELATIVE_ERROR:
            raise InputError(
                f"--relative-error must be at least {MIN_RELATIVE_ERROR:.0e} (about {MAX_DRAWS:,} draws), "
                f"got {self.relative_error}"
            )
        if self.draws is not None:
            if self.draws > MAX_DRAWS:
                raise InputError(
                    f"--draws must be at most {MAX_DRAWS:,} (a relative error of {MIN_RELATIVE_ERROR:.0e} in E[w^2], "
                    f"one hundredth of the default), got {self.draws}"
                )
            check_unread(self, "relative_error", conflicts_with="--draws")
        check_seed("--seed", self.seed)
        # Size of every scaling and step, as decimal exponents.
        for rank, optimizer in itertools.product(self.ranks, self.optimizers):
            for _, gamma in self.scalings(rank):
                power = math.log10(self.lr) + scaling_power(optimizer) * math.log10(gamma)
                if max(abs(power), abs(math.log10(gamma))) > MAX_EXPONENT_OF_TEN:
                    raise InputError(
                        f"--alpha {self.alpha:g} and --lr {self.lr:g} give gamma {gamma:.1e} and a step of "
                        f"1e{power:.0f} at rank {rank} under {optimizer}. Both must be from "
                        f"1e-{MAX_EXPONENT_OF_TEN} to 1e{MAX_EXPONENT_OF_TEN}: float32 must represent their squares."
                    )

    def scalings(self, rank: int) -> Iterator[tuple[Rule, float]]:
        """Yield each rule with its scaling factor at a rank."""
        for rule in self.rules:
            yield rule, scaling_factor(rule, alpha=self.alpha, rank=rank)


def fit_exponent(group: "pd.DataFrame") -> dict[str, float]:
    """Fit the log-log slope of ``estimate`` and of ``exact`` against ``rank`` in a table.

    Args:
      group: Table with the columns ``rank``, ``estimate``, ``standard_error`` and ``exact``.

    Returns:
      The ``slope`` of the estimates, its ``standard_error``, and the slope of ``exact``; NaN for fewer than two ranks.
    """
    if len(group) < 2:
        return dict.fromkeys(("slope", "standard_error", "exact"), math.nan)
    ranks, estimates, errors, exact = (
        group[name].to_numpy(np.float64) for name in ("rank", "estimate", "standard_error", "exact")
    )
    return log_log_fit(ranks, estimates, errors)._asdict() | {"exact": log_log_fit(ranks, exact, 0 * exact).slope}
