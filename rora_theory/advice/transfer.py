r"""What alpha, or what learning rate, keeps the change of the model the same when the rank changes.

At the first step `rora_theory.advice.setting.step_ratio` is exact in any regime. Under Adam A moves too from then on.
Where the signal leads, the change after many steps at a constant gradient (`rora_theory.theory.horizon`) is

.. math:: \propto \gamma r\, \eta\, s\, (1 + \rho)

with s the deviation of A's entries and rho the distance that A has moved over the takeover distance, which is
proportional to s. So the answer lies between two ends: B-led, the first step's, and A-led, which a long run comes to.
The planned steps, the rate and a takeover distance give the value between them. Under SGD both factors grow as the
exponential of :math:`\gamma \eta` times the steps and a singular value of the gradient: in a long run only the product
of gamma and the rate counts (`horizon.sgd_rate_exponents`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import inf, isclose, isinf
from statistics import geometric_mean
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from rora_theory import inits
from rora_theory.adapter_config import PEFT_INITS, TaskType, check_task_type, peft_targets
from rora_theory.advice.measured import MEASURED_POWERS, MEASURED_RANKS, MEASURED_STRENGTHS
from rora_theory.advice.setting import REGIMES, SIGNAL, Setting, check_linear_term, check_setting, step_ratio
from rora_theory.errors import InputError, shown
from rora_theory.optimizers import DISPLAY_NAMES, FAMILY
from rora_theory.scaling import KAPPAS, Rule, alpha_for, check_integer, check_positive, exponent, scaling_factor
from rora_theory.theory import horizon

ALL = "all modules"
"""Name of the one module of an assumed regime."""

MEASURED_GROWTH = 12.0
"""Largest change in `gamma * r`, or its inverse, for which a rate from the measured exponents is advised."""

MEASURED_STEPS = 16
"""Least number of steps of a planned run for which a rate from the measured exponents is advised."""

LONGEST = "No run was longer than 256 steps."

MOST_STEPS = 10**7
"""Of a planned run: each is reckoned."""

Per = Literal["one", "type", "module"]
"""Which modules share an alpha: all, those of a type, or each layer's module has its own."""


@dataclass(frozen=True)
class Module:
    """What keeps one module's first step.

    Attributes:
      name: of the module.
      linear_term: c.
      alpha: at the old rate.
      learning_rate: at the old alpha.
      unchanged: the step's factor where alpha and rate stay as they are.
    """

    name: str
    linear_term: float
    alpha: float
    learning_rate: float
    unchanged: float


def mean_of(factors: Sequence[float]) -> float:
    """The geometric mean of one factor or more, each above 0; of equal ones it is that factor, to the last digit.

    Examples:
      >>> mean_of([0.0003125]), round(mean_of([2.0, 8.0]), 9)
      (0.0003125, 4.0)
    """
    smallest = min(factors)
    return smallest if smallest == max(factors) else geometric_mean(factors)


class Range(NamedTuple):
    """Of a figure of some modules the geometric mean, the smallest and the largest."""

    mean: float
    smallest: float
    largest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Range":
        """Of one value or more, each above 0."""
        return cls(mean_of(values), min(values), max(values))

    def __format__(self, form: str) -> str:
        """The mean in this form, and the two ends where they differ.

        Examples:
          >>> f"{Range(4.0, 2.0, 8.0):.2g}, {Range(4.0, 4.0, 4.0):.2g}"
          '4 (2 to 8), 4'
        """
        same = self.largest - self.smallest < 1e-9 * self.largest
        return format(self.mean, form) + ("" if same else f" ({self.smallest:.3g} to {self.largest:.3g})")


class ModuleGroup(NamedTuple):
    """What keeps the first step of some modules, see `Module`.

    Attributes:
      name: `ALL`, or the modules' type.
      alpha, learning_rate, unchanged: over the modules.
    """

    name: str
    alpha: Range
    learning_rate: Range
    unchanged: Range


