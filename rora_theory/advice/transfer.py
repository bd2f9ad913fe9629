r"""What alpha, or what learning rate, keeps the first step the same when the rank changes.

A rank-r step from B = 0 is a sum of r one-row steps, equal in law and independent, so that its mean square is

.. math:: E[w^2] = (\eta \gamma^p s^p)^2 K\, (r^2 + c\, r), \qquad p = 2 \text{ (SGD)},\ 1 \text{ (Adam)}

with s the deviation of A's entries, K a constant of the module and its data, and the **linear term** c the variance of
a one-row step over its squared mean, both summed over outputs and tokens. c = 0 is signal alone, c = inf cross-talk
alone; with Gaussian A it is r* + 1 for SGD and r* - 2 for Adam, r* from `laws.crossing_rank`.
`rora_theory.measure.terms` measures it. All else follows: the step's size changes with the rank by

.. math:: \frac{\eta'}{\eta} \left( \frac{\gamma'}{\gamma} \frac{s'}{s} \right)^p \sqrt{\frac{r'^2 + c r'}{r^2 + c r}}.

This is the law of the first step. What comes later depends on how A moves.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import geometric_mean
from typing import Literal, get_args

from rora_theory import inits
from rora_theory.errors import InputError
from rora_theory.scaling import KAPPAS, Rule, alpha_for, check_positive, check_rank, exponent, scaling_factor
from rora_theory.theory.laws import Optimizer, scaling_power

Trainer = Literal["sgd", "momentum", "adam", "adamw"]
"""An optimizer as users name it."""

FAMILY: dict[Trainer, Optimizer] = {"sgd": "sgd", "momentum": "sgd", "adam": "adam", "adamw": "adam"}
"""Whose first step each one takes. Momentum's is SGD's, times a constant where it is Nesterov's. AdamW's is Adam's:
weight decay does nothing to B = 0 and multiplies A by 1 - eta lambda at any rank."""

SIGNAL, CROSS_TALK = 0.0, math.inf
"""Linear terms of the two limits."""

REGIMES = {"signal": SIGNAL, "cross-talk": CROSS_TALK}

PEFT_INITS: dict[inits.Init, bool | str] = {"kaiming_uniform": True, "gaussian": "gaussian"}
"""PEFT's ``init_lora_weights`` of each init that it has."""

ALL = "all modules"
"""Name of the one module of an assumed regime."""

PAPER_TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
"""The modules that the DoRA and RoRA experiments adapt."""

ALL_LINEAR = "all-linear"
"""PEFT's word for every linear module but the output head; it stands alone, not in a list."""

TaskType = Literal["CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"]
"""PEFT's task types."""


@dataclass(frozen=True)
class Setting:
    """What the size of the first step depends on, the data apart.

    Attributes:
      rank: r >= 1.
      alpha: > 0.
      learning_rate: eta > 0, of the step (a warm-up's factor is the same at every rank).
      rule: how gamma depends on rank, see `rora_theory.scaling_factor`.
      optimizer: one of `Trainer`.
      init: law of A, see `rora_theory.inits.entries`; ``"gaussian"``'s deviation depends on the rank.

    Raises:
      InputError: a value outside these ranges.
    """

    rank: int
    alpha: float
    learning_rate: float
    rule: Rule = "lora"
    optimizer: Trainer = "adamw"
    init: inits.Init = "kaiming_uniform"

    def __post_init__(self) -> None:
        check_positive("learning_rate", self.learning_rate)
        if self.optimizer not in FAMILY:
            raise InputError(f"optimizer is {self.optimizer!r}; accepted are {', '.join(get_args(Trainer))}")
        inits.entries(self.init, rank=self.rank, p_in=1)
        _ = self.scaling

    @property
    def scaling(self) -> float:
        """gamma."""
        return scaling_factor(self.rule, alpha=self.alpha, rank=self.rank)

    @property
    def power(self) -> int:
        """p, the power of gamma and of s in the step."""
        return scaling_power(FAMILY[self.optimizer])

    def with_scaling(self, scaling: float) -> "Setting":
        """The setting whose alpha gives this gamma."""
        return replace(self, alpha=alpha_for(self.rule, scaling=scaling, rank=self.rank))


def growth(old_rank: int, new_rank: int, linear_term: float) -> float:
    r""":math:`\sqrt{(r'^2 + c r') / (r^2 + c r)}`: what the rank alone does to the rms of the first step.

    Args:
      old_rank, new_rank: r and r', 1 or more.
      linear_term: c > -1; 0 is signal alone (r'/r), infinity cross-talk alone (sqrt(r'/r)).

    Raises:
      InputError: a value outside these ranges.

    Example:
      >>> growth(8, 128, SIGNAL), growth(8, 128, CROSS_TALK), round(growth(8, 128, 5.0), 3)
      (16.0, 4.0, 12.794)
    """
    check_rank(old_rank)
    check_rank(new_rank)
    if not linear_term > -1:  # at -1 or below a rank-1 step would have no mean square
        raise InputError(f"linear_term is {linear_term!r}; accepted is a number above -1, or inf")
    if math.isinf(linear_term):
        return math.sqrt(new_rank / old_rank)
    return math.sqrt(new_rank * (new_rank + linear_term) / (old_rank * (old_rank + linear_term)))


