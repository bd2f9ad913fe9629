r"""Alpha and learning rate to set when the rank, the rule or the number of steps of a tuned setting changes.

Under Adam with PEFT's default initialisation, alpha preserves the gain :math:`G = \gamma r`, and the learning rate
follows `rora_theory.advice.best_rate`. Elsewhere alpha or the rate preserves the first step, which is exact; see
`rora_theory.advice.transferred`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import isinf
from typing import Any, get_args

from rora_theory.advice import text
from rora_theory.advice.adapter_config import PEFT_INITS, TASK_TYPES, TaskType, peft_targets
from rora_theory.advice.modules import ALL, AlphaGrouping, Module, ModuleGroup
from rora_theory.advice.run_change import RunChange
from rora_theory.advice.setting import REGIMES, Setting, step_ratio
from rora_theory.advice.transferred import TransferredSetting, uses_displacement_law
from rora_theory.errors import InputError, shown
from rora_theory.optimizers import DISPLAY_NAMES, Schedule
from rora_theory.scaling import KAPPAS, Rule, check_between, check_choice, check_instance, exponent


@dataclass(frozen=True)
class Advice(TransferredSetting):
    """Advice for another rank: the numbers of `TransferredSetting`, in words and in PEFT's terms.

    Set `alpha` and `learning_rate` together. The attributes are those of `TransferredSetting`.
    """

    def groups_by_regime(self) -> tuple[ModuleGroup, ...]:
        """Summarise a measured regime as `groups`, and an assumed one together with the other limit, by name."""
        if self.regime == "measured":
            return self.groups()
        alpha = self.unchanged.alpha if self.fixes_alpha else None
        summaries = []
        # The assumed regime first, because False sorts before True.
        for name in sorted(REGIMES, key=lambda name: name != self.regime):
            in_regime = transfer(self.old, self.unchanged.rank, name, rule=self.unchanged.rule, alpha=alpha)
            summaries.append(in_regime.groups()[0]._replace(name=name))
        return tuple(summaries)

    def by_type(self) -> dict[str, float]:
        """Return the alpha of each type of module; empty in an assumed regime."""
        return {group.name: group.alpha.mean for group in self.groups()[1:]}

    def alpha_pattern(self, per: AlphaGrouping) -> dict[str, float]:
        """Return PEFT's ``alpha_pattern``, with alphas under the new rule.

        Args:
          per: Grouping of the modules that share an alpha; with one group for all there is no pattern.

        Raises:
          InputError: If the grouping is not one of these.
        """
        check_choice("per", per, get_args(AlphaGrouping))
        if self.regime != "measured" or per == "one":
            return {}
        if per == "type":
            return self.by_type()
        return {module.name.removeprefix("model."): module.alpha for module in self.modules}

    def lora_arguments(self, per: AlphaGrouping = "type") -> dict[str, Any]:
        """Return the arguments of PEFT's ``LoraConfig`` that the advice determines.

        The rule is always ``alpha / r`` with the same gamma, which is the same adapter: several servers ignore
        ``use_rslora``, and PEFT has no flag for other exponents. PEFT accepts any number as alpha.

        Args:
          per: Grouping of the modules that share an alpha, see `alpha_pattern`.

        Raises:
          InputError: If PEFT does not have the initialisation, or `alpha_pattern` refuses the grouping.
        """
        new = self.unchanged
        if new.init not in PEFT_INITS:
            raise InputError(f"init must be one that PEFT has ({', '.join(PEFT_INITS)}), got {new.init!r}")
        by_module = self.alpha_pattern(per)  # raises for an unknown grouping, even if alpha is fixed
        pattern = {} if self.fixes_alpha else by_module
        return {
            "r": new.rank,
            "lora_alpha": self.lora_alpha,
            "use_rslora": False,
            "init_lora_weights": PEFT_INITS[new.init],
            "alpha_pattern": {name: self.lora_alpha_of(alpha) for name, alpha in pattern.items()},
        }

    def peft_config(
        self,
        *,
        target_modules: Sequence[str] | str,
        per: AlphaGrouping = "type",
        task_type: TaskType | None = "CAUSAL_LM",
        other_entries: Mapping[str, Any] | None = None,
    ) -> str:
        """Return Python source of a PEFT ``LoraConfig`` with `lora_arguments`.

        Args:
          target_modules: Target modules in PEFT's format: names in a list, one name, all-linear, or a regular
            expression. The list may be empty if ``other_entries`` has ``target_parameters``.
          per: Grouping of the modules that share an alpha, see `alpha_pattern`.
          task_type: Task type of PEFT; None leaves it out.
          other_entries: Other entries of the configuration, such as those of a saved one.

        Raises:
          InputError: If `lora_arguments` or `peft_targets` refuses a value, or PEFT does not have the task type.
        """
        arguments = self.lora_arguments(per)
        check_choice("task_type", task_type, TASK_TYPES)
        has_parameters = bool((other_entries or {}).get("target_parameters"))
        targets = [] if has_parameters and not target_modules else peft_targets(target_modules)
        # Name the rule in a comment, since the configuration is always under alpha / r.
        kappa = exponent(self.unchanged.rule)
        comment = "" if kappa == KAPPAS["lora"] else f"  # alpha / r with the gamma of {self.alpha:.6g} / r^{kappa:g}"
        if self.is_rslora:
            comment = f"  # the same adapter as {self.alpha:.6g} with use_rslora=True"
        # Python source, one argument on each line.
        lines = [
            "from peft import LoraConfig",
            "",
            f"config = LoraConfig(  # learning rate {self.learning_rate:.6g}",
            *([] if task_type is None else [f"    task_type={task_type!r},"]),
            f"    r={arguments['r']},",
            f"    lora_alpha={arguments['lora_alpha']:.6g},{comment}",
            f"    use_rslora={arguments['use_rslora']},",
            f"    init_lora_weights={arguments['init_lora_weights']!r},",
            f"    target_modules={targets!r},",
        ]
        if arguments["alpha_pattern"]:
            lines += ["    alpha_pattern={"]
            lines += [f"        {name!r}: {alpha:.6g}," for name, alpha in arguments["alpha_pattern"].items()]
            lines += ["    },"]
        lines += [f"    {name}={value!r}," for name, value in (other_entries or {}).items()]
        return "\n".join([*lines, ")"])

    def sentence(self) -> str:
        """Return the answer, its cost in the measured runs and its limits, in words.

        Examples:
          >>> advice = transfer(Setting(rank=16, alpha=32, learning_rate=2e-4), 128)
          >>> print(advice.sentence())  # doctest: +ELLIPSIS
          From rank 16 to 128 with AdamW: keep lora_alpha=32 and multiply the learning rate by ...
        """
        return text.describe_advice(self)

    def answer(self) -> str:
        """Return the first sentence of `sentence`: the lora_alpha and the learning rate to set."""
        return text.describe_answer(self)

    def details(self) -> str:
        """Return the rest of `sentence`: the evidence for the advice, its cost in the measured runs and its limits."""
        return text.describe_details(self)

    def as_dict(self) -> dict[str, Any]:
        """Return the advice as numbers, strings, lists and mappings that JSON has; infinity is ``"inf"``."""
        return _as_json(
            {
                "sentence": self.sentence(),
                "alpha": self.alpha,
                "lora_alpha": self.lora_alpha,
                "learning_rate": self.learning_rate,
                "rate_range": self.rate_range,
                "scaling": self.setting.scaling,
                "old": asdict(self.old),
                "new": asdict(self.setting),
                "run": asdict(self.run),
                "regime": self.regime,
                "outside": self.outside,
                "alpha_at_old_rate": self.alpha_at_old_rate,
                "rate_at_alpha": {"alpha": self.unchanged.alpha, "learning_rate": self.rate_at_alpha},
                "alpha_limits": self.alpha_limits,
                "rate_limits": self.rate_limits,
                "modules": [asdict(module) for module in self.modules],
                "choices": [
                    vars(row) | {"setting": asdict(row.setting), "scaling": row.setting.scaling}
                    for row in self.alternatives()
                ],
            }
        )

    def identity(self) -> dict[str, Any]:
        """Return the settings and the linear terms from which the advice was computed."""
        terms = {module.name: module.linear_term for module in self.modules}
        return {"old": asdict(self.old), "new": asdict(self.unchanged), "linear_terms": terms}


def _as_json(value: Any) -> Any:
    """Convert named tuples to mappings, other tuples to lists, and infinity to a string."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return _as_json(value._asdict())
    if isinstance(value, Mapping):
        return {name: _as_json(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(entry) for entry in value]
    return "inf" if isinstance(value, float) and isinf(value) else value


def transfer(
    old: Setting,
    rank: int,
    regime: str | Mapping[str, float] = "signal",
    *,
    rule: Rule | None = None,
    alpha: float | None = None,
    steps: int | None = None,
    to_steps: int | None = None,
    schedule: Schedule | None = None,
    to_schedule: Schedule | None = None,
    batch_size: int | None = None,
    to_batch_size: int | None = None,
    displacement_constant: float | None = None,
) -> Advice:
    """Compute the alpha and learning rate to set when the rank, rule, steps, schedule or batch size changes.

    Args:
      old: Tuned setting.
      rank: New rank.
      regime: ``"signal"``, which describes the whole model, ``"cross-talk"``, or the linear term of each module by
        name, as a measurement gives it.
      rule: Scaling rule of the new setting; None keeps the tuned one.
      alpha: Alpha of the new setting. None computes the one that preserves the gain G (the first step outside of the
        law of the best rate).
      steps: Number of optimizer steps for which the rate was tuned.
      to_steps: Number of optimizer steps of the new run; None is ``steps``.
      schedule: Schedule with which the rate was tuned: ``"constant"``, ``"linear"`` or ``"cosine"``.
      to_schedule: Schedule of the new run; None is ``schedule``.
      batch_size: Number of records per optimizer step with which the rate was tuned.
      to_batch_size: Number of records per optimizer step of the new run; None is ``batch_size``.
      displacement_constant: Displacement constant K of your own runs, from
        `rora_theory.laws.displacement.measured_constant`; None uses the published one.

    Returns:
      The advice.

    Raises:
      InputError: If a value is out of range (of a measured regime, the module is named), or if steps, a schedule or a
        displacement constant are given where the displacement law does not apply: under SGD, with another
        initialisation than PEFT's default, or in another regime than ``"signal"``.

    Examples:
      >>> advice = transfer(Setting(rank=8, alpha=16, learning_rate=3e-4), 128)
      >>> advice.alpha, f"{advice.learning_rate:.1g}"  # LoRA under AdamW: the rate follows the rank
      (16.0, '0.0005')
      >>> advice = transfer(Setting(16, 32, 2e-4), 128, alpha=256)  # alpha = 2r at both ranks
      >>> [f"{rate:.1g}" for rate in advice.rate_range]
      ['4e-05', '6e-05', '9e-05']
    """
    check_instance("old", old, Setting, "a Setting")
    terms = _linear_terms(regime)
    regime_name = regime if isinstance(regime, str) else "measured"
    run = RunChange(steps, to_steps, schedule, to_schedule, batch_size, to_batch_size, displacement_constant)
    _check_run_has_a_law(run, old, regime_name)
    new_rule = old.rule if rule is None else rule
    # The tuned alpha and rate at the new rank and rule, from which the advice departs.
    unchanged = replace(old, rank=rank, rule=new_rule, alpha=old.alpha if alpha is None else alpha)
    # Alpha and rate that preserve each module's first step, which is proportional to gamma^power and to the rate.
    modules = []
    for module_name, linear_term in terms.items():
        ratio = step_ratio(unchanged, old, linear_term)
        preserving = unchanged.with_scaling(unchanged.scaling * ratio ** (-1 / old.power))
        modules.append(Module(module_name, linear_term, preserving.alpha, old.learning_rate / ratio, ratio))
    return Advice(old, unchanged, tuple(modules), regime_name, alpha is not None, run)


def _linear_terms(regime: str | Mapping[str, float]) -> dict[str, float]:
    """Return the linear term of each module, or raise `InputError`."""
    # A named regime is one linear term for all modules.
    if isinstance(regime, str) and regime in REGIMES:
        return {ALL: REGIMES[regime]}
    if not isinstance(regime, Mapping):
        raise InputError(f"regime must be one of {', '.join(REGIMES)}, or linear terms by module, got {shown(regime)}")
    if not regime:
        raise InputError("regime must have at least one module, got an empty mapping")
    for name, linear_term in regime.items():
        if not isinstance(name, str):
            raise InputError(f"regime must have names of modules as keys, got {shown(name)}")
        check_between(f"regime: linear_term of {name}", linear_term, -1, closed="right")
    return {name: float(linear_term) for name, linear_term in regime.items()}


def _check_run_has_a_law(run: RunChange, old: Setting, regime: str) -> None:
    """Raise `InputError` if steps, a schedule or a constant are given where only the first step has a law."""
    if not run.given or (regime == "signal" and uses_displacement_law(old)):
        return
    name, value = next(iter(run.given.items()))
    raise InputError(
        f"{name} must be left out with {DISPLAY_NAMES[old.optimizer]}, init {old.init!r} and the regime {regime}, got "
        f"{shown(value)}: the displacement law covers Adam, PEFT's default initialisation and the regime signal"
    )
