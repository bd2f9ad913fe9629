"""Exact laws of an adapter's steps, with the samplers and the automatic differentiation that test them.

The first step: `first_step_moments` for given data, `random_input_moments` in the paper's setting, `crossing_rank`, the
sampler `estimate_moments` of a `RandomStep`, and the step itself by automatic differentiation, `take_first_step`. Later
steps: the modules `displacement` and `constant_gradient`. Everything is imported at first use, so that JAX is loaded
for the sampler and the step alone.
"""

from typing import TYPE_CHECKING

from rora_theory import lazy_modules

if TYPE_CHECKING:
    from rora_theory.laws import constant_gradient, displacement
    from rora_theory.laws.first_step import take_first_step
    from rora_theory.laws.moments import (
        FirstStepMoments,
        crossing_rank,
        equal_change_rank_exponent,
        first_step_moments,
        flat_kappa,
        linear_term,
        local_exponent,
        random_input_crossing_rank,
        random_input_moments,
    )
    from rora_theory.laws.sampling import RandomStep, estimate_moments

__all__ = [
    "FirstStepMoments",
    "RandomStep",
    "constant_gradient",
    "crossing_rank",
    "displacement",
    "equal_change_rank_exponent",
    "estimate_moments",
    "first_step_moments",
    "flat_kappa",
    "linear_term",
    "local_exponent",
    "random_input_crossing_rank",
    "random_input_moments",
    "take_first_step",
]

__getattr__, __dir__ = lazy_modules.attributes(
    __name__,
    {
        "FirstStepMoments": "rora_theory.laws.moments",
        "RandomStep": "rora_theory.laws.sampling",
        "crossing_rank": "rora_theory.laws.moments",
        "equal_change_rank_exponent": "rora_theory.laws.moments",
        "estimate_moments": "rora_theory.laws.sampling",
        "first_step_moments": "rora_theory.laws.moments",
        "flat_kappa": "rora_theory.laws.moments",
        "linear_term": "rora_theory.laws.moments",
        "local_exponent": "rora_theory.laws.moments",
        "random_input_crossing_rank": "rora_theory.laws.moments",
        "random_input_moments": "rora_theory.laws.moments",
        "take_first_step": "rora_theory.laws.first_step",
    },
)
