"""Policies that carry a tuned learning rate to another rank, G = gamma r or number of steps, and absolute rates."""

import math
from collections.abc import Callable, Mapping, Sequence

from rora_theory import laws
from rora_theory.advice.best_rate import RateRange, Run, transfer_rate
from rora_theory.advice.constants import CONSTANTS
from rora_theory.advice.setting import rank_growth
from rora_theory.evidence.best_rates import estimate_exponent
from rora_theory.evidence.sweeps import Sweep
from rora_theory.laws import constant_gradient
from rora_theory.laws.displacement import best_rate_factor

RatePolicy = Callable[[Run, Run, float], float]
"""Learning rate for the new run, from the old run, the new one and the rate tuned in the old one."""

RateFactor = Callable[[int, float, int, float], float]
"""Factor of the best rate, from the old rank, the old G = gamma r, the new rank and the new G."""

CROSSING_RANK = 10.0
"""Median over modules of the rank at which signal and cross-talk of Adam's first step are equal.

It is 9.2 to 10.6 in SmolLM2-135M and Gemma 3 270M, on training and held-out batches (``results/published/regime``,
``regime_held_out`` and ``regime_gemma``).
"""


RangedRateFactor = Callable[[int, float, int, float], RateRange]
"""Factor of the best rate with its range, from the arguments of `RateFactor`."""


def rate_policy(factor: RateFactor) -> RatePolicy:
    """Return the policy that multiplies the tuned rate by a factor."""
    return lambda old, new, rate: rate * factor(old.rank, old.gain, new.rank, new.gain)


def power_of_gain(power: float) -> RateFactor:
    """Return the policy that scales the rate by a power of G; 0 keeps the rate."""
    return lambda _, old_gain, __, gain: (gain / old_gain) ** power


def first_step_with_cross_talk(crossing_rank: float = CROSSING_RANK) -> RateFactor:
    r"""Return the policy that preserves the size of Adam's first step.

    Its mean square is proportional to :math:`(\eta G)^2 (1 + c / r)`, with the linear term c of the crossing rank
    (`rora_theory.advice.setting`).

    Args:
      crossing_rank: Rank at which signal and cross-talk are equal.
    """
    # The linear term of Gaussian and uniform A.
    linear_term = float(laws.linear_term(crossing_rank, optimizer="adam"))

    def factor(old_rank: int, old_gain: float, rank: int, gain: float) -> float:
        scaling_ratio = (gain / rank) / (old_gain / old_rank)
        return 1 / (scaling_ratio * rank_growth(old_rank, rank, linear_term))

    return factor


def displacement_law(constant: float | None = None) -> RateFactor:
    """Return the policy of the displacement law.

    Args:
      constant: Displacement constant K; by default that of the advice, from our three models.
    """
    chosen = CONSTANTS["displacement_constant"].value if constant is None else constant

    def factor(_: int, old_gain: float, __: int, gain: float) -> float:
        return best_rate_factor(old_gain, gain, displacement_constant=chosen)

    return factor


def with_rank(policy: RateFactor, power: float) -> RateFactor:
    """Return a policy whose rate is multiplied by a power of the rank."""
    return lambda old_rank, old_gain, rank, gain: policy(old_rank, old_gain, rank, gain) * (rank / old_rank) ** power


def with_crossing_rank(policy: RateFactor) -> RateFactor:
    r"""Return a policy whose rate is multiplied by the effect of the rank on Adam's first step at one G.

    The factor is :math:`\sqrt{(1 + c / r) / (1 + c / r')}`, see `first_step_with_cross_talk`: a lower rank has more
    cross-talk.
    """
    step = first_step_with_cross_talk()
    return lambda old_rank, old_gain, rank, gain: (
        policy(old_rank, old_gain, rank, gain) * step(old_rank, 1.0, rank, 1.0)
    )


def advised(old_rank: int, old_gain: float, rank: int, gain: float) -> float:
    """Return the factor of `rora_theory.transfer`."""
    return advised_range(old_rank, old_gain, rank, gain).best


def advised_range(old_rank: int, old_gain: float, rank: int, gain: float) -> RateRange:
    """Return the factor of `rora_theory.transfer` with the range that it states."""
    return transfer_rate(1.0, Run(old_rank, old_gain), Run(rank, gain))


POWERS_OF_GAIN: Mapping[str, float] = {"keep the rate": 0.0, "first step": -1.0, "square root": -0.5, "G^-0.75": -0.75}
"""Policies that are a power of G, by name, with that power."""

POLICIES: Mapping[str, RateFactor] = {
    **{name: power_of_gain(power) for name, power in POWERS_OF_GAIN.items()},
    "step with cross-talk": first_step_with_cross_talk(),
    "displacement law": displacement_law(),
    "law with cross-talk": with_crossing_rank(displacement_law()),
    "advice": advised,
}
"""Policies without a constant that was fitted to public sweeps, by name.

The first step without cross-talk is proportional to G. ``advice`` is the rate of `rora_theory.transfer`.
"""

LEFT_OUT = "advice, left out"
"""Name of the advice whose exponent in the rank was fitted without the model that is judged."""

