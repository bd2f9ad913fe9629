"""Grids over ranks, scaling rules and optimizers: of short trainings, and of simulated first steps."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from rora_theory.errors import InputError
from rora_theory.inits import INITS, Init
from rora_theory.laws.random.seeds import check_seed
from rora_theory.optimizers import OPTIMIZER_NAMES, OPTIMIZERS, Optimizer, OptimizerName, scaling_power
from rora_theory.scaling import Rule, check_choice, check_integer, scaling_factor
from rora_theory.stats.moments import log_log_fit
from rora_theory.validation.ranges import AtLeastTwo, Positive, check_ranges
from rora_theory.validation.rules import alpha_at, check_list, check_rules, check_steps, check_unread

if TYPE_CHECKING:
    import pandas as pd

RANKS = tuple(2**n for n in range(11))
"""Default ranks, 1 to 1024. Verdicts on growth use them unless a sweep has three or more ranks of its own."""

MAX_DRAWS, MIN_RELATIVE_ERROR = 10**9, 5e-5
"""Matching limits: the second moment of n normal draws has the relative standard error sqrt(2 / n)."""

FITTED = ("rank", "estimate", "standard_error", "exact")
"""Columns of a table of results to which `exponent_table` fits."""

MAX_EXPONENT_OF_TEN = 18
"""Largest decimal exponent of a scaling or a step: float32 can represent the square."""


@dataclass(frozen=True)
class RankGrid:
    """Trainings that differ in rank, scaling rule, optimizer and seed. All rules have one scaling at a reference rank.

    Raises:
      InputError: If a value is out of range.
    """

    ranks: tuple[int, ...]
    """Ranks of the adapter, at least two; they may exceed the layer's width"""
    rules: tuple[Rule, ...]
    """Scaling rules: lora, rora, rslora, or the exponent kappa of gamma = alpha / r^kappa"""
    optimizers: tuple[OptimizerName, ...]
    """Optimizers: sgd, momentum (0.9), adam, adamw (weight decay 0.01), at a constant learning rate"""
    steps: tuple[int, ...]
    """Numbers of updates after which to measure, in ascending order"""
    seeds: tuple[int, ...]
    """Seeds of the runs; error bars need two or more"""
    gamma: float = 1.0
    """Scaling factor of every rule at the reference rank"""
    reference_rank: int = 4
    """Rank at which all rules have the same scaling factor"""

    def __post_init__(self) -> None:
        check_list("ranks", self.ranks, check_integer, fewest=2)
        check_rules(self.rules, gamma=self.gamma, reference_rank=self.reference_rank)
        check_list("optimizers", self.optimizers, partial(check_choice, choices=OPTIMIZER_NAMES))
        check_steps(self.steps)
        check_list("seeds", self.seeds, check_seed, fewest=2)
        check_ranges(self)

    def alpha(self, rule: Rule) -> float:
        """Return the alpha of a rule."""
        return alpha_at(rule, gamma=self.gamma, reference_rank=self.reference_rank)


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
        check_list("ranks", self.ranks, check_integer)
        check_rules(self.rules)
        for name, known, fewest in (("optimizers", OPTIMIZERS, 1), ("inits", INITS, 0)):
            check_list(f"--{name}", getattr(self, name), partial(check_choice, choices=known), fewest=fewest)
        check_ranges(self)
        # Sampling stops at a precision or at a number of draws, whose limits match.
        if self.relative_error is not None and self.relative_error < MIN_RELATIVE_ERROR:
            raise InputError(
                f"relative_error must be at least {MIN_RELATIVE_ERROR:.0e} (about {MAX_DRAWS:,} draws), "
                f"got {self.relative_error}"
            )
        if self.draws is not None:
            if self.draws > MAX_DRAWS:
                raise InputError(
                    f"draws must be at most {MAX_DRAWS:,} (a relative error of {MIN_RELATIVE_ERROR:.0e} in E[w^2], "
                    f"one hundredth of the default), got {self.draws}"
                )
            check_unread(self, "relative_error", conflicts_with="draws")
        check_seed("seed", self.seed)
        # Size of every scaling and step, as decimal exponents.
        for rank, optimizer in itertools.product(self.ranks, self.optimizers):
            for _, gamma in self.scalings(rank):
                power = math.log10(self.lr) + scaling_power(optimizer) * math.log10(gamma)
                if max(abs(power), abs(math.log10(gamma))) > MAX_EXPONENT_OF_TEN:
                    raise InputError(
                        f"alpha {self.alpha:g} and lr {self.lr:g} give gamma {gamma:.1e} and a step of "
                        f"1e{power:.0f} at rank {rank} under {optimizer}. Both must be from "
                        f"1e-{MAX_EXPONENT_OF_TEN} to 1e{MAX_EXPONENT_OF_TEN}: float32 must represent their squares."
                    )

    def scalings(self, rank: int) -> Iterator[tuple[Rule, float]]:
        """Yield each rule with its scaling factor at a rank."""
        for rule in self.rules:
            yield rule, scaling_factor(rule, alpha=self.alpha, rank=rank)


def exponent_table(results: "pd.DataFrame", columns: Sequence[str], ranges: Sequence[Sequence[int]]) -> "pd.DataFrame":
    """Fit the log-log slopes of ``estimate`` and of ``exact`` against ``rank`` for every curve and range of ranks.

    Args:
      results: Table with the columns ``rank``, ``estimate``, ``standard_error`` and ``exact``.
      columns: Columns that identify a curve.
      ranges: Ranks of each fit, in ascending order.

    Returns:
      A row for each curve and range: the ``low`` and ``high`` rank, the ``slope`` of the estimates with its
      ``standard_error``, and the slope of ``exact``; NaN for fewer than two ranks.
    """
    import pandas as pd

    rows = []
    for (key, group), ranks in itertools.product(results.groupby(list(columns), sort=False), ranges):
        row = dict(zip(columns, key, strict=True)) | {"low": ranks[0], "high": ranks[-1]}
        row |= dict.fromkeys(("slope", "standard_error", "exact"), math.nan)
        if len(in_range := group[group["rank"].isin(ranks)]) > 1:
            x, y, errors, exact = (in_range[name].to_numpy(np.float64) for name in FITTED)
            row |= log_log_fit(x, y, errors)._asdict() | {"exact": log_log_fit(x, exact, 0 * exact).slope}
        rows.append(row)
    return pd.DataFrame(rows, columns=[*columns, "low", "high", "slope", "standard_error", "exact"])