class Span(NamedTuple):
    """A value that keeps the change, by what leads at the end of the run.

    Attributes:
      first_step: B alone has moved.
      planned: at the planned horizon; None where no run is planned.
      A_led: A's motion leads, as in a long run.
    """

    first_step: float
    planned: float | None
    A_led: float

    @property
    def best(self) -> float:
        """The planned one where it is known, else the first step's."""
        return self.first_step if self.planned is None else self.planned


@dataclass(frozen=True)
class PlannedRun:
    """A run that is planned with the tuned setting.

    Attributes:
      steps: of the run.
      takeover: distance of A at which its part is as large as B's, at the tuned rank.
      is_assumed: whether the takeover distance is one sample's by the law, not a measured one.
      schedule: whether a schedule was stated; otherwise the rate is constant.
      rho: A-led over B-led part at the end.
    """

    steps: int
    takeover: float
    is_assumed: bool
    schedule: bool
    rho: float


@dataclass(frozen=True)
class Alternative:
    """What one choice would do, over all modules.

    Attributes:
      name: of the choice.
      setting: it in full.
      step: factor of the first step against the tuned setting's: the geometric mean over modules.
      smallest, largest: of the modules' factors.
      learning_rate: the rate that would undo the mean factor.
      rates: the rate by horizon, where the law has one (the signal leads).
    """

    name: str
    setting: Setting
    step: float
    smallest: float
    largest: float
    learning_rate: float
    rates: Span | None

    @property
    def steps(self) -> Range:
        """The factor with its two ends."""
        return Range(self.step, self.smallest, self.largest)


