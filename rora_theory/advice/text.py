"""Sentences and headings of the advice."""

import math
from math import isclose

from rora_theory import inits
from rora_theory.advice.constants import CONSTANTS, EVIDENCE, GROWTH
from rora_theory.advice.setting import SIGNAL, Setting, step_ratio
from rora_theory.advice.transferred import HorizonLimits, TransferredSetting
from rora_theory.optimizers import DISPLAY_NAMES
from rora_theory.scaling import KAPPAS, exponent
from rora_theory.validation.rules import listed


def describe_advice(advice: TransferredSetting) -> str:
    """Return the answer and its limits as one paragraph."""
    return f"{describe_answer(advice)} {describe_details(advice)}"


def describe_details(advice: TransferredSetting) -> str:
    """Return the evidence for the advice, its cost in the measured runs and its limits as one paragraph."""
    return " ".join([*_describe_same_adapter(advice), *_describe_scope(advice)])


def describe_answer(advice: TransferredSetting) -> str:
    """Return a sentence with the lora_alpha and the learning rate to set, in PEFT's terms."""
    old, run, new_rank = advice.old, advice.run, advice.unchanged.rank
    changes = []
    if "steps" in run.changed:
        changes.append(f"from {run.steps} to {run.to_steps} steps")
    if "batch_size" in run.changed:
        changes.append(f"from batches of {run.batch_size} to {run.to_batch_size}")
    if "schedule" in run.changed:
        changes.append(f"from a {run.schedule} to a {run.to_schedule} schedule")
    if new_rank != old.rank:
        change = listed([f"From rank {old.rank} to {new_rank}", *changes])
    elif changes:
        change = f"At rank {old.rank}, {listed(changes)}"
    else:
        change = f"At rank {old.rank}"
    # The alpha stated is that of alpha / r, so under another rule it changes in any case.
    keeps_alpha = exponent(old.rule) == KAPPAS["lora"] and isclose(advice.lora_alpha, old.alpha)
    keeps_rate = isclose(advice.learning_rate, old.learning_rate)
    flag = " without use_rslora" if advice.is_rslora else ""
    if keeps_alpha and keeps_rate:
        action = f"keep lora_alpha={advice.lora_alpha:.6g}{flag} and the learning rate {old.learning_rate:.3g}"
    else:
        alpha_verb = "keep" if keeps_alpha else "set"
        action = f"{alpha_verb} lora_alpha={advice.lora_alpha:.6g}{flag} and {_describe_rate(advice)}"
    return f"{change} with {DISPLAY_NAMES[old.optimizer]}: {action}."


def _describe_rate(advice: TransferredSetting) -> str:
    """Return a phrase that states how to change the learning rate."""
    tuned, rate = advice.old.learning_rate, advice.learning_rate
    if isclose(rate, tuned):
        return f"keep the learning rate {tuned:.3g}"
    # State the factor as a number above 1.
    divides = rate < tuned
    factor = tuned / rate if divides else rate / tuned
    result = f"{rate:.3g}"
    if advice.rate_range is not None:
        low, _, high = advice.rate_range
        result += f" (range {low:.2g} to {high:.2g})"
    return f"{'divide' if divides else 'multiply'} the learning rate by {factor:.3g}, to {result}"


def _describe_same_adapter(advice: TransferredSetting) -> list[str]:
    """Return a sentence on the same adapter under the new rule, if that is not ``alpha / r``."""
    kappa = exponent(advice.unchanged.rule)
    if advice.is_rslora:
        sentences = [
            f"To keep use_rslora, set lora_alpha={advice.alpha:.6g} with it, which is the same adapter; SGLang, "
            f"llama.cpp and Ollama ignore the flag and serve it {advice.unchanged.rank**0.5:.3g} times too weak "
            "(`rora portable` converts one that is already trained)."
        ]
        if exponent(advice.old.rule) == KAPPAS["lora"]:
            sentences.append("The tuned run is taken to be without use_rslora; if it had the flag, its rule is rslora.")
        return sentences
    if kappa != KAPPAS["lora"]:
        return [f"This is the same adapter as alpha {advice.alpha:.6g} under alpha / r^{kappa:g}."]
    return []


def _describe_scope(advice: TransferredSetting) -> list[str]:
    """Return sentences on the evidence for the advice, its cost and its limits."""
    if advice.follows_displacement_law:
        return [*_describe_cost(advice), *_describe_law(advice), *_describe_limits(advice)]
    limits = advice.rate_limits if advice.fixes_alpha else advice.alpha_limits
    if limits is None:
        return [
            "This preserves the root mean square of each module's first update; the regime is "
            f"{describe_regime(advice)}.",
            "Later steps are not covered: for the whole model, use the regime signal.",
        ]
    return _describe_horizon(advice, limits)


