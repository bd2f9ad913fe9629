"""Signal, cross-talk and the one-row form of the law; steps with shared rows against autodiff and the law."""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rora_theory import InputError, laws
from rora_theory.laws.first_step import take_first_step
from rora_theory.laws.random.draws import draw_A
from rora_theory.measure.regimes import drawn_steps, terms
from rora_theory.measure.regimes.layer import Layer
from rora_theory.optimizers import OPTIMIZERS, Optimizer, make_optimizer


@pytest.fixture(scope="module")
def layer() -> Layer:
    """Return four samples with one output without a gradient, and inputs from parallel to independent."""
    random = np.random.default_rng(1)
    x = random.normal(size=(4, 20)) * np.geomspace(0.3, 3, 20)
    grad = random.normal(size=(6, 4)) @ x
    grad[2] = 0
    fresh = random.normal(size=(5, 20))
    return Layer("m", grad.astype(np.float32), {"train": x.astype(np.float32), "heldout": fresh.astype(np.float32)})


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("init", ["kaiming_uniform", "gaussian", "normal", "rademacher"])
@pytest.mark.parametrize("epsilon", [0.0, 1e-8, 1e-2])
def test_rms_is_the_law_rank_by_rank(layer, optimizer, init, epsilon) -> None:
    """At 1e-2 epsilon changes Adam's rms by percents; at 1e-8 by less than the promised 1e-4."""
    ranks, scalings = (1, 3, 64), (2.0, 0.7, 0.1)
    x = layer.inputs["heldout"]
    law = terms.compute_terms(layer.grad, x, optimizer=optimizer, init=init)
    by_rank = law.rms(ranks, scalings, learning_rate=0.3, epsilon=epsilon)
    for rank, scaling, rms in zip(ranks, scalings, by_rank, strict=True):
        moments = laws.first_step_moments(
            layer.grad, x, rank=rank, scaling=scaling, learning_rate=0.3, optimizer=optimizer, init=init,
            epsilon=epsilon if optimizer == "adam" else 0.0,
        )  # fmt: skip
        tolerance = 1e-4 if epsilon == 1e-8 else 1e-9
        np.testing.assert_allclose(rms, np.sqrt(np.mean(moments.second_moment, axis=1)), rtol=tolerance)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_crossing(layer, optimizer) -> None:
    """Signal and cross-talk follow their definitions. With Gaussian A the linear term is r* + 1 and r* - 2."""
    x = np.float64(layer.inputs["heldout"])
    inputs = np.concatenate([layer.inputs["train"], layer.inputs["heldout"]])
    crossing = terms.compute_terms(layer.grad, inputs, optimizer=optimizer, init="normal").crossing(slice(4, None))
    grad = np.float64(layer.grad)
    if optimizer == "adam":
        rows = np.linalg.norm(grad, axis=1)
        grad = grad[rows > 0] / rows[rows > 0, None]
    signal, noise = np.sum((x @ grad.T) ** 2, axis=1), np.sum(grad**2) * np.sum(x**2, axis=1)
    assert crossing.signal == pytest.approx(np.mean(signal), rel=1e-9)
    assert crossing.cross_talk == pytest.approx(np.mean(noise), rel=1e-9)
    start, factor, excess = (0, 1, 1) if optimizer == "sgd" else (1, np.pi / 2, -2)
    assert crossing.rank == pytest.approx(start + factor * np.mean(noise) / np.mean(signal), rel=1e-9)
    assert crossing.linear_term == pytest.approx(crossing.rank + excess, rel=1e-9)
    quartiles = np.quantile(start + factor * noise / signal, [0.25, 0.5, 0.75])
    assert crossing.quartiles == pytest.approx(tuple(quartiles), rel=1e-9)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("init", ["kaiming_uniform", "gaussian", "normal", "rademacher"])