@dataclass(frozen=True)
class Advice:
    """A tuned setting carried to another rank. `alpha` and `learning_rate` belong together: set both.

    Attributes:
      old: what was tuned.
      unchanged: its rate, and its alpha or the one that was asked for, at the new rank and rule.
      modules: what keeps each module's first step.
      regime: ``"signal"``, ``"cross-talk"`` or ``"measured"``.
      fixes_alpha: whether an alpha was asked for, so that the rate makes up for it; otherwise the rate stays.
      plan: the run that is planned, or None.
    """

    old: Setting
    unchanged: Setting
    modules: tuple[Module, ...]
    regime: str
    fixes_alpha: bool = False
    plan: PlannedRun | None = None

    @property
    def alpha_at_old_rate(self) -> float:
        """The one alpha for all modules that keeps the first step: the geometric mean of theirs."""
        return mean_of([module.alpha for module in self.modules])

    @property
    def rate_at_alpha(self) -> float:
        """The one learning rate for all modules, at the alpha of `unchanged`, that keeps the first step."""
        return mean_of([module.learning_rate for module in self.modules])

    @property
    def alphas(self) -> Span | None:
        """The alpha at the old rate by horizon; None where the law is of the first step only."""
        if not self._has_horizon:
            return None
        if self._is_sgd:
            return Span(self.alpha_at_old_rate, None, self.unchanged.with_scaling(self.old.scaling).alpha)

        def alpha(rho: float) -> float:
            factor = 1 / self._strength(self.unchanged, rho)
            return self.unchanged.with_scaling(self.unchanged.scaling * factor).alpha

        return self._span(alpha)

    @property
    def rates(self) -> Span | None:
        """The learning rate at the alpha of `unchanged`, likewise."""
        return self.rates_of(self.unchanged)

    def rates_of(self, new: Setting) -> Span | None:
        """The learning rate with which ``new`` keeps the change, by horizon."""
        if not self._has_horizon:
            return None
        if self._is_sgd:
            tuned = self.old.learning_rate
            first = tuned / step_ratio(replace(new, learning_rate=tuned), self.old, SIGNAL)
            return Span(first, None, tuned * self.old.scaling / new.scaling)
        ratio = self._deviation(self.old) / self._deviation(new)

        def rate(rho: float) -> float:
            return self.old.learning_rate * horizon.rate_factor(self._strength(new, rho), rho * ratio)

        return self._span(rate)

    @property
    def alpha(self) -> float:
        """The alpha to set."""
        if self.fixes_alpha:
            return self.unchanged.alpha
        return self.alpha_at_old_rate if self.alphas is None else self.alphas.best

    @property
    def is_rslora(self) -> bool:
        """Whether the new rule is ``alpha / sqrt(r)``, PEFT's ``use_rslora``."""
        return exponent(self.unchanged.rule) == KAPPAS["rslora"]

    @property
    def lora_alpha(self) -> float:
        """Alpha under ``alpha / r`` that gives the same adapter as `alpha` under the new rule."""
        return self._lora_alpha(self.alpha)

    @property
    def measured_rates(self) -> tuple[float, float] | None:
        """Lowest and highest learning rate at the alpha of `unchanged` by the measured exponents of best rates.

        None where the measured runs do not apply: a change in `gamma * r` by `MEASURED_GROWTH` or more, a planned run
        shorter than `MEASURED_STEPS`, SGD, another initialisation than PEFT's default, a regime other than the signal.
        """
        growth = self._strength(self.unchanged, 0.0)
        is_covered = self._was_measured and 1 / MEASURED_GROWTH < growth < MEASURED_GROWTH and not isclose(growth, 1)
        if not is_covered or (self.plan is not None and self.plan.steps < MEASURED_STEPS):
            return None
        low, high = sorted(self.old.learning_rate * growth**power for power in MEASURED_POWERS)
        return low, high

    @property
    def law_rate(self) -> float:
        """Learning rate at the alpha of `unchanged` by the law, for the planned run or else for the first step."""
        return self.rate_at_alpha if self.rates is None else self.rates.best

    @property
    def learning_rate(self) -> float:
        """The learning rate to set.

        At a fixed alpha it is the geometric mean of `measured_rates`, or `law_rate` where these are None.
        """
        if not self.fixes_alpha:
            return self.old.learning_rate
        return self.law_rate if self.measured_rates is None else geometric_mean(self.measured_rates)

    @property
    def setting(self) -> Setting:
        """The new setting in full."""
        return replace(self.unchanged, alpha=self.alpha, learning_rate=self.learning_rate)

    def step_ratios(self, new: Setting) -> dict[str, float]:
        """Each module's `step_ratio` under ``new``."""
        return {module.name: step_ratio(new, self.old, module.linear_term) for module in self.modules}

    def alternative(self, name: str, new: Setting) -> Alternative:
        """What ``new`` would do."""
        steps = list(self.step_ratios(new).values())
        mean = mean_of(steps)
        return Alternative(name, new, mean, min(steps), max(steps), new.learning_rate / mean, self.rates_of(new))

    def alternatives(self) -> tuple[Alternative, ...]:
        """A row for each common choice at the new rank and old rate: under the tuned rule, which is not named, and with
        PEFT's ``use_rslora`` set the other way (both ways where the tuned rule is neither of PEFT's two)."""
        rank = self.unchanged.rank
        alphas = {f"alpha = {self.old.alpha:g}, as it was": self.old.alpha, "alpha = r": rank, "alpha = 2r": 2 * rank}
        rules: dict[str, Rule] = {"": self.old.rule}
        flags: dict[str, Rule] = {", without use_rslora": "lora", ", use_rslora": "rslora"}
        rules |= {flag: rule for flag, rule in flags.items() if exponent(rule) != exponent(self.old.rule)}
        return tuple(
            self.alternative(name + flag, replace(self.unchanged, alpha=float(alpha), rule=rule))
            for name, alpha in alphas.items()
            for flag, rule in rules.items()
        )

    def groups(self) -> tuple[ModuleGroup, ...]:
        """All modules, and of a measured regime each type of module (``q_proj``, ...) over its layers."""
        kinds: dict[str, list[Module]] = {ALL: list(self.modules)}
        for module in self.modules if self.regime == "measured" else ():
            kinds.setdefault(module.name.rpartition(".")[2], []).append(module)
        names = ("alpha", "learning_rate", "unchanged")
        return tuple(
            ModuleGroup(kind, *(Range.of([getattr(module, name) for module in modules]) for name in names))
            for kind, modules in kinds.items()
        )

    def groups_by_regime(self) -> tuple[ModuleGroup, ...]:
        """`groups` of a measured regime; of an assumed one all modules in it and in the other limit, by their names."""
        if self.regime == "measured":
            return self.groups()
        found = []
        for name in sorted(REGIMES, key=lambda name: name != self.regime):
            alpha = self.unchanged.alpha if self.fixes_alpha else None
            there = transfer(self.old, self.unchanged.rank, name, rule=self.unchanged.rule, alpha=alpha)  # type: ignore[arg-type]
            found.append(there.groups()[0]._replace(name=name))
        return tuple(found)

    def heading(self, tokens: str) -> str:
        """Above a table of `groups_by_regime`: what was tuned, the new rank and the regime, at these tokens."""
        old = self.old
        regime = f"{self._regime}, {tokens} tokens"
        if self.regime != "measured":
            regime = f"{self.regime}, the first row; the other limit is below"
        return (
            f"Rank {old.rank} to {self.unchanged.rank}, {self._tuned_rule}, alpha {old.alpha:g}, rate "
            f"{old.learning_rate:g}, {old.optimizer}, {old.init}; regime: {regime}"
        )

    def choices_heading(self) -> str:
        """Above a table of `alternatives`."""
        return (
            f"Other common choices at rank {self.unchanged.rank}, {self._tuned_rule} where nothing else is said: the "
            "first step, times the tuned one's (range over modules), then the rate that corrects it: at the first "
            "step, and in a long run"
        )

    def by_type(self) -> dict[str, float]:
        """The alpha of each type of module, see `groups`; empty where the regime is assumed."""
        return {group.name: group.alpha.mean for group in self.groups()[1:]}

    def alpha_pattern(self, per: Per) -> dict[str, float]:
        """PEFT's ``alpha_pattern``: one alpha for all (no pattern), for each type, or for each layer's module.

        Raises:
          InputError: a ``per`` that is none of these.
        """
        if per not in get_args(Per):
            raise InputError(f"per is {shown(per)}; accepted are {', '.join(get_args(Per))}")
        if self.regime != "measured" or per == "one":
            return {}
        if per == "type":
            return self.by_type()
        return {module.name.removeprefix("model."): module.alpha for module in self.modules}

    def lora_arguments(self, per: Per = "type") -> dict[str, Any]:
        """What a PEFT ``LoraConfig`` is told by `alpha` and `learning_rate`, but for the modules.

        Any rule becomes ``alpha / r`` of the same gamma, which is the same adapter: several servers ignore
        ``use_rslora``, and for other exponents PEFT has no flag. PEFT takes any number as alpha.

        Args:
          per: which modules share an alpha, see `alpha_pattern`.

        Raises:
          InputError: an init that PEFT does not have, or as `alpha_pattern`.
        """
        new = self.unchanged
        if new.init not in PEFT_INITS:
            raise InputError(f"init is {new.init!r}, which PEFT does not have; accepted are {', '.join(PEFT_INITS)}")
        own = self.alpha_pattern(per)  # refuses another word where alpha is fixed too
        pattern = {} if self.fixes_alpha else own
        return {
            "r": new.rank,
            "lora_alpha": self.lora_alpha,
            "use_rslora": False,
            "init_lora_weights": PEFT_INITS[new.init],
            "alpha_pattern": {name: self._lora_alpha(value) for name, value in pattern.items()},
        }

    def peft_config(
        self,
        *,
        target_modules: Sequence[str] | str,
        per: Per = "type",
        task_type: TaskType | None = "CAUSAL_LM",
        others: Mapping[str, Any] | None = None,
    ) -> str:
        """Python source of a PEFT ``LoraConfig`` of `lora_arguments`, with a comment where the rule is another.

        Args:
          target_modules: PEFT's: names in a list, a name alone, all-linear, or a regular expression.
          per: which modules share an alpha, see `alpha_pattern`.
          task_type: PEFT's; without it PEFT wraps a model in its class for none.
          others: further entries, as a saved config has them.

        Raises:
          InputError: as `lora_arguments` and `peft_targets`, or a task type that PEFT does not have.
        """
        told = self.lora_arguments(per)
        check_task_type(task_type)
        targets = peft_targets(target_modules)
        kappa = exponent(self.unchanged.rule)
        remark = "" if kappa == KAPPAS["lora"] else f"  # alpha / r with the gamma of {self.alpha:.6g} / r^{kappa:g}"
        if self.is_rslora:
            remark = f"  # the same adapter as {self.alpha:.6g} with use_rslora=True"
        lines = [
            "from peft import LoraConfig",
            "",
            f"config = LoraConfig(  # learning rate {self.learning_rate:.6g}",
            *([] if task_type is None else [f"    task_type={task_type!r},"]),
            f"    r={told['r']},",
            f"    lora_alpha={told['lora_alpha']:.6g},{remark}",
            f"    use_rslora={told['use_rslora']},",
            f"    init_lora_weights={told['init_lora_weights']!r},",
            f"    target_modules={targets!r},",
        ]
        if told["alpha_pattern"]:
            lines += ["    alpha_pattern={"]
            lines += [f"        {name!r}: {alpha:.6g}," for name, alpha in told["alpha_pattern"].items()]
            lines += ["    },"]
        lines += [f"    {name}={value!r}," for name, value in (others or {}).items()]
        return "\n".join([*lines, ")"])

    def sentence(self) -> str:
        """What to set and for how long it holds, in words.

        Examples:
          >>> carried = transfer(Setting(rank=16, alpha=32, learning_rate=2e-4), 128)
          >>> print(carried.sentence())  # doctest: +NORMALIZE_WHITESPACE
          Going from rank 16 to 128 with AdamW: keep alpha 32 under alpha / r and keep the learning rate 0.0002. By the
          law the model then changes as much as before, in short and in long runs. This takes both ranks to be above the
          crossing rank, and the gradient to keep its direction. Measured, in SmolLM2-135M, the one model that was
          measured (AdamW, batches of 4, constant rate), over 64 steps: the best rate was 1.2 (0.8 to 1.9) times as high
          at rank 128 as at rank 8, where the law allows 1 to 2.4, and 1.3 (1.1 to 1.5) times as high as at rank 32,
          where it allows 1 to 1.4. No run was longer than 256 steps.
        """
        old, new = self.old, self.setting
        rule, value = (KAPPAS["lora"], self.lora_alpha) if self.is_rslora else (new.rule, new.alpha)
        alpha_kept = exponent(rule) == exponent(old.rule) and isclose(value, old.alpha)
        alpha = f"{'keep' if alpha_kept else 'set'} alpha {value:.6g} under {self._rule}"
        rate_kept = isclose(new.learning_rate, old.learning_rate)
        rate = f"{'keep' if rate_kept else 'set'} the learning rate {new.learning_rate:.3g}"
        do = f"{alpha} and {rate}"
        parts = [
            f"Going from rank {old.rank} to {new.rank} with {DISPLAY_NAMES[old.optimizer]}: {do}.",
            *self._served(),
        ]
        return " ".join([*parts, *self.scope()])

    def _served(self) -> list[str]:
        """A sentence on the same adapter with ``use_rslora``, where that is the new rule."""
        if not self.is_rslora:
            return []
        return [
            f"This is the same adapter as alpha {self.alpha:.6g} with use_rslora, which SGLang, llama.cpp and Ollama "
            f"serve {self.unchanged.rank**0.5:.3g} times too weak; `rora portable` rewrites one that is trained."
        ]

    def scope(self) -> list[str]:
        """For how long the advice holds, and what it takes for granted, a sentence each."""
        old, span = self.old, self.rates if self.fixes_alpha else self.alphas
        clipping = "clipping of the gradient changes the law"
        if span is None:
            later = (
                "It is not known what keeps later steps in this regime: for the model as a whole, ask with the regime "
            )
            return [
                f"That keeps the rms of each module's first step; the regime is {self._regime}.",
                f"{later}signal{f'; {clipping}' if self._is_sgd else ''}.",
            ]
        took = "This takes both ranks to be above the crossing rank, and the gradient to keep its direction"
        took += f"; {clipping}." if self._is_sgd else "."
        if max(span.first_step, span.A_led) - min(span.first_step, span.A_led) < 1e-9 * span.A_led:
            alike = "By the law the model then changes as much as before, in short and in long runs."
            return [alike, took, *self._seen()]
        what, long_run = "learning rate" if self.fixes_alpha else "alpha", "a long run, where A's motion leads,"
        first = f"The first step asks for this {what}; {long_run} asks for {span.A_led:.3g}."
        is_measured = self.fixes_alpha and self.measured_rates is not None
        if is_measured:
            first = f"By the law the first step asks for {span.first_step:.3g}, and {long_run} for {span.A_led:.3g}."
        if self._is_sgd:
            said = [
                first,
                "A run is long where gamma times the sum of the rates times the gradient's singular values is above 1.",
                f"Alpha {old.scaling * old.rank:.6g} under alpha / r and the rate "
                f"{old.learning_rate * self.unchanged.rank / old.rank:.3g} serve both.",
            ]
        elif self.plan is None:
            said = [
                first,
                *([] if is_measured else ["The planned steps and a takeover distance give the value between."]),
            ]
        else:
            steps = f"{self.plan.steps} step{'s' * (self.plan.steps > 1)}"
            given = "assumed from one sample" if self.plan.is_assumed else "given as measured"
            start = f"By the law {steps} ask for {span.best:.3g}" if is_measured else f"This is the law's at {steps}"
            said = [
                f"{start}: the first step asks for the {what} {span.first_step:.3g}, {long_run} for {span.A_led:.3g}.",
                f"The takeover distance, {self.plan.takeover:.2g}, is {given}, so that A's part is {self.plan.rho:.3g} "
                f"times B's in the end; the rate is {'as scheduled' if self.plan.schedule else 'taken as constant'}.",
            ]
        return [*self._seen(), *said, took, LONGEST] if is_measured else [*said, took, *self._seen()]

    def _seen(self) -> list[str]:
        """What was measured of such a change, beside the law."""
        if not self._was_measured:
            return []
        if not self.fixes_alpha or isclose(self._strength(self.unchanged, 0.0), 1):
            return [] if self.unchanged.rank == self.old.rank else [MEASURED_RANKS, LONGEST]
        if self.measured_rates is None:
            return [MEASURED_STRENGTHS, LONGEST]
        low, high = self.measured_rates
        return [f"Measured runs put the rate at {low:.2g} to {high:.2g}; this is the middle.", MEASURED_STRENGTHS]

    def whole_model(self) -> str:
        """What alphas that keep each module's own first step do to the whole model's, in words."""
        whole = step_ratio(self.setting, self.old, SIGNAL)
        return (
            "These alphas keep the rms of each module's own output, cross-talk included. Cross-talk does not add up "
            f"over modules, the signal does: where it leads, the whole model's first step is then {whole:.3g} times "
            "the tuned one's."
        )

    def as_dict(self) -> dict[str, Any]:
        """All of it as numbers, strings, lists and mappings that JSON has; infinity is the string ``"inf"``."""
        return _plain(
            {
                "sentence": self.sentence(),
                "alpha": self.alpha,
                "lora_alpha": self.lora_alpha,
                "learning_rate": self.learning_rate,
                "scaling": self.setting.scaling,
                "old": asdict(self.old),
                "new": asdict(self.setting),
                "regime": self.regime,
                "alpha_at_old_rate": self.alpha_at_old_rate,
                "rate_at_alpha": {"alpha": self.unchanged.alpha, "learning_rate": self.rate_at_alpha},
                "measured_rates": self.measured_rates,
                "alphas": self.alphas,
                "rates": self.rates,
                "plan": None if self.plan is None else asdict(self.plan),
                "modules": [asdict(module) for module in self.modules],
                "choices": [
                    asdict(row) | {"scaling": row.setting.scaling, "rates": row.rates} for row in self.alternatives()
                ],
            }
        )

    def identity(self) -> dict[str, Any]:
        """What the advice was made of."""
        terms = {module.name: module.linear_term for module in self.modules}
        return {"old": asdict(self.old), "new": asdict(self.unchanged), "linear_terms": terms}

    @property
    def _has_horizon(self) -> bool:
        return self.regime == "signal"

    @property
    def _is_sgd(self) -> bool:
        return FAMILY[self.old.optimizer] == "sgd"

    @property
    def _was_measured(self) -> bool:
        return self._has_horizon and not self._is_sgd and self.unchanged.init == "kaiming_uniform"

    @property
    def _rule(self) -> str:
        kappa = exponent(self.unchanged.rule)
        return {1.0: "alpha / r", 0.5: "alpha / r, without use_rslora,"}.get(kappa, f"alpha / r^{kappa:g}")

    @property
    def _tuned_rule(self) -> str:
        return self.old.rule if isinstance(self.old.rule, str) else f"kappa {self.old.rule:g}"

    @property
    def _regime(self) -> str:
        if self.regime != "measured":
            return f"assumed: {self.regime}"
        return f"measured at {len(self.modules)} module{'s' * (len(self.modules) > 1)}"

    def _strength(self, new: Setting, rho: float) -> float:
        r"""Growth of the change at the old rate, were A's part rho times B's under the old setting.

        :math:`\gamma' r' (s' + s \rho) / (\gamma r (s + s \rho))`: A's own motion does not know how A started.
        """
        ratio = self._deviation(self.old) / self._deviation(new)
        first = step_ratio(replace(new, learning_rate=self.old.learning_rate), self.old, SIGNAL)
        return first * ratio if isinf(rho) else first * (1 + rho * ratio) / (1 + rho)

    def _lora_alpha(self, alpha: float) -> float:
        """Alpha under ``alpha / r`` with the gamma of this alpha under the new rule."""
        scaling = scaling_factor(self.unchanged.rule, alpha=alpha, rank=self.unchanged.rank)
        return alpha_for("lora", scaling=scaling, rank=self.unchanged.rank)

    def _span(self, value: Any) -> Span:
        return Span(value(0.0), None if self.plan is None else value(self.plan.rho), value(inf))

    @staticmethod
    def _deviation(setting: Setting) -> float:
        return inits.entries(setting.init, rank=setting.rank, p_in=1).deviation


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, Span):
        return _plain(value._asdict())
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return "inf" if isinstance(value, float) and isinf(value) else value