def describe_evidence() -> str:
    """Return a sentence on what the public sweeps say about keeping a rate at another rank, and about the advice."""
    fixed, moved = EVIDENCE["fixed_gain"], EVIDENCE["alpha_r"]
    return (
        f"In {fixed['runs']:,} public runs of {fixed['models']} models (1B to 1T parameters) with alpha / r and alpha "
        f"32, keeping alpha and the rate between ranks of 16 and more cost at most {fixed['keep']:.4f} nats per token "
        f"({fixed['pairs']} pairs in {fixed['compared']} models). With alpha = r (Qwen2.5-7B, {moved['runs']} runs), "
        f"keeping the rate cost {moved['keep_mean']:.3f} on average and {moved['keep']:.2f} at most; this advice "
        f"{moved['advice_mean']:.4f} and {moved['advice']:.4f}."
    )


def _describe_cost(advice: TransferredSetting) -> list[str]:
    """Return sentences on the regret of keeping the rate and of the advice, in nats per token."""
    sentences = _describe_cost_of_setting(advice)
    if "steps" in advice.run.changed:
        keep, advised = EVIDENCE["steps_keep"], EVIDENCE["steps_advice"]
        sentences.append(
            f"In {keep['pairs']} pairs of runs of four models (1 to 270 million weights; to 1,024 steps, the smallest "
            f"to 16,384), keeping the rate for more steps cost {keep['mean']:.3f} nats per token on average and at "
            f"most {keep['largest']:.2f} in a pair; this law, fitted to the other three models, "
            f"{advised['mean']:.3f} and {advised['largest']:.3f}."
        )
    if "batch_size" in advice.run.changed:
        keep, advised = EVIDENCE["batch_keep"], EVIDENCE["batch_advice"]
        sentences.append(
            f"In SmolLM2-135M, from {keep['from_batch']} to {keep['to_batch']} records, keeping the rate cost "
            f"{keep['regret']:.3f} nats per token and this advice, in part fitted to these runs, "
            f"{advised['regret']:.4f}."
        )
    return sentences


def _describe_cost_of_setting(advice: TransferredSetting) -> list[str]:
    """Return sentences on the regret where the rank or the scaling times the rank changes."""
    if "gain" in advice.changed:
        # Public pairs whose gain changes about as much: the regret depends on it more than on anything else.
        change = abs(math.log(advice.setting.gain / advice.old.gain))
        moved = min(GROWTH.values(), key=lambda row: abs(math.log(row["growth"]) - change))
        sentences = [
            f"In the {moved['pairs']} public pairs whose scaling times rank changed by a factor of {moved['growth']:g} "
            f"(Qwen2.5-7B, alpha = r), keeping the rate cost {moved['keep_mean']:.3f} nats per token on average and "
            f"{moved['keep']:.3f} at most; this advice {moved['advice_mean']:.4f} and {moved['advice']:.4f}."
        ]
        if advice.setting.gain > advice.old.gain:
            rslora = EVIDENCE["use_rslora"]
            sentences.append(
                f"In SmolLM2-135M, switching on use_rslora from rank {rslora['old_rank']:g} to {rslora['rank']:g} and "
                f"keeping the rate cost {rslora['regret']:.2f}."
            )
        return sentences
    if "rank" in advice.changed:
        fixed = EVIDENCE["fixed_gain_all_ranks"]
        return [
            f"In public runs at one scaling times rank ({fixed['pairs']} pairs of ranks in {fixed['compared']} "
            f"models), keeping the rate cost {fixed['keep_mean']:.4f} nats per token on average and "
            f"{fixed['keep']:.4f} at most; this advice {fixed['advice_mean']:.4f} and {fixed['advice']:.4f}."
        ]
    return []


