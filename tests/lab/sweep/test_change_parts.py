"""The two parts of a trained adapter's change against explicit weights, and the exponent that they give."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny

from rora_theory.errors import InputError
from rora_theory.lab import llama
from rora_theory.lab.adapters import LoraAdapter, LoraConfig
from rora_theory.lab.data.batches import Examples
from rora_theory.lab.sweep import change_parts
from rora_theory.laws import constant_gradient

CONFIG = tiny.CONFIG
PARAMS = tiny.params()


def examples(rows: list[list[int]]) -> Examples:
    tokens, offsets = np.concatenate(rows), np.cumsum([0, *map(len, rows)])
    return Examples(tokens, offsets, np.ones(len(tokens), bool), truncated=0, skipped=0)


def randomised(seed: int, adapter: LoraAdapter) -> LoraAdapter:
    """Return the adapter with every entry drawn anew."""
    random = np.random.default_rng(seed)
    return adapter.replace(jax.tree.map(lambda a: random.normal(size=a.shape).astype(np.float32), adapter.params))


@pytest.fixture(scope="module")
def start() -> LoraAdapter:
    config = LoraConfig(3, 6, rule="lora", target_modules=("q_proj", "down_proj"), layers=(1,))
    return randomised(1, config.build(jax.random.key(1), CONFIG, PARAMS))


@pytest.fixture(scope="module")
def inputs(start) -> dict[str, np.ndarray]:
    random = np.random.default_rng(2)
    layers = CONFIG.num_hidden_layers
    return {name: random.normal(size=(layers, 11, CONFIG.module_shape(name)[1])) for name in start.params}


def rms(*changes: np.ndarray) -> list[np.ndarray]:
    """Return the root mean square over the last axis, one value for each module."""
    return [np.sqrt(np.mean(np.atleast_2d(change) ** 2, axis=1)) for change in changes]


def test_parts_are_those_of_the_whole_products(start, inputs) -> None:
    """A sink, with an input a hundred times the others', is left out; a layer without an adapter has no row."""
    trained = randomised(3, start)
    with_sink = {name: np.concatenate([x, 100 * x[:, :1]], axis=1) for name, x in inputs.items()}
    measured = change_parts.compute_part_rms(start, trained, with_sink)
    assert measured[["layer", "module"]].to_numpy().tolist() == [[1, "self_attn.q_proj"], [1, "mlp.down_proj"]]
    for row in measured.to_dict("records"):
        first, last = (adapter.params[row["module"]] for adapter in (start, trained))
        B, x = last["lora_B"][1], inputs[row["module"]][1]
        for part, A in (
            ("B_part", first["lora_A"][1]),
            ("A_part", last["lora_A"][1] - first["lora_A"][1]),
            ("whole", last["lora_A"][1]),
        ):
            change = 2.0 * x @ (B.astype(np.float64) @ A).T  # gamma = 6 / 3
            assert row[part] == pytest.approx(np.sqrt(np.mean(change**2)), rel=1e-5), part


def test_the_exponent_is_the_laws_where_the_parts_have_one_direction() -> None:
    for rho in (0.0, 0.3, 1.0, 20.0):
        exponent = change_parts.preserving_exponent(*(np.array([size]) for size in (2.0, 2 * rho, 2 * (1 + rho))))
        assert exponent[0] == pytest.approx(constant_gradient.rate_exponents(rho).scaling)


def test_the_exponent_preserves_the_change_of_two_parts_at_any_angle() -> None:
    """A small factor of gamma r and the corresponding factor of the rate leave the rms unchanged."""
    b, a = np.random.default_rng(4).normal(size=(2, 50))
    slope = change_parts.preserving_exponent(*rms(b, a, a + b))[0]
    step = 1e-5
    rate = (1 + step) ** slope
    before, after = rms(a + b, (1 + step) * (rate * b + rate**2 * a))
    assert np.log(after / before) == pytest.approx(0, abs=1e-9)
    assert -1 < slope < -0.5