def transfer(
    old: Setting,
    rank: int,
    regime: Literal["signal", "cross-talk"] | Mapping[str, float] = "signal",
    *,
    rule: Rule | None = None,
    alpha: float | None = None,
    steps: int | None = None,
    takeover: float | None = None,
    p_in: int | None = None,
    schedule: Sequence[float] | None = None,
) -> Advice:
    r"""Carry a tuned setting to another rank so that the change of the model stays the same.

    At the old rate the first step asks for :math:`\gamma' = \gamma (s/s') g^{-1/p}`, g the `growth`; at a given alpha
    the rate is divided by the `step_ratio`. Under Adam, where the signal leads, `Advice.rates` and `Advice.alphas` have
    the A-led end too, and the value between where the run is planned.

    Args:
      old: what was tuned.
      rank: the new rank.
      regime: one of the limits, or the linear term c of each module by name, measured with the same optimizer and init.
      rule: of the new setting; None is the old one's.
      alpha: of the new setting, where it is fixed; None keeps the rate and finds alpha.
      steps: of the planned run; with ``takeover`` or ``p_in``.
      takeover: distance of A at which its part is as large as B's (`rora_theory.theory.horizon.RowTerms.takeover`),
        measured at the old rank; 1e-3 to 9e-3 in nine modules of ten of SmolLM2-135M on one batch.
      p_in: inputs of the modules, in place of ``takeover``: it is then assumed as for one sample,
        `rora_theory.theory.horizon.one_sample_takeover`.
      schedule: factor of the rate in each of the ``steps``; None is a constant rate.

    Raises:
      InputError: no setting, a regime that is neither, or without modules, a value out of range (of a measured regime
        it names the module), or steps where no law has them.

    Examples:
      >>> carried = transfer(Setting(rank=8, alpha=16, learning_rate=3e-4), 128)
      >>> round(carried.alpha, 6), round(carried.learning_rate, 9)  # LoRA under AdamW, signal alone: nothing changes
      (16.0, 0.0003)
      >>> found = transfer(Setting(128, 16, 3e-4), 128, rule="rslora", alpha=16, steps=50, takeover=3e-3)
      >>> [f"{rate:.2e}" for rate in found.rates]
      ['2.65e-05', '7.42e-05', '8.92e-05']
    """
    check_setting("old", old)
    terms = _terms(regime)
    new_rule = old.rule if rule is None else rule
    unchanged = replace(old, rank=rank, rule=new_rule, alpha=old.alpha if alpha is None else alpha)
    modules = []
    for name, linear_term in terms.items():
        ratio = step_ratio(unchanged, old, linear_term)
        kept = unchanged.with_scaling(unchanged.scaling * ratio ** (-1 / old.power))
        modules.append(Module(name, linear_term, kept.alpha, old.learning_rate / ratio, ratio))
    named = regime if isinstance(regime, str) else "measured"
    plan = _planned(old, named, steps, takeover, p_in, schedule)
    return Advice(old, unchanged, tuple(modules), named, alpha is not None, plan)