def _describe_law(advice: TransferredSetting) -> list[str]:
    """Return a sentence for each property that moves the rate."""
    run, sentences = advice.run, []
    if "rank" in advice.changed:
        exponent_of_rank = CONSTANTS["rank_exponent"].value
        sentences.append(f"At one scaling times rank the best rate grows as rank^{exponent_of_rank:.2f} (empirical).")
    if "gain" in advice.changed:
        given, published = run.displacement_constant, CONSTANTS["displacement_constant"].value
        constant = f"the published K = {published:.3g}" if given is None else f"the given K = {given:.3g}"
        sentences.append(
            f"Scaling times rank goes from {advice.old.gain:.4g} to {advice.setting.gain:.4g}, which moves the rate "
            f"by the displacement law with {constant}."
        )
    if "steps" in run.changed:
        steepest, flattest = (EVIDENCE[f"steps_{name}"]["power"] for name in ("steepest", "flattest"))
        sentences.append(
            f"The best rate changes as steps^{CONSTANTS['steps_exponent'].value:.2f}; in single models the exponent "
            f"of the rates with the lowest losses was {steepest:.2f} to {flattest:.2f}, steeper in the two larger ones."
        )
    if "batch_size" in run.changed:
        power = CONSTANTS["batch_exponent"]
        sentences.append(
            f"The best rate changes as batch size^{power.value:.2f} at one number of steps, with a standard deviation "
            f"of {power.spread:.1f} in the exponent."
        )
    if "schedule" in run.changed:
        change = f"from {run.schedule} to {run.to_schedule}"
        sentences.append(
            f"The change of schedule {change} was not measured and is left out of the rate."
            if run.has_unmeasured_schedule
            else f"The rate includes the measured change of schedule {change}."
        )
    if advice.changed:
        sentences.append("The range is meant to hold the best rate of 90% of models.")
        if "cosine" in (run.schedule, run.to_schedule):
            tested, by_curves = EVIDENCE["cosine"], EVIDENCE["cosine_whole_curve"]
            sentences.append(
                f"Under cosine decay in SmolLM2-135M such ranges held {tested['in_stated_range']} of "
                f"{tested['ratios']} ratios of best rates by the lowest losses and {by_curves['in_stated_range']} by "
                "whole curves: there they may be too narrow."
            )
    return sentences


def _describe_limits(advice: TransferredSetting) -> list[str]:
    """Return a sentence on what was not measured."""
    if not advice.outside:
        return []
    return [
        f"Outside the measured range: {'; '.join(advice.outside)}. Try two or three rates from the range in full runs."
    ]


def _describe_horizon(advice: TransferredSetting, limits: HorizonLimits) -> list[str]:
    """Return sentences on the first step and a long run, where the displacement law does not apply."""
    old = advice.old
    # The two limits: a single step, and a long run in which the motion of A dominates.
    first_step, long_run = limits if advice.fixes_alpha else map(advice.lora_alpha_of, limits)
    if isclose(first_step, long_run):
        sentences = ["This preserves the first update, and the change in a long run."]
    else:
        value = f"the learning rate {long_run:.3g}" if advice.fixes_alpha else f"lora_alpha={long_run:.6g}"
        sentences = [
            f"This preserves the first update; in a long run, where the motion of A dominates, {value} preserves the "
            "change."
        ]
    if advice.is_sgd:
        # The first step preserves the rate times the square of gamma times the deviation of A, times the rank; a long
        # run the rate times gamma. Both together change the rate as the square of that deviation times the rank.
        new = advice.unchanged
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


def describe_regime(advice: TransferredSetting) -> str:
    """Return a phrase on whether the regime is assumed or measured."""
    if advice.regime != "measured":
        return f"assumed: {advice.regime}"
    count = len(advice.modules)
    return f"measured at {count} {'modules' if count > 1 else 'module'}"


def describe_rule(setting: Setting) -> str:
    """Return the name of a setting's rule."""
    return setting.rule if isinstance(setting.rule, str) else f"kappa {setting.rule:g}"


def describe_tuned(advice: TransferredSetting, tokens: str) -> str:
    """Return the heading of a table of the module groups: the tuned setting, the new rank and the regime.

    Args:
      advice: Advice to describe.
      tokens: Tokens at which a measured regime was measured, ``heldout`` or ``train``.
    """
    old = advice.old
    regime = describe_regime(advice)
    if advice.regime == "measured":
        regime += f", {tokens} tokens"
    return (
        f"Rank {old.rank} to {advice.unchanged.rank}, {describe_rule(old)}, alpha {old.alpha:g}, rate "
        f"{old.learning_rate:g}, {old.optimizer}, {old.init}; regime {regime}"
    )


def describe_alternatives(advice: TransferredSetting) -> str:
    """Return the heading of a table of the alternatives."""
    heading = f"Learning rate for common choices at rank {advice.unchanged.rank}"
    rule = describe_rule(advice.old)
    return heading if rule == "lora" else f"{heading}, under {rule} unless stated"


def describe_whole_model(advice: TransferredSetting) -> str:
    """Return sentences on the effect that the alphas of single modules have on the whole model's first step."""
    factor = step_ratio(advice.setting, advice.old, SIGNAL)
    return (
        "These alphas preserve the root mean square of each module's own output, cross-talk included. Cross-talk does "
        "not add up over modules, but the signal does: where the signal dominates, the first update of the whole model "
        f"is then {factor:.3g} times the tuned one."
    )
