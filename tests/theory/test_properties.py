"""Property tests of the first step: autodiff against closed forms, and how far Eq. 9 is from the law."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rora_theory import scaling_factor
from rora_theory.inits import INITS, draw
from rora_theory.optimizers import OPTIMIZERS, make_optimizer, scaling_power
from rora_theory.paper import equations
from rora_theory.theory import first_step, laws

layers = st.fixed_dictionaries(
    {
        "shape": st.sampled_from([(1, 5, 4), (3, 1, 4), (3, 5, 1)]),  # rank, p_in, p_out
        "alpha": st.floats(0.1, 32),
        "rule": st.sampled_from(["lora", "rora", 0.25]),
        "overlap": st.floats(-1, 1),
        "init": st.sampled_from(INITS),
        "optimizer": st.sampled_from(OPTIMIZERS),
        "learning_rate": st.floats(1e-4, 1.0),
        "loss_reads": st.sampled_from(["output", "matrix"]),
        "seed": st.integers(0, 2**31 - 1),
    }
)


@pytest.mark.slow
@given(layers)
def test_autodiff_equals_the_closed_form(layer: dict) -> None:
    """-eta gamma^2 G A^T A (SGD) or -eta gamma sign(G A^T) A (Adam), applied to an input and to G; A does not move."""
    random, (rank, p_in, p_out) = np.random.default_rng(layer["seed"]), layer["shape"]
    scaling = scaling_factor(layer["rule"], alpha=layer["alpha"], rank=rank)
    is_adam = layer["optimizer"] == "adam"
    A = np.float32(draw(random, layer["init"], rank=rank, p_in=p_in))
    x, fresh = random.standard_normal((2, p_in), np.float32)
    x_next = np.float32(layer["overlap"] * x + math.sqrt(1 - layer["overlap"] ** 2) * fresh)
    delta = random.standard_normal(p_out, np.float32)
    grad = np.outer(delta, x)

    def loss(dm: first_step.Increment) -> jnp.ndarray:
        return jnp.vdot(delta, dm(jnp.asarray(x))) if layer["loss_reads"] == "output" else dm.inner(jnp.asarray(grad))

    step = first_step.run(
        loss,
        jnp.asarray(A),
        p_out=p_out,
        scaling=scaling,
        optimizer=make_optimizer(layer["optimizer"], layer["learning_rate"], epsilon=0.0),
    )
    np.testing.assert_array_equal(step.lora_A, A)

    wide_A, wide_x, wide_grad = (np.float64(value) for value in (A, x_next, grad))
    projections = wide_grad @ wide_A.T
    # No near-ties, whose sign rounding decides.
    assume(np.min(np.abs(projections)) > 1e-4 * np.max(np.abs(grad)) * np.max(np.abs(A)))
    factor = layer["learning_rate"] * scaling ** scaling_power(layer["optimizer"])
    increment = -factor * (np.sign(projections) if is_adam else projections) @ wide_A
    # Equal to float32 rounding: 40 roundings of 6e-8 of the sum of the terms' sizes. Adam's bias correction divides by
    # 1 - 0.999, whose float32 relative error is up to 3e-5; its root halves that.
    weights = np.ones_like(projections) if is_adam else np.abs(wide_grad) @ np.abs(wide_A).T
    size = factor * weights @ np.abs(wide_A)
    rounding = 1.8e-5 if is_adam else 2.4e-6
    for actual, expected, scale in (
        (step(jnp.asarray(x_next)), increment @ wide_x, size @ np.abs(wide_x)),
        (step.inner(jnp.asarray(grad)), np.vdot(wide_grad, increment), np.vdot(np.abs(wide_grad), size)),
    ):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=rounding * float(np.max(scale)) + 1e-30)


@given(
    rank=st.integers(1, 4096),
    p_in=st.integers(1, 4096),
    alpha=st.floats(0.1, 64),
    rule=st.sampled_from(["lora", "rora", 0.25]),
)
def test_eq9_lacks_the_cross_talk(rank: int, p_in: int, alpha: float, rule: str | float) -> None:
    """The law at overlap 0 is (p_in + r + 1) / r times Eq. 9."""
    gamma = scaling_factor(rule, alpha=alpha, rank=rank)
    exact = laws.random_input_moments(rank=rank, p_in=p_in, scaling=gamma).second_moment[0]
    printed = equations.eq9_variance(1.0, rank=rank, p_in=p_in, scaling=gamma, learning_rate=1.0)
    assert exact / printed == pytest.approx((p_in + rank + 1) / rank, rel=1e-12)