ORIGINS: Mapping[str, str] = {
    "keep the rate": "none",
    "first step": "none",
    "square root": "none",
    "G^-0.75": "the power was chosen after the runs of SmolLM2-135M",
    "step with cross-talk": "crossing rank of SmolLM2-135M and Gemma 3 270M",
    "displacement law": "K of our three models",
    "law with cross-talk": "K of our three models; crossing rank of SmolLM2-135M and Gemma 3 270M",
    "displacement": "K of the runs that are judged",
    "displacement and steps": "K of the runs that are judged; the power -1/2 of the steps is that of a random walk",
    "advice": "K of three of our models and the steps' power of four; the rank's power of 14 public models",
    LEFT_OUT: "K of our three models; the rank's power of Tinker's other models",
    "constant gradient": "crossing distance of the model's first step",
}
"""Where the constants of each policy come from."""

FIRST_RANK = 4
"""Lowest rank from which the exponent is fitted, as that of the advice."""


def policies_for(sweep: Sweep, others: Sequence[Sweep]) -> dict[str, RateFactor]:
    """Return all policies for one sweep, with constants that were fitted without it.

    Args:
      sweep: Sweep on which the policies are judged.
      others: Sweeps to which the exponent in the rank is fitted. Those of the same model are left out.

    Returns:
      The policies by name.
    """
    left = [other for other in others if other.model != sweep.model]
    fitted, _, _ = estimate_exponent(left, ranks=(FIRST_RANK, math.inf))
    return {**POLICIES, LEFT_OUT: with_rank(POLICIES["displacement law"], fitted.value)}


def measured_policies(
    constants: Mapping[int, float], *, crossing_distance: float | None = None
) -> dict[str, RatePolicy]:
    """Return the policies that are compared on runs of a model that were measured themselves, by name.

    Args:
      constants: Displacement constant K of the model by number of steps; the nearest number in log is used. If empty,
        the policies of the displacement law with a measured constant are left out.
      crossing_distance: Median crossing distance of the model's modules; None leaves the constant-gradient law out.

    Returns:
      Policies that leave the rate alone when the number of steps changes (``keep the rate``, ``first step``,
      ``square root``, ``G^-0.75``, ``displacement``, ``constant gradient``), ``displacement and steps``, and
      ``advice``: the rate of `rora_theory.transfer`, whose constants are the default ones and not those of the runs.
    """

    # The displacement law, with the constant measured at about this number of steps.
    def displacement_rate(old: Run, new: Run, rate: float) -> float:
        # A number of steps without a constant uses that of the nearest one.
        steps = min(constants, key=lambda steps: abs(math.log(steps / _steps(old))))
        return rate_policy(displacement_law(constants[steps]))(old, new, rate)

    # The displacement law, with the random walk's exponent in the steps.
    def displacement_and_steps_rate(old: Run, new: Run, rate: float) -> float:
        return displacement_rate(old, new, rate) * (_steps(new) / _steps(old)) ** -0.5

    # The law of a constant gradient: the change at the horizon stays the same. rate * steps / crossing_distance is the
    # ratio of the A part to the B part at the old horizon.
    def constant_gradient_rate(old: Run, new: Run, rate: float) -> float:
        assert crossing_distance is not None
        return rate * constant_gradient.rate_factor(new.gain / old.gain, rate * _steps(old) / crossing_distance)

    by_name = {name: rate_policy(POLICIES[name]) for name in POWERS_OF_GAIN}
    if constants:
        by_name |= {"displacement": displacement_rate, "displacement and steps": displacement_and_steps_rate}
    # The rate that `rora_theory.transfer` returns does not depend on a schedule that both runs share.
    by_name["advice"] = lambda old, new, rate: transfer_rate(rate, old, new).best
    return by_name if crossing_distance is None else by_name | {"constant gradient": constant_gradient_rate}


def _steps(run: Run) -> int:
    assert run.steps is not None, "a measured run has a number of steps"
    return run.steps


def cookbook_rate(model: str, hidden_size: int) -> float | None:
    r"""Compute the learning rate of tinker-cookbook's formula, for LoRA with alpha 32 at any rank.

    .. math:: \eta = 5 \cdot 10^{-5} \cdot 10 \cdot (2000 / h)^p

    with the hidden size h, and p = 0.781 for Llama models and 0.0775 for Qwen models.

    Args:
      model: Name of the model.
      hidden_size: Hidden size of the model.

    Returns:
      The learning rate; None for other families, for which there is no formula.

    References:
      thinking-machines-lab/tinker-cookbook, ``tinker_cookbook/hyperparam_utils.py`` (``get_lr``,
      ``get_lora_lr_over_full_finetune_lr``), commit 9dfcc3a2cf44.

    Examples:
      >>> round(cookbook_rate("meta-llama/Llama-3.1-8B", 4096), 7)
      0.0002856
    """
    name = model.lower()
    power = 0.781 if "llama" in name else 0.0775 if "qwen" in name else None
    return None if power is None else 5e-5 * 10 * (2000 / hidden_size) ** power
