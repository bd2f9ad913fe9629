"""Alpha and learning rate that preserve the first step of single modules, and their summaries over modules."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Literal, NamedTuple

ALL = "all modules"
"""Name of the only module of an assumed regime."""

AlphaGrouping = Literal["one", "type", "module"]
"""Modules that share an alpha: all of them, those of one type, or none."""


@dataclass(frozen=True)
class Module:
    """Alpha and learning rate that preserve the size of one module's first update.

    Attributes:
      name: Name of the module.
      linear_term: Linear term c of the module, see `rora_theory.advice.setting`.
      alpha: Alpha that preserves the update at the tuned learning rate.
      learning_rate: Learning rate that preserves the update at the new setting's alpha.
      step_ratio: Factor by which the update changes if alpha and learning rate stay as they are.
    """

    name: str
    linear_term: float
    alpha: float
    learning_rate: float
    step_ratio: float


def compute_geometric_mean(values: Sequence[float]) -> float:
    """Compute the geometric mean of positive numbers, without rounding if all are equal.

    Examples:
      >>> compute_geometric_mean([0.0003125]), round(compute_geometric_mean([2.0, 8.0]), 9)
      (0.0003125, 4.0)
    """
    smallest = min(values)
    return smallest if smallest == max(values) else geometric_mean(values)


class ModuleSpread(NamedTuple):
    """Summary of a positive quantity over modules.

    Attributes:
      mean: Geometric mean.
      smallest: Smallest value.
      largest: Largest value.
    """

    mean: float
    smallest: float
    largest: float

    @classmethod
    def from_values(cls, values: Sequence[float]) -> "ModuleSpread":
        """Summarise one value or more, each above 0."""
        return cls(compute_geometric_mean(values), min(values), max(values))

    def __format__(self, form: str) -> str:
        """Format the mean, followed by the two ends if they differ.

        Examples:
          >>> f"{ModuleSpread(4.0, 2.0, 8.0):.2g}, {ModuleSpread(4.0, 4.0, 4.0):.2g}"
          '4 (2 to 8), 4'
        """
        are_equal = self.largest - self.smallest < 1e-9 * self.largest
        return format(self.mean, form) + ("" if are_equal else f" ({self.smallest:.3g} to {self.largest:.3g})")


class ModuleGroup(NamedTuple):
    """Summary of `Module` over the modules of one type, or over all.

    Attributes:
      name: Type of the modules, or `ALL`.
      alpha: Alphas that preserve the first update at the tuned learning rate.
      learning_rate: Learning rates that preserve it at the new setting's alpha.
      step_ratio: Factors by which the update changes if alpha and learning rate stay as they are.
    """

    name: str
    alpha: ModuleSpread
    learning_rate: ModuleSpread
    step_ratio: ModuleSpread

    @classmethod
    def from_modules(cls, name: str, modules: Sequence[Module]) -> "ModuleGroup":
        """Summarise one module or more under a name."""
        return cls(
            name,
            ModuleSpread.from_values([module.alpha for module in modules]),
            ModuleSpread.from_values([module.learning_rate for module in modules]),
            ModuleSpread.from_values([module.step_ratio for module in modules]),
        )


def group_by_type(modules: Sequence[Module]) -> tuple[ModuleGroup, ...]:
    """Summarise all modules, then those of each type (``q_proj``, ...) over the layers."""
    by_type: dict[str, list[Module]] = {ALL: list(modules)}
    for module in modules:
        by_type.setdefault(module.name.rpartition(".")[2], []).append(module)
    return tuple(ModuleGroup.from_modules(name, members) for name, members in by_type.items())