def step_ratio(new: Setting, old: Setting, linear_term: float) -> float:
    """How many times larger the rms of the first step is under ``new`` than under ``old``.

    Args:
      new, old: of one optimizer and one init; rank, alpha, rate and rule may differ.
      linear_term: of the module, under that optimizer and init.

    Raises:
      InputError: another optimizer or init, which changes more than a factor.
    """
    for name in ("optimizer", "init"):
        if getattr(new, name) != getattr(old, name):
            raise InputError(
                f"{name} is {getattr(new, name)!r} after {getattr(old, name)!r}; accepted is the same one: what a rank "
                "does to the step depends on it"
            )
    deviation = [inits.entries(each.init, rank=each.rank, p_in=1).deviation for each in (new, old)]
    strength = new.scaling * deviation[0] / (old.scaling * deviation[1])
    rate = new.learning_rate / old.learning_rate
    return rate * strength**new.power * growth(old.rank, new.rank, linear_term)


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


@dataclass(frozen=True)
class Folk:
    """What another choice would do, over all modules.

    Attributes:
      name: of the choice.
      setting: it in full.
      step: factor of the first step against the tuned setting's: the geometric mean over modules.
      smallest, largest: of the modules' factors.
      learning_rate: the rate that would undo the mean factor.
    """

    name: str
    setting: Setting
    step: float
    smallest: float
    largest: float
    learning_rate: float


@dataclass(frozen=True)
class Transfer:
    """A tuned setting carried to another rank.

    Attributes:
      old: what was tuned.
      unchanged: its alpha and rate at the new rank and rule.
      modules: what keeps each module's step.
    """

    old: Setting
    unchanged: Setting
    modules: tuple[Module, ...]

    @property
    def alpha(self) -> float:
        """The one alpha for all modules: the geometric mean of theirs."""
        return geometric_mean([module.alpha for module in self.modules])

    @property
    def learning_rate(self) -> float:
        """The one learning rate for all modules at the old alpha: the geometric mean of theirs."""
        return geometric_mean([module.learning_rate for module in self.modules])

    def steps(self, new: Setting) -> dict[str, float]:
        """Each module's `step_ratio` under ``new``."""
        return {module.name: step_ratio(new, self.old, module.linear_term) for module in self.modules}

    def judge(self, name: str, new: Setting) -> Folk:
        """What ``new`` would do."""
        steps = list(self.steps(new).values())
        mean = geometric_mean(steps)
        return Folk(name, new, mean, min(steps), max(steps), new.learning_rate / mean)

    def folk(self) -> tuple[Folk, ...]:
        """Rules of thumb at the new rank and old rate: under the tuned rule, which is not named, and with PEFT's
        ``use_rslora`` set the other way (both ways where the tuned rule is neither of PEFT's two)."""
        rank = self.unchanged.rank
        alphas = {f"alpha = {self.old.alpha:g}, as it was": self.old.alpha, "alpha = r": rank, "alpha = 2r": 2 * rank}
        rules: dict[str, Rule] = {"": self.old.rule}
        flags: dict[str, Rule] = {", without use_rslora": "lora", ", use_rslora": "rslora"}
        rules |= {flag: rule for flag, rule in flags.items() if exponent(rule) != exponent(self.old.rule)}
        return tuple(
            self.judge(name + flag, replace(self.unchanged, alpha=float(alpha), rule=rule))
            for name, alpha in alphas.items()
            for flag, rule in rules.items()
        )

    def by_type(self) -> dict[str, float]:
        """The alpha of each type of module (``q_proj``, ...): the geometric mean over its layers."""
        groups: dict[str, list[float]] = {}
        for module in self.modules:
            groups.setdefault(module.name.rpartition(".")[2], []).append(module.alpha)
        return {name: geometric_mean(alphas) for name, alphas in groups.items()}

    def alpha_pattern(self, per: Literal["one", "type", "module"]) -> dict[str, float]:
        """PEFT's ``alpha_pattern``: one alpha for all (no pattern), for each type, or for each layer's module."""
        if self.modules[0].name == ALL or per == "one":
            return {}
        if per == "type":
            return self.by_type()
        return {module.name.removeprefix("model."): module.alpha for module in self.modules}


