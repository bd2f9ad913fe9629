"""Grid of short trainings over ranks, scaling rules and optimizers."""

from dataclasses import dataclass
from functools import partial

from rora_theory.laws.random.seeds import check_seed
from rora_theory.optimizers import OPTIMIZER_NAMES, OptimizerName
from rora_theory.scaling import Rule, check_choice, check_integer
from rora_theory.validation.ranges import check_ranges
from rora_theory.validation.rules import alpha_at, check_list, check_rules, check_steps


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