def _terms(regime: str | Mapping[str, float]) -> dict[str, float]:
    """The linear term of each module; raises `InputError`."""
    if isinstance(regime, str) and regime in REGIMES:
        return {ALL: REGIMES[regime]}
    if not isinstance(regime, Mapping):
        raise InputError(f"regime is {shown(regime)}; accepted are {', '.join(REGIMES)}, or linear terms by module")
    if not regime:
        raise InputError("regime has no module; accepted are one or more linear terms by module")
    for name, linear_term in regime.items():
        if not isinstance(name, str):
            raise InputError(f"regime has the module {shown(name)}; accepted are names")
        check_linear_term(f"regime: linear_term of {name}", linear_term)
    return {name: float(linear_term) for name, linear_term in regime.items()}


def _planned(
    old: Setting,
    regime: str,
    steps: int | None,
    takeover: float | None,
    p_in: int | None,
    schedule: Sequence[float] | None,
) -> PlannedRun | None:
    given = {"steps": steps, "takeover": takeover, "p_in": p_in, "schedule": schedule}
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        return None
    first = next(iter(given))
    if FAMILY[old.optimizer] != "adam" or regime != "signal":
        raise InputError(
            f"{first} is {shown(given[first])} with {DISPLAY_NAMES[old.optimizer]} and the regime {regime}; accepted "
            "are Adam and AdamW with the regime signal: elsewhere the law here has no value for a number of steps"
        )
    if steps is None:
        raise InputError(f"{first} is {shown(given[first])} without steps; accepted are steps of 1 or more beside it")
    check_integer("steps", steps, maximum=MOST_STEPS)
    steps = int(steps)
    factors = [1.0] * steps if schedule is None else _factors(schedule, steps)
    if takeover is not None and p_in is not None:
        raise InputError(f"takeover is {shown(takeover)} and p_in {shown(p_in)}; accepted is one of them")
    if takeover is not None:
        check_positive("takeover", takeover)
        takeover = float(takeover)
    elif p_in is not None:
        deviation = inits.entries(old.init, rank=old.rank, p_in=p_in).deviation
        takeover = horizon.one_sample_takeover(deviation, p_in)
    else:
        raise InputError(f"steps is {steps} without takeover and p_in; accepted is one of the two beside it")
    moved = horizon.distances([old.learning_rate * factor for factor in factors], takeover=takeover)
    return PlannedRun(steps, takeover, p_in is not None, schedule is not None, moved.A / takeover)


def _factors(schedule: Sequence[float], steps: int) -> list[float]:
    """The rate's factor in each step; raises `InputError`."""
    try:
        factors = np.asarray(list(schedule))
    except (TypeError, ValueError):  # nothing that has factors, or lists of several lengths
        factors = np.empty(0, object)
    if factors.dtype.kind not in "iuf" or factors.ndim != 1:
        raise InputError(f"schedule is {shown(schedule)}; accepted is a factor of the rate a step")
    if len(factors) != steps:
        raise InputError(f"schedule has {len(factors)} factors for {steps} steps; accepted is one a step")
    found: list[float] = factors.astype(np.float64).tolist()
    for step, factor in enumerate(found, 1):
        if not 0 <= factor < inf:
            raise InputError(f"schedule has {factor!r} at step {step}; accepted are finite numbers of 0 or more")
    return found
