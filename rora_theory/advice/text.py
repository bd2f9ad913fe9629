"""Sentences and headings of the advice."""

from math import isclose

from rora_theory import inits
from rora_theory.advice.carried import CarriedSetting, HorizonLimits, strength_of
from rora_theory.advice.measured import (
    CONSTANT_MODELS,
    COST_MODELS,
    COST_OF_USE_RSLORA,
    MEASURED_SCHEDULE,
    MEASURED_STEPS,
    RANKS_OF_USE_RSLORA,
)
from rora_theory.advice.setting import SIGNAL, Setting, step_ratio
from rora_theory.optimizers import DISPLAY_NAMES
from rora_theory.scaling import KAPPAS, exponent


def describe_advice(carried: CarriedSetting) -> str:
    """Return the answer and its limits as one paragraph."""
    return f"{describe_answer(carried)} {describe_details(carried)}"


def describe_details(carried: CarriedSetting) -> str:
    """Return the evidence for the advice, its cost in the measured runs and its limits as one paragraph."""
    return " ".join([*_describe_same_adapter(carried), *_describe_scope(carried)])


def describe_answer(carried: CarriedSetting) -> str:
    """Return a sentence with the lora_alpha and the learning rate to set, in PEFT's terms."""
    old, run = carried.old, carried.run
    steps = f" and from {run.steps} to {run.to_steps} steps" if run.changes_steps else ""
    # The alpha stated is that of alpha / r, so under another rule it changes in any case.
    keeps_alpha = exponent(old.rule) == KAPPAS["lora"] and isclose(carried.lora_alpha, old.alpha)
    keeps_rate = isclose(carried.learning_rate, old.learning_rate)
    flag = " without use_rslora" if carried.is_rslora else ""
    if keeps_alpha and keeps_rate:
        action = f"keep lora_alpha={carried.lora_alpha:.6g}{flag} and the learning rate {old.learning_rate:.3g}"
    else:
        alpha_verb = "keep" if keeps_alpha else "set"
        action = f"{alpha_verb} lora_alpha={carried.lora_alpha:.6g}{flag} and {_describe_rate(carried)}"
    return f"From rank {old.rank} to {carried.unchanged.rank}{steps} with {DISPLAY_NAMES[old.optimizer]}: {action}."


def _describe_rate(carried: CarriedSetting) -> str:
    """Return a phrase that states how to change the learning rate."""
    tuned, rate = carried.old.learning_rate, carried.learning_rate
    if isclose(rate, tuned):
        return f"keep the learning rate {tuned:.3g}"
    # State the factor as a number above 1.
    divides = rate < tuned
    factor = tuned / rate if divides else rate / tuned
    result = f"{rate:.3g}"
    if carried.rate_range is not None:
        low, _, high = carried.rate_range
        result += f" (range {low:.2g} to {high:.2g})"
    return f"{'divide' if divides else 'multiply'} the learning rate by {factor:.3g}, to {result}"


def _describe_same_adapter(carried: CarriedSetting) -> list[str]:
    """Return a sentence on the same adapter under the new rule, if that is not ``alpha / r``."""
    kappa = exponent(carried.unchanged.rule)
    if carried.is_rslora:
        return [
            f"This is the same adapter as lora_alpha={carried.alpha:.6g} with use_rslora, which SGLang, llama.cpp and "
            f"Ollama serve {carried.unchanged.rank**0.5:.3g} times too weak; `rora portable` converts one that is "
            "already trained."
        ]
    if kappa != KAPPAS["lora"]:
        return [f"This is the same adapter as alpha {carried.alpha:.6g} under alpha / r^{kappa:g}."]
    return []


def _describe_scope(carried: CarriedSetting) -> list[str]:
    """Return sentences on the evidence for the advice, its cost and its limits."""
    if carried.follows_displacement_law:
        return [*_describe_cost(carried), *_describe_law(carried), *_describe_limits(carried)]
    limits = carried.rate_limits if carried.fixes_alpha else carried.alpha_limits
    if limits is None:
        return [
            "This preserves the root mean square of each module's first update; the regime is "
            f"{describe_regime(carried)}.",
            "Later steps are not covered: for the whole model, use the regime signal.",
        ]
    return _describe_horizon(carried, limits)


