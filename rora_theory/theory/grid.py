"""The adapters whose first step is simulated: ranks, scaling rules, optimizers and laws of A, and how finely."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rora_theory.errors import InputError
from rora_theory.inits import INITS, Init
from rora_theory.random.seeds import check_seed
from rora_theory.scaling import Rule, scaling_factor
from rora_theory.stats.moments import log_log_fit
from rora_theory.theory import laws
from rora_theory.validation.ranges import Plural, Positive, check_ranges
from rora_theory.validation.rules import check_choices, check_ranks, check_rules, check_unread

if TYPE_CHECKING:
    import pandas as pd

RANKS = tuple(2**n for n in range(11))
"""1 to 1024: those that a verdict on growth is given over, unless a sweep has three or more of its own."""

MOST_DRAWS, LEAST_ERROR = 10**9, 5e-5
"""A second moment of n normal draws has the relative error sqrt(2 / n)."""

LARGEST_POWER = 18
"""Of ten, of a scaling or a step."""


@dataclass(frozen=True)
class StepGrid:
    """Adapters, and the precision their steps are to be known to.

    Raises:
      InputError: a value out of range.
    """

    ranks: tuple[int, ...] = RANKS
    """ranks of the adapter, each 1 or more"""
    rules: tuple[Rule, ...] = ("lora", "rora", 0.25)
    """scaling rules: lora, rora, rslora, or the exponent kappa of gamma = alpha / r^kappa"""
    optimizers: tuple[laws.Optimizer, ...] = ("sgd", "adam")
    """optimizers whose first step is taken"""
    inits: tuple[Init, ...] = ()
    """distributions of A; by default normal, the paper's N(0, 1), at random inputs, and kaiming_uniform, PEFT's
    default, in real layers"""
    alpha: Positive = 16.0
    """adapter strength, above 0"""
    lr: Positive = 1e-4
    """learning rate, above 0"""
    relative_error: Positive | None = None
    """draw until the relative standard error is this or less: of the second moment, by default 0.005; in real layers of
    the rms, by default 0.01"""
    draws: Plural | None = None
    """draw exactly this many times instead"""
    seed: int = 0
    """seed of all draws"""

    def __post_init__(self) -> None:
        check_ranks(self.ranks, fewest=1)
        check_rules(self.rules)
        for name, known, fewest in (("optimizers", laws.OPTIMIZERS, 1), ("inits", INITS, 0)):
            check_choices(f"--{name}", getattr(self, name), known, fewest=fewest)
        check_ranges(self)
        if self.relative_error is not None and self.relative_error < LEAST_ERROR:
            raise InputError(
                f"--relative-error is {self.relative_error}; accepted is {LEAST_ERROR:.0e} or more, which takes "
                f"some {MOST_DRAWS:,} draws"
            )
        if self.draws is not None:
            if self.draws > MOST_DRAWS:
                raise InputError(
                    f"--draws is {self.draws}; accepted are at most {MOST_DRAWS:,}: E[w^2] is then known to "
                    f"{LEAST_ERROR:.0e} of itself, a hundred times finer than by default"
                )
            check_unread(self, "relative_error", beside="--draws")
        check_seed(self.seed, "--seed")
        for rank, optimizer in itertools.product(self.ranks, self.optimizers):
            for _, gamma in self.scalings(rank):
                power = math.log10(self.lr) + laws.scaling_power(optimizer) * math.log10(gamma)
                if max(abs(power), abs(math.log10(gamma))) > LARGEST_POWER:
                    raise InputError(
                        f"--alpha {self.alpha:g} and --lr {self.lr:g} give gamma {gamma:.1e} and a step of "
                        f"1e{power:.0f} at rank {rank} under {optimizer}; accepted are 1e-{LARGEST_POWER} to "
                        f"1e{LARGEST_POWER}, whose squares float32 holds"
                    )

    def scalings(self, rank: int) -> Iterator[tuple[Rule, float]]:
        """Each rule with its gamma at a rank."""
        for rule in self.rules:
            yield rule, scaling_factor(rule, alpha=self.alpha, rank=rank)


def exponent_of(group: "pd.DataFrame") -> dict[str, float]:
    """The log-log ``slope`` of ``estimate`` against ``rank`` in a table, its ``standard_error``, and that of ``exact``.

    All NaN where there is one rank alone.
    """
    if len(group) < 2:
        return dict.fromkeys(("slope", "standard_error", "exact"), math.nan)
    ranks, estimates, errors, exact = (
        group[name].to_numpy(np.float64) for name in ("rank", "estimate", "standard_error", "exact")
    )
    return log_log_fit(ranks, estimates, errors)._asdict() | {"exact": log_log_fit(ranks, exact, 0 * exact).slope}
