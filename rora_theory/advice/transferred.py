"""Alpha and learning rate of a tuned setting at another rank: the numbers of the advice.

Three laws give them. Under Adam with PEFT's default initialisation the learning rate follows
`rora_theory.advice.best_rate`, whose constants were measured. Under SGD, and under Adam with another initialisation,
they preserve the first step exactly (`rora_theory.advice.setting.step_ratio`), and the limit of a long run is reported
with them. In a measured regime, or if cross-talk dominates, they preserve the first step of the single modules.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import inf, isclose
from typing import NamedTuple

from rora_theory.advice.best_rate import RateRange
from rora_theory.advice.constants import CONSTANTS, MEASURED_GAINS, MEASURED_RANKS, MEASURED_STEPS
from rora_theory.advice.modules import Module, ModuleGroup, ModuleSpread, compute_geometric_mean, group_by_type
from rora_theory.advice.run_change import RunChange
from rora_theory.advice.setting import SIGNAL, Setting, step_ratio
from rora_theory.errors import InputError
from rora_theory.laws import constant_gradient
from rora_theory.laws.displacement import has_displacement_ratio
from rora_theory.optimizers import FAMILY
from rora_theory.scaling import KAPPAS, Rule, alpha_for, exponent, scaling_factor


class HorizonLimits(NamedTuple):
    """Value that preserves the change of the model, at both ends of training.

    Attributes:
      first_step: Value for the first step, when B alone has moved.
      long_run: Value for a long run, in which the motion of A dominates.
    """

    first_step: float
    long_run: float


@dataclass(frozen=True)
class Alternative:
    """Effect of a common choice at the new rank, and the learning rate that it needs.

    Attributes:
      name: Name of the choice.
      setting: New setting with the tuned learning rate.
      step: Factor by which the first update changes, over modules.
      learning_rate: Learning rate to use with this choice.
      rate_range: Learning rate with its range by the displacement law; None where that law does not apply.
      rate_limits: Learning rate for the first step and for a long run; None where only the first step is covered, and
        where the displacement law applies.
    """

    name: str
    setting: Setting
    step: ModuleSpread
    learning_rate: float
    rate_range: RateRange | None
    rate_limits: HorizonLimits | None


@dataclass(frozen=True)
class TransferredSetting:
    """Tuned setting transferred to another rank. `alpha` and `learning_rate` belong together: set both.

    Attributes:
      old: Tuned setting.
      unchanged: Tuned setting at the new rank and rule, with the tuned learning rate, and with the requested alpha or
        else the tuned one.
      modules: Alpha and learning rate that preserve the first step of each module.
      regime: ``"signal"``, ``"cross-talk"`` or ``"measured"``.
      fixes_alpha: Whether an alpha was requested, so that the learning rate compensates.
      run: Number of steps and schedule of the two runs.
    """

    old: Setting
    unchanged: Setting
    modules: tuple[Module, ...]
    regime: str
    fixes_alpha: bool = False
    run: RunChange = field(default_factory=RunChange)

    @property
    def is_sgd(self) -> bool:
        """Whether the optimizer is SGD, with or without momentum."""
        return FAMILY[self.old.optimizer] == "sgd"

    @property
    def is_rslora(self) -> bool:
        """Whether the new rule is ``alpha / sqrt(r)``, PEFT's ``use_rslora``."""
        return exponent(self.unchanged.rule) == KAPPAS["rslora"]

    @property
    def follows_displacement_law(self) -> bool:
        """Whether the displacement law gives the learning rate."""
        return self.regime == "signal" and uses_displacement_law(self.old)

    @property
    def alpha_at_old_rate(self) -> float:
        """Alpha for all modules that preserves the first step at the tuned rate: the geometric mean over modules."""
        return compute_geometric_mean([module.alpha for module in self.modules])

    @property
    def rate_at_alpha(self) -> float:
        """Learning rate for all modules that preserves the first step at the alpha of `unchanged`."""
        return compute_geometric_mean([module.learning_rate for module in self.modules])

    @property
    def alpha(self) -> float:
        """Alpha to set under the new rule, so with ``use_rslora`` under that; see `lora_alpha`."""
        return self.unchanged.alpha if self.fixes_alpha else self.alpha_at_old_rate

    @property
    def lora_alpha(self) -> float:
        """Alpha to set under ``alpha / r``, which gives the same adapter as `alpha` under the new rule."""
        return self.lora_alpha_of(self.alpha)

    def lora_alpha_of(self, alpha: float) -> float:
        """Convert an alpha under the new rule to ``alpha / r`` with the same gamma."""
        scaling = scaling_factor(self.unchanged.rule, alpha=alpha, rank=self.unchanged.rank)
        return alpha_for("lora", scaling=scaling, rank=self.unchanged.rank)

    @property
    def learning_rate(self) -> float:
        """Learning rate to set."""
        if self.rate_range is not None:
            return self.rate_range.best
        return self.rate_at_alpha if self.fixes_alpha else self.old.learning_rate

    @cached_property
    def rate_range(self) -> RateRange | None:
        """Learning rate with its range by the displacement law; None where that law does not apply."""
        return self.rate_range_of(replace(self.unchanged, alpha=self.alpha))

    @property
    def setting(self) -> Setting:
        """New setting in full."""
        return replace(self.unchanged, alpha=self.alpha, learning_rate=self.learning_rate)

    def rate_range_of(self, new: Setting) -> RateRange | None:
        """Compute the learning rate of a new setting by the displacement law; None where it does not apply."""
        if not self.follows_displacement_law:
            return None
        # A gain that differs by rounding alone leaves the rate as it is, to the last digit.
        if isclose(self.old.gain, new.gain):
            new = new.with_scaling(self.old.gain / new.rank)
        # The law divides its constant by the gain, which a tiny alpha lets overflow.
        given, published = self.run.displacement_constant, CONSTANTS["displacement_constant"].value
        for setting in (self.old, new):
            if not has_displacement_ratio(setting.gain, published if given is None else given):
                raise InputError(
                    f"alpha must not be as small as {setting.alpha!r}: the displacement constant over the gain, "
                    f"{setting.gain:g}, is not representable as a float. Use a larger alpha."
                )
        return self.run.transfer_rate(self.old, new)

    @property
    def alpha_limits(self) -> HorizonLimits | None:
        """Alpha at the tuned learning rate for the first step and for a long run; None where `rate_limits` is None."""
        if not self._has_limits:
            return None
        # A long run is preserved by the same gamma under SGD, and by the same gamma r under Adam (`rate_limits_of`).
        if self.is_sgd:
            return HorizonLimits(self.alpha_at_old_rate, self.unchanged.with_scaling(self.old.scaling).alpha)
        long_run = self.unchanged.with_scaling(self.old.gain / self.unchanged.rank).alpha
        return HorizonLimits(self.alpha_at_old_rate, long_run)

    @property
    def rate_limits(self) -> HorizonLimits | None:
        """Learning rate at the alpha of `unchanged` for the first step and for a long run.

        None where the displacement law applies, and where the law covers the first step only.
        """
        return self.rate_limits_of(self.unchanged)

    def rate_limits_of(self, new: Setting) -> HorizonLimits | None:
        """Compute the learning rates of a new setting, see `rate_limits`."""
        if not self._has_limits:
            return None
        tuned = self.old.learning_rate
        first_step = tuned / step_ratio(replace(new, learning_rate=tuned), self.old, SIGNAL)
        if self.is_sgd:
            # Both factors grow as the exponential of gamma times the rate: their product is preserved.
            return HorizonLimits(first_step, tuned * self.old.scaling / new.scaling)
        # The motion of A does not depend on its start: gamma r alone decides.
        return HorizonLimits(first_step, tuned * constant_gradient.rate_factor(new.gain / self.old.gain, inf))

    def step_ratios(self, new: Setting) -> dict[str, float]:
        """Return the factor by which each module's first update changes under a new setting."""
        return {module.name: step_ratio(new, self.old, module.linear_term) for module in self.modules}

    def alternative(self, name: str, new: Setting) -> Alternative:
        """Compute the effect of a new setting, and the learning rate that it needs."""
        step = ModuleSpread.from_values(list(self.step_ratios(new).values()))
        rate_range = self.rate_range_of(new)
        learning_rate = new.learning_rate / step.mean if rate_range is None else rate_range.best
        return Alternative(name, new, step, learning_rate, rate_range, self.rate_limits_of(new))

    def alternatives(self) -> tuple[Alternative, ...]:
        """Compute the effect of common choices at the new rank.

        The choices are the tuned alpha, alpha = r and alpha = 2r. Each has a row under the tuned rule and one with
        PEFT's ``use_rslora`` switched, or two if the tuned rule is neither of PEFT's.
        """
        rank = self.unchanged.rank
        alphas = {f"alpha = {self.old.alpha:g}, unchanged": self.old.alpha, "alpha = r": rank, "alpha = 2r": 2 * rank}
        rules: dict[str, Rule] = {"": self.old.rule}
        switched: dict[str, Rule] = {", without use_rslora": "lora", ", use_rslora": "rslora"}
        rules |= {suffix: rule for suffix, rule in switched.items() if exponent(rule) != exponent(self.old.rule)}
        return tuple(
            self.alternative(name + suffix, replace(self.unchanged, alpha=float(alpha), rule=rule))
            for name, alpha in alphas.items()
            for suffix, rule in rules.items()
        )

    def groups(self) -> tuple[ModuleGroup, ...]:
        """Summarise all modules, then each type of module over its layers. An assumed regime has one group."""
        return group_by_type(self.modules)

    @property
    def changed(self) -> tuple[str, ...]:
        """Names of what differs between the tuned and the new run: rank, gain, steps, schedule, batch_size."""
        is_other_gain = not isclose(self.old.gain, self.setting.gain)
        by_setting = {"rank": self.old.rank != self.unchanged.rank, "gain": is_other_gain}
        return (*(name for name, is_different in by_setting.items() if is_different), *self.run.changed)

    @property
    def outside(self) -> tuple[str, ...]:
        """Settings that lie outside the measured range, as phrases; empty where only the first step has a law."""
        if not self.follows_displacement_law:
            return ()
        run = self.run
        phrases = [
            _describe_outside("rank", (self.old.rank, self.unchanged.rank), MEASURED_RANKS),
            _describe_outside("scaling times rank", (self.old.gain, self.setting.gain), MEASURED_GAINS),
            # One model, the smallest, was also run for longer.
            _describe_outside("steps", (run.steps, run.to_steps), MEASURED_STEPS, "measured in several models"),
        ]
        return tuple(phrase for phrase in phrases if phrase)

    @property
    def _has_limits(self) -> bool:
        return self.regime == "signal" and not self.follows_displacement_law


def uses_displacement_law(setting: Setting) -> bool:
    """Return whether the best rates of such a setting were measured: Adam with PEFT's default initialisation."""
    return FAMILY[setting.optimizer] == "adam" and setting.init == "kaiming_uniform"


def _describe_outside(
    label: str, values: Sequence[float | None], limits: tuple[float, float], evidence: str = "measured"
) -> str:
    """Name the values outside a measured range in a phrase, empty if there are none. None is an unknown value."""
    low, high = limits
    margin = 1e-3  # published gains are rounded to integers
    known_values = {value for value in values if value is not None}
    outside_values = sorted(value for value in known_values if not low * (1 - margin) <= value <= high * (1 + margin))
    if not outside_values:
        return ""
    # Values that print alike are listed once.
    numbers = " and ".join(dict.fromkeys(f"{value:.6g}" for value in outside_values))
    return f"{label} {numbers} ({evidence}: {low:.4g} to {high:.4g})"