def _describe_cost(carried: CarriedSetting) -> list[str]:
    """Return a sentence on the regret of the choice and of a common habit, in nats per token."""
    cost = carried.measured_cost
    if cost is None:
        return []
    old_rank, rank = RANKS_OF_USE_RSLORA
    sentences = [
        "In runs at a constant learning rate the held-out loss of this choice exceeded the lowest by at most "
        f"{cost.largest:.4f} nats per token ({cost.pairs} pairs of settings of {' and '.join(COST_MODELS)}); from rank "
        f"{old_rank} to {rank}, switching on use_rslora and keeping the rate cost {COST_OF_USE_RSLORA:.2f}."
    ]
    if carried.run.changes_schedule:
        sentences.append("This cost does not include the change of the schedule.")
    return sentences


def _describe_law(carried: CarriedSetting) -> list[str]:
    """Return sentences on where the rate and its range come from, if the rate changes."""
    # Sentences for each setting that changes: scaling times rank, steps, and schedule.
    sentences = []
    if "strength" in carried.changed:
        low, high = carried.run.displacement_constants
        constant = f"K = {low:.3g} to {high:.3g}" if low != high else f"K = {low:.3g}"
        if _uses_measured_constant(carried):
            origin, models = "measured", f" ({' and '.join(CONSTANT_MODELS)})"
        else:
            origin, models = "given", ""
        old, new = strength_of(carried.old), strength_of(carried.setting)
        sentences.append(
            f"The rate follows the displacement law with the {origin} {constant}{models}, as scaling times rank "
            f"goes from {old:.4g} to {new:.4g}."
        )
        if carried.run.steps is None and carried.run.displacement_constant is None:
            sentences.append("The range is narrower if the number of steps is given.")
    if carried.run.changes_steps:
        low, high = carried.run.steps_exponents
        sentences.append(
            f"The best rate is assumed to change as the number of steps to the power {low:g} to {high:g}, as in the "
            "measured runs."
        )
    if carried.run.changes_schedule:
        change = f"from {carried.run.schedule} to {carried.run.to_schedule}"
        if carried.run.schedule_factors is None:
            sentences.append(f"The change of schedule {change} was not measured and is left out of the rate.")
        else:
            sentences.append(f"The rate includes the measured change of schedule {change}.")
    return sentences


def _describe_limits(carried: CarriedSetting) -> list[str]:
    """Return sentences on what was not measured."""
    sentences = []
    if carried.outside:
        sentences.append(f"Outside the measured range: {'; '.join(carried.outside)}.")
    # Pairs of measured settings go to higher ranks and longer runs, as users do.
    lower = [name for name, is_lower in _decreases(carried).items() if is_lower]
    if lower:
        sentences.append(f"Runs with {' and '.join(lower)} than the tuned one were not compared.")
    low, high = MEASURED_STEPS[MEASURED_SCHEDULE]
    runs = f"{low:g} to {high:g} steps at a constant rate"
    if carried.run.has_unmeasured_schedule:
        runs += ", not with this schedule"
    else:
        # Schedules other than a constant rate were measured with one seed.
        for schedule in dict.fromkeys((carried.run.schedule, carried.run.to_schedule)):
            if schedule not in (None, MEASURED_SCHEDULE):
                low, high = MEASURED_STEPS[schedule]
                runs += f", and {low:g} to {high:g} with {schedule} decay (one seed)"
    # The measured constant of the displacement law comes from more models than the rest.
    other_models = [model for model in CONSTANT_MODELS if model not in COST_MODELS]
    constant = (
        f" (K also from {' and '.join(other_models)})" if other_models and _uses_measured_constant(carried) else ""
    )
    sentences.append(f"The measurements are from {' and '.join(COST_MODELS)}{constant}, with AdamW: {runs}.")
    return sentences