def transfer(
    old: Setting,
    rank: int,
    regime: Literal["signal", "cross-talk"] | Mapping[str, float] = "signal",
    *,
    rule: Rule | None = None,
) -> Transfer:
    r"""Carry a tuned setting to another rank so that the rms of the first step stays the same.

    At the old rate gamma becomes :math:`\gamma' = \gamma (s/s') g^{-1/p}`, g the `growth`; at the old alpha the rate is
    divided by the `step_ratio`.

    Args:
      old: what was tuned.
      rank: the new rank.
      regime: one of the limits, or the linear term c of each module by name, measured with the same optimizer and init.
      rule: of the new setting; None is the old one's.

    Raises:
      InputError: a regime that is neither, or without modules, or a value out of range.

    Example:
      >>> carried = transfer(Setting(rank=8, alpha=16, learning_rate=3e-4), 128)
      >>> round(carried.alpha, 6), round(carried.learning_rate, 9)  # LoRA under AdamW, signal alone: nothing changes
      (16.0, 0.0003)
    """
    if isinstance(regime, str):
        if regime not in REGIMES:
            raise InputError(f"regime is {regime!r}; accepted are {', '.join(REGIMES)}, or linear terms by module")
        regime = {ALL: REGIMES[regime]}
    if not regime:
        raise InputError("regime has no module; accepted are one or more linear terms by module")
    unchanged = replace(old, rank=rank, rule=old.rule if rule is None else rule)
    modules = []
    for name, linear_term in regime.items():
        ratio = step_ratio(unchanged, old, linear_term)
        kept = unchanged.with_scaling(unchanged.scaling * ratio ** (-1 / old.power))
        modules.append(Module(name, linear_term, kept.alpha, old.learning_rate / ratio, ratio))
    return Transfer(old, unchanged, tuple(modules))


def peft_targets(names: Sequence[str]) -> str | list[str]:
    """``target_modules`` as PEFT takes them: `ALL_LINEAR` as a string, names of modules as a list.

    Args:
      names: ``["all-linear"]``, or names such as ``q_proj`` and ``self_attn.q_proj``.

    Raises:
      InputError: none, one twice, `ALL_LINEAR` beside others, or one that no module's name can be.

    Example:
      >>> peft_targets(["all-linear"]), peft_targets(["q_proj", "v_proj"])
      ('all-linear', ['q_proj', 'v_proj'])
    """
    accepted = f"names of modules such as q_proj, each by itself, or {ALL_LINEAR} alone"
    if not names:
        raise InputError(f"targets is empty; accepted are {accepted}")
    if list(names) == [ALL_LINEAR]:
        return ALL_LINEAR
    for name in names:
        if name == ALL_LINEAR or not re.fullmatch(r"\w+(\.\w+)*", name) or list(names).count(name) > 1:
            raise InputError(f"targets has {name!r} in {' '.join(names)!r}; accepted are {accepted}")
    return list(names)


def peft_config(
    found: Transfer,
    *,
    target_modules: Sequence[str] | str,
    per: Literal["one", "type", "module"] = "type",
    task_type: TaskType = "CAUSAL_LM",
) -> str:
    """Python source of a PEFT ``LoraConfig`` with the alphas that keep the first step at the old rate.

    A rule of another kappa than 1 or 1/2 has no flag in PEFT and is written as ``alpha / r`` of the same gamma, with a
    comment. PEFT takes any number as alpha.

    Args:
      found: of `transfer`.
      target_modules: PEFT's, see `peft_targets`.
      per: which modules share an alpha, see `Transfer.alpha_pattern`.
      task_type: PEFT's; without it PEFT wraps a model in its class for none.

    Raises:
      InputError: an init that PEFT does not have, targets as in `peft_targets`, or a task type that PEFT does not have.
    """
    new = found.unchanged
    if new.init not in PEFT_INITS:
        raise InputError(f"init is {new.init!r}, which PEFT does not have; accepted are {', '.join(PEFT_INITS)}")
    if task_type not in get_args(TaskType):
        raise InputError(f"task_type is {task_type!r}; accepted are {', '.join(get_args(TaskType))}")
    targets = peft_targets([target_modules] if isinstance(target_modules, str) else target_modules)
    kappa = exponent(new.rule)
    flag = kappa == KAPPAS["rslora"]
    rule: Rule = "rslora" if flag else "lora"
    remark = "" if kappa in KAPPAS.values() else f"  # alpha / r with the gamma of {found.alpha:.6g} / r^{kappa:g}"

    def written(alpha: float) -> str:
        scaling = scaling_factor(new.rule, alpha=alpha, rank=new.rank)
        return f"{alpha_for(rule, scaling=scaling, rank=new.rank):.6g}"

    lines = [
        "from peft import LoraConfig",
        "",
        f"config = LoraConfig(  # learning rate {found.old.learning_rate:g}",
        f"    task_type={task_type!r},",
        f"    r={new.rank},",
        f"    lora_alpha={written(found.alpha)},{remark}",
        f"    use_rslora={flag},",
        f"    init_lora_weights={PEFT_INITS[new.init]!r},",
        f"    target_modules={targets!r},",
    ]
    pattern = found.alpha_pattern(per)
    if pattern:
        lines += ["    alpha_pattern={"]
        lines += [f"        {name!r}: {written(alpha)}," for name, alpha in pattern.items()]
        lines += ["    },"]
    return "\n".join([*lines, ")"])
