"""Tokens that count, figures of one module within their stated errors, and the distance at which A takes over."""

import tracemalloc
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from rora_theory import inits
from rora_theory.inits import Init
from rora_theory.laws import constant_gradient
from rora_theory.measure import tokens
from rora_theory.measure.regimes import module_regime, terms
from rora_theory.measure.regimes.layer import SPLITS, Layer
from rora_theory.measure.regimes.module_regime import RegimeConfig


def test_a_sink_is_ten_times_the_median() -> None:
    np.testing.assert_array_equal(tokens.mark_sinks(np.array([1, 9.9, 1, 10.1, 1])), [False, False, False, True, False])
    # Inputs of zero, as of black image patches, do not make the others sinks.
    np.testing.assert_array_equal(tokens.mark_sinks(np.array([0, 0, 0, 1, 1.1])), np.zeros(5, bool))
    np.testing.assert_array_equal(tokens.mark_sinks(np.zeros(2)), np.zeros(2, bool))


def test_a_sample_is_the_same_in_every_module() -> None:
    """The sample has each unmasked token once, in ascending order, or all of them if there are fewer."""
    masked = np.array([False, True] * 10)
    sample = tokens.sample_tokens(6, 0, masked)
    assert len(sample) == 6
    assert (np.diff(sample) > 0).all()
    assert not masked[sample].any()
    np.testing.assert_array_equal(sample, tokens.sample_tokens(6, 0, masked))
    assert sample.tolist() != tokens.sample_tokens(6, 1, masked).tolist()
    np.testing.assert_array_equal(tokens.sample_tokens(64, 0, masked), np.flatnonzero(~masked))


@pytest.mark.parametrize("init", ["kaiming_uniform", "gaussian"])
def test_crossing_distance_is_the_law_of_a_at_its_own_deviation(init) -> None:
    """Each split and rank agrees with rows drawn at that rank's deviation, which falls as 1/r for `gaussian`."""
    random = np.random.default_rng(0)
    x = random.normal(size=(6, 20))
    grad = (random.normal(size=(7, 6)) @ x).astype(np.float32)
    layer = Layer("m", grad, {"train": x.astype(np.float32), "heldout": random.normal(size=(4, 20)).astype(np.float32)})

    def crossing_distances(**changed) -> list[dict]:
        config = RegimeConfig(inits=(init,), rows=0, **{"seed": 3} | changed)
        # The rows of an exact measurement, of which there are more.
        draw = partial(draw_rows, replace(config, exact=True), layer)
        return module_regime.measure_crossing_distances(config, layer, 5, draw)

    exact = crossing_distances(exact=True)
    assert [(row["layer"], row["split"], row["rank"]) for row in exact] == [
        (5, split, rank) for split in ("train", "heldout") for rank in (8, 32, 128)
    ]
    drawn = draw_rows(RegimeConfig(rows=0, seed=3, exact=True), layer, init)  # the very draws
    for row in exact:
        lora_A = drawn * (256 / row["rank"] if init == "gaussian" else 1)
        law = constant_gradient.row_terms(grad, layer.inputs[row["split"]], lora_A)
        assert row["crossing_distance"] == pytest.approx(law.crossing_distance(row["rank"]), rel=1e-6)
        assert [row[f"turn_{n}"] for n in (5, 25, 50, 75, 95)] == pytest.approx(
            list(law.sign_change_distances), rel=1e-6
        )
    assert len({row["crossing_distance"] for row in exact}) == 6
    for row, expected in zip(crossing_distances(), exact, strict=True):
        assert row["crossing_distance"] == pytest.approx(
            expected["crossing_distance"], rel=module_regime.MAX_RELATIVE_ERRORS["crossing_distance"]
        )
        assert not [name for name in row if name.startswith("turn")]
    assert (RegimeConfig(rows=0).distance_rows, len(drawn)) == (64, 256)
    other_draws = crossing_distances(seed=4)[0]["crossing_distance"]
    assert other_draws == pytest.approx(exact[0]["crossing_distance"], rel=0.3)
    assert other_draws != pytest.approx(exact[0]["crossing_distance"], rel=1e-6)


def draw_rows(config: RegimeConfig, layer: Layer, init: Init) -> np.ndarray:
    """Return the rows of A from which crossing distances are computed."""
    random = np.random.default_rng(config.seed)
    return inits.draw(random, init, rank=config.distance_rows, p_in=layer.grad.shape[1])


def check_stated_errors(layer: Layer) -> None:
    """Compare the default with exact=True for every optimizer and init, on one draw of A's rows."""
    config = RegimeConfig(ranks=(8,), rules=("lora",), rows=0)
    draw = partial(draw_rows, config, layer)
    fast, exact = (
        module_regime.measure_module(replace(config, exact=exact), layer, 0, draw) for exact in (False, True)
    )
    assert fast.results == []
    assert len(exact.results) == 8
    figures = {
        name for row in (fast.crossings[0], fast.crossing_distances[0]) for name in row if isinstance(row[name], float)
    }
    assert figures == set(module_regime.MAX_RELATIVE_ERRORS)
    for figure, bound in module_regime.MAX_RELATIVE_ERRORS.items():
        table = "crossing_distances" if figure == "crossing_distance" else "crossings"
        for row, expected in zip(getattr(fast, table), getattr(exact, table), strict=True):
            assert row[figure] == pytest.approx(expected[figure], rel=bound)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["0.mlp.down_proj", "15.self_attn.q_proj"])
def test_figures_of_real_layers_are_within_the_stated_error(layer_data, name) -> None:
    module = f"model.layers.{name}"
    with np.load(layer_data) as arrays:
        inputs = {split: arrays[f"{module}/x_{split}"].astype(np.float32) for split in SPLITS}
        check_stated_errors(Layer(module, arrays[f"{module}/grad"].astype(np.float32), inputs))


def random_layer(p_out: int, p_in: int) -> Layer:
    """Return a layer with a row of zeros and columns of very different sizes, so that some entries are large."""
    random = np.random.default_rng(0)
    grad, *inputs = (random.normal(size=(rows, p_in)).astype(np.float32) for rows in (p_out, 6, 5))
    grad *= np.float32(10.0) ** random.normal(scale=0.5, size=p_in).astype(np.float32)
    grad[3] = 0
    return Layer("m", grad, dict(zip(("train", "heldout"), inputs, strict=True)))


def test_figures_of_many_blocks_are_within_the_stated_error(monkeypatch) -> None:
    """The gradient is read in blocks of 7 rows, the last of 5."""
    monkeypatch.setattr(terms, "BLOCK_ENTRIES", 7 * 400)
    monkeypatch.setattr(terms, "MIN_BLOCK_ROWS", 1)
    check_stated_errors(random_layer(40, 400))


def test_memory_is_below_that_of_the_gradient() -> None:
    """The limit is NumPy's peak beyond gradient and inputs; one float32 copy of the gradient would exceed it."""
    layer, config = random_layer(3000, 2000), RegimeConfig(rows=0)
    draw = {init: inits.draw(np.random.default_rng(0), init, rank=64, p_in=2000) for init in config.inits}
    tracemalloc.start()
    try:
        module_regime.measure_module(config, layer, 0, lambda init: draw[init])
        assert tracemalloc.get_traced_memory()[1] < 0.8 * layer.grad.nbytes
    finally:
        tracemalloc.stop()