def _uses_measured_constant(carried: CarriedSetting) -> bool:
    return "strength" in carried.changed and carried.run.displacement_constant is None


def _decreases(carried: CarriedSetting) -> dict[str, bool]:
    run = carried.run
    shortens = run.steps is not None and run.to_steps is not None and run.to_steps < run.steps
    return {"a lower rank": carried.unchanged.rank < carried.old.rank, "fewer steps": shortens}


def _describe_horizon(carried: CarriedSetting, limits: HorizonLimits) -> list[str]:
    """Return sentences on the first step and a long run, where the displacement law does not apply."""
    old = carried.old
    # The two limits: a single step, and a long run in which the motion of A dominates.
    first_step, long_run = limits if carried.fixes_alpha else map(carried.lora_alpha_of, limits)
    if isclose(first_step, long_run):
        sentences = ["This preserves the first update, and the change in a long run."]
    else:
        value = f"the learning rate {long_run:.3g}" if carried.fixes_alpha else f"lora_alpha={long_run:.6g}"
        sentences = [
            f"This preserves the first update; in a long run, where the motion of A dominates, {value} preserves the "
            "change."
        ]
    if carried.is_sgd:
        # The first step preserves the rate times the square of gamma times the deviation of A, times the rank; a long
        # run the rate times gamma. Both together change the rate as the square of that deviation times the rank.
        new = carried.unchanged
        old_size, new_size = (
            setting.rank * inits.entries(setting.init, rank=setting.rank, p_in=1).variance for setting in (old, new)
        )
        rate = old.learning_rate * new_size / old_size
        alpha = old.scaling * old_size / new_size * new.rank
        sentences += [
            "A run is long if the scaling times the sum of the learning rates times the gradient's singular values "
            "exceeds 1.",
            f"lora_alpha={alpha:.6g} and the learning rate {rate:.3g} suit both.",
            "Clipping of the gradient changes the law. The page on SGD in the documentation has what was measured.",
        ]
    else:
        sentences.append(f"Best rates with the initialisation {old.init} were not measured.")
    return [*sentences, "Both ranks are assumed to be above the crossing rank."]


def describe_regime(carried: CarriedSetting) -> str:
    """Return a phrase on whether the regime is assumed or measured."""
    if carried.regime != "measured":
        return f"assumed: {carried.regime}"
    count = len(carried.modules)
    return f"measured at {count} {'modules' if count > 1 else 'module'}"


def describe_rule(setting: Setting) -> str:
    """Return the name of a setting's rule."""
    return setting.rule if isinstance(setting.rule, str) else f"kappa {setting.rule:g}"


def describe_tuned(carried: CarriedSetting, tokens: str) -> str:
    """Return the heading of a table of the module groups: the tuned setting, the new rank and the regime.

    Args:
      carried: Advice to describe.
      tokens: Tokens at which a measured regime was measured, ``heldout`` or ``train``.
    """
    old = carried.old
    regime = describe_regime(carried)
    if carried.regime == "measured":
        regime += f", {tokens} tokens"
    return (
        f"Rank {old.rank} to {carried.unchanged.rank}, {describe_rule(old)}, alpha {old.alpha:g}, rate "
        f"{old.learning_rate:g}, {old.optimizer}, {old.init}; regime {regime}"
    )


def describe_alternatives(carried: CarriedSetting) -> str:
    """Return the heading of a table of the alternatives."""
    heading = f"Learning rate for common choices at rank {carried.unchanged.rank}"
    rule = describe_rule(carried.old)
    return heading if rule == "lora" else f"{heading}, under {rule} unless stated"


def describe_whole_model(carried: CarriedSetting) -> str:
    """Return sentences on the effect that the alphas of single modules have on the whole model's first step."""
    factor = step_ratio(carried.setting, carried.old, SIGNAL)
    return (
        "These alphas preserve the root mean square of each module's own output, cross-talk included. Cross-talk does "
        "not add up over modules, but the signal does: where the signal dominates, the first update of the whole model "
        f"is then {factor:.3g} times the tuned one."
    )