def test_the_factor_preserves_the_change_of_all_modules() -> None:
    """The reference is the parts of three modules.

    The factor is the law's if they are parallel, and has its slope at 1.
    """
    b, a = np.random.default_rng(5).normal(size=(2, 3, 40))
    parts = rms(b, a, a + b)
    for gain in (11.3, 1.0, 0.2):
        y = change_parts.preserving_factor(gain, *parts)
        assert gain * np.sqrt(np.mean((y * b + y**2 * a) ** 2)) == pytest.approx(np.sqrt(np.mean((a + b) ** 2)))
    alike = [np.array([size, 2 * size]) for size in (1.0, 0.7, 1.7)]
    assert change_parts.preserving_factor(11.3, *alike) == pytest.approx(constant_gradient.rate_factor(11.3, 0.7))
    slope = np.log(change_parts.preserving_factor(1 + 1e-6, *alike)) / 1e-6
    assert slope == pytest.approx(change_parts.preserving_exponent(*alike)[0], abs=1e-5)


def test_no_rate_is_returned_beyond_a_range_in_which_the_change_shrinks() -> None:
    """Two parts are nearly or exactly opposite; before and behind that range the factor is the change's own."""
    for gain, *parts in ((2.0, 1.0, 1.0, 0.1), (0.5, 1.0, 0.5, 0.5), (0.1, 1.0, 0.1, 0.9), (0.5, 1.0, 0.8, 0.2)):
        assert np.isnan(change_parts.preserving_factor(gain, *np.reshape(parts, (3, 1))))
    for gain, a in ((2.0, 0.1), (0.8, 0.1), (1.5, 8.0), (0.5, 8.0)):
        y = change_parts.preserving_factor(gain, *np.reshape([1.0, a, abs(1 - a)], (3, 1)))
        # Roots of gain (y - a y^2) = 1 - a: the smaller one before the range, the larger one behind it.
        root = np.sqrt(1 - 4 * a * (1 - a) / gain) * (-1 if a < 1 else 1)
        assert y == pytest.approx((1 + root) / (2 * a), rel=1e-9)
    rounded = change_parts.preserving_factor(4.0, *np.reshape([1.0, 0.0, 0.99999], (3, 1)))
    assert rounded == pytest.approx(0.25, rel=1e-4)


def test_inputs_are_those_of_the_records_own_tokens(start) -> None:
    """Inputs are the base model's behind the common beginning of all records; the last token is only predicted."""
    rows = [[5, 6, 7, 8, 9, 1], [5, 6, 3, 8], [5, 6, 3, 2, 4]]
    _, expected = llama.hidden_states(PARAMS, jnp.array([rows[0][:-1]]), CONFIG, capture=("mlp.down_proj",))
    x = change_parts.module_inputs(PARAMS, CONFIG, examples(rows), start)["mlp.down_proj"]
    assert x.shape[1] == 3 + 1 + 2
    np.testing.assert_allclose(x[:, :3], expected["mlp.down_proj"][:, 0, 2:], rtol=2e-5, atol=1e-6)
    x = change_parts.module_inputs(PARAMS, CONFIG, examples(rows), start, records=2)["mlp.down_proj"]
    assert x.shape[1] == 3 + 1
    two_share = [[5, 6, 7, 0], [5, 6, 8, 0], [5, 9, 1, 0]]
    x = change_parts.module_inputs(PARAMS, CONFIG, examples(two_share), start)["mlp.down_proj"]
    assert x.shape[1] == 2 + 2 + 2, "the third differs from what two of them share"


def test_bad_input(start, inputs) -> None:
    with pytest.raises(InputError, match=r"examples .* 2 "):
        change_parts.module_inputs(PARAMS, CONFIG, examples([[5, 6, 7]] * 2), start)
    with pytest.raises(InputError, match=r"gain_ratio .* 0\.0"):
        change_parts.preserving_factor(0.0, *np.ones((3, 1)))
    with pytest.raises(InputError, match=r"use_dora .* true"):
        change_parts.compute_part_rms(start, replace(start, config=replace(start.config, use_dora=True)), inputs)