@pytest.mark.parametrize("size", [1.0, 1e-25])
def test_fast_terms_equal_the_terms(layer, optimizer, init, size) -> None:
    """They agree to float32's rounding for any size of the gradient, with an output that has none."""
    x = layer.inputs["heldout"]
    fast = terms.FastTerms(layer.grad * np.float32(size), x).terms(optimizer, init)
    expected = terms.compute_terms(np.float64(layer.grad) * size, x, optimizer=optimizer, init=init)
    for name in ("crossing_ranks", "cross_talk", "squared_mean", "mean_square"):
        np.testing.assert_allclose(getattr(fast, name), getattr(expected, name), rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_token_whose_input_is_zero_has_no_crossing_rank(layer, optimizer) -> None:
    """Such as a black patch of an image: the crossing rank is that of the other tokens."""
    x = layer.inputs["heldout"]
    padded = np.concatenate([x, np.zeros_like(x[:1])])
    exact = [terms.compute_terms(layer.grad, inputs, optimizer=optimizer, init="normal") for inputs in (padded, x)]
    fast = [terms.FastTerms(layer.grad, inputs).terms(optimizer, "normal") for inputs in (padded, x)]
    for laws_of_inputs in (exact, fast):
        crossing, expected = (law.crossing() for law in laws_of_inputs)
        assert crossing.rank == pytest.approx(expected.rank, rel=1e-5)
        assert crossing.quartiles == pytest.approx(expected.quartiles, rel=1e-5)
        assert crossing.linear_term == pytest.approx(expected.linear_term, rel=1e-5)
        assert crossing.signal == pytest.approx(expected.signal * 5 / 6, rel=1e-5)


def test_fast_terms_of_non_finite_numbers(layer) -> None:
    grad = layer.grad.copy()
    grad[1, 2] = np.nan
    with pytest.raises(InputError, match=r"grad and x .*finite"):
        terms.FastTerms(grad, layer.inputs["heldout"])


@pytest.mark.slow
@pytest.mark.parametrize("init", ["kaiming_uniform", "gaussian"])
def test_shared_rows_are_adapters_of_autodiff(layer, init) -> None:
    """The second block is distributed by hand and stepped by `take_first_step`, which has no shortcut."""
    key, ranks, rows = jax.random.key(3), (1, 3, 8), 8
    scalings = [[2.0, 0.5], [1.0, 0.25], [0.5, 4.0]]
    grad = jnp.asarray(layer.grad)

    @partial(jax.jit, static_argnames="name")
    def step_by_autodiff(lora_A: jax.Array, gamma: jax.Array, name: Optimizer) -> jax.Array:
        optimizer = make_optimizer(name, 0.3, epsilon=1e-2)
        step = take_first_step(lambda dm: dm.inner(grad), lora_A, p_out=6, scaling=gamma, optimizer=optimizer)
        return jnp.stack([jnp.mean(step(jnp.asarray(x)) ** 2) for x in layer.inputs.values()])

    stream = drawn_steps.step_adapters(
        layer, key, ranks=ranks, scalings=scalings, optimizers=OPTIMIZERS, learning_rate=0.3, init=init, rows=rows,
        epsilon=1e-2,
    )  # fmt: skip
    _, blocks = next(stream), next(stream)
    drawn = np.asarray(draw_A(jax.random.fold_in(key, 1), init, rank=rows, p_in=20), np.float64)
    for rank, gammas, block in zip(ranks, scalings, blocks, strict=True):
        assert block.shape == (rows // rank, 2, 2, 2)
        # "gaussian" has deviation 1/r, and the rows were drawn at rank 8.
        rescaled = drawn * (rows / rank if init == "gaussian" else 1)
        for adapter, (g, gamma), (o, name) in product(range(rows // rank), enumerate(gammas), enumerate(OPTIMIZERS)):
            lora_A = jnp.asarray(rescaled[adapter * rank : (adapter + 1) * rank], jnp.float32)
            expected = step_by_autodiff(lora_A, jnp.float32(gamma), name)
            # Optax's bias correction 1 - 0.999 has a relative rounding of 6e-5 in float32.
            np.testing.assert_allclose(block[adapter, g, o], expected, rtol=1e-4)
