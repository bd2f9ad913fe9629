"""Held-out tokens that count, the frames of a tiny model's regime, and the distance at which A takes over."""

import tracemalloc
from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import pytest
from support import checkpoint

from rora_theory import InputError, inits
from rora_theory.lab.data.batches import Batch
from rora_theory.lab.llama import Model, load
from rora_theory.laws import constant_gradient
from rora_theory.laws.random.draws import draw_A, stream_key
from rora_theory.measure import tokens, unseen
from rora_theory.measure.layers import drawn_steps
from rora_theory.measure.layers.layer_data import Layer, read_layers
from rora_theory.measure.layers.model_layers import record
from rora_theory.measure.regimes import model as regimes
from rora_theory.measure.regimes import module_regime, terms
from rora_theory.measure.regimes.module_regime import RegimeConfig
from rora_theory.measure.regimes.thin import ThinWarning

pytestmark = pytest.mark.filterwarnings("ignore::rora_theory.measure.regimes.thin.ThinWarning")  # so few tokens
TARGETS = ("q_proj", "down_proj")
SMALL = RegimeConfig(ranks=(1, 4), rules=("lora",), rows=0, tokens=9, exact=True, alpha=1e4)  # far above Adam's epsilon
TEMPLATE = [1, 5, 6, 7]


def batch(*rows: list[int], width: int = 8) -> Batch:
    """Return rows padded with 0, in which every token except the last has a target."""
    inputs, weights = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), np.float32)
    for i, row in enumerate(rows):
        inputs[i, : len(row)], weights[i, : len(row)] = row, 1
    return Batch(inputs, np.roll(inputs, -1, axis=1), weights, None)


TRAIN = batch([*TEMPLATE, 9, 10], [*TEMPLATE, 11, 12, 13])
HELD_OUT = batch([*TEMPLATE, 10, 10, 8], [*TEMPLATE, 11, 14], [*TEMPLATE, 9, 10, 0, 3], width=16)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    return load(checkpoint.model(tmp_path_factory.mktemp("model")))


def test_seen_tokens_are_the_beginning_of_a_trained_row() -> None:
    """Seen tokens are the template and tokens that continue as one trained row does; tokens at other places and
    padding are not.
    """
    seen = unseen.mark_seen(HELD_OUT, [TRAIN])
    np.testing.assert_array_equal(seen.sum(axis=1), [4, 5, 6])
    assert seen[:, :4].all()  # beginnings
    assert not unseen.mark_seen(batch([2, *TEMPLATE]), [TRAIN]).any()
    both = batch([*TEMPLATE, 11, 12, 13, 15])
    assert unseen.mark_seen(both, [batch([1, 2]), TRAIN]).sum() == 7


@pytest.mark.slow
def test_a_batch_without_an_unseen_token_is_refused(model) -> None:
    """The template alone, or the training batch itself, leaves no token, as padding does not count.

    It is refused before anything is measured.
    """
    unseen.check_unseen(HELD_OUT, [TRAIN])
    with pytest.raises(InputError, match="all 4 held-out tokens"):
        unseen.check_unseen(batch(TEMPLATE), [TRAIN])
    with pytest.raises(InputError, match="every held-out token within --cutoff"):
        unseen.mask_seen(TRAIN, [TRAIN])
    for held_out, count in ((TRAIN, 13), (batch(TEMPLATE), 4)):
        with pytest.raises(InputError, match=f"{count} held-out tokens: {count} "):
            regimes.regime(model, TRAIN, held_out, SMALL, target_modules=TARGETS)


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


def check_crossings(measured: module_regime.Regime) -> None:
    """Check that r* is the ratio of its definition, and that predictions at ranks 1 and 4 follow the linear term."""
    keys = ["module", "split", "optimizer", "init"]
    predicted = measured.results.pivot(index=keys, columns="rank", values="predicted")
    for row in measured.crossings.to_dict("records"):
        is_sgd, c = row["optimizer"] == "sgd", row["linear_term"]
        ratio = row["cross_talk"] / row["signal"]
        assert row["crossing_rank"] == pytest.approx(ratio if is_sgd else 1 + np.pi / 2 * ratio, rel=1e-9)
        assert row["lower_quartile"] <= row["median"] <= row["upper_quartile"]
        # Gamma falls by 4, once under Adam and squared under SGD, and so does the deviation of `gaussian`.
        strength = (1 / 16 if row["init"] == "gaussian" else 1 / 4) ** (2 if is_sgd else 1)
        first, fourth = predicted.loc[tuple(row[key] for key in keys)]
        assert fourth / first == pytest.approx(strength * np.sqrt(4 * (4 + c) / (1 + c)), rel=1e-4)


@pytest.mark.slow
def test_frames_are_of_the_tokens_that_count(model, monkeypatch) -> None:
    """SGD's cross-talk is computed by hand as |G|^2 times the mean |x'|^2 of each split; held out, over the 6 new
    tokens without sinks.

    A split in the other's place, a mask on the training batch or none on the held-out one is another mean.
    """
    monkeypatch.setattr(tokens, "SINK_RATIO", 1.05)
    measured, plain = (
        regimes.regime(model, TRAIN, HELD_OUT, replace(SMALL, mask=mask), target_modules=TARGETS)
        for mask in (True, False)
    )
    names = ("self_attn.q_proj", "mlp.down_proj")
    train, held_out = (record(model.params, model.config, used, names) for used in (TRAIN, HELD_OUT))
    new = np.array([0] * 4 + [1] * 3 + [0] * 5 + [1] + [0] * 6 + [1] * 2, bool)
    by_sgd = measured.crossings.query("optimizer == 'sgd' and init == 'gaussian'").set_index(["module", "split"])
    sinks = 0
    for layer, kind in product((0, 1), names):
        module = f"model.layers.{layer}.{kind}"
        norms = np.linalg.norm(np.float64(held_out.inputs[kind][layer]), axis=1)
        used = new & (norms <= 1.05 * np.median(norms))
        sinks += int(new.sum() - used.sum())
        counts = measured.tokens.query("module == @module").set_index("split")[["all", "seen", "sinks", "read"]]
        assert counts.loc["train"].tolist() == [13, 0, 0, 9]
        assert counts.loc["heldout"].tolist() == [21, 15, 6 - used.sum(), used.sum()]
        trained_on = np.float64(train.inputs[kind][layer])[tokens.sample_tokens(9, 0, np.zeros(13, bool))]
        gradient_square = np.sum(np.float64(train.gradient(kind, layer)) ** 2)
        for split, squares in (("heldout", norms[used] ** 2), ("train", np.sum(trained_on**2, axis=1))):
            assert by_sgd["cross_talk"][module, split] == pytest.approx(gradient_square * np.mean(squares), rel=1e-5)
    assert sinks
    assert (plain.tokens[["seen", "sinks"]] == 0).all(axis=None)
    assert set(plain.tokens["read"]) == {9}
    ratios = measured.crossings["signal"] / plain.crossings["signal"]
    is_train = measured.crossings["split"] == "train"
    np.testing.assert_allclose(ratios[is_train], 1, rtol=1e-6)
    assert (np.abs(ratios[~is_train] - 1) > 1e-3).all()
    check_crossings(measured)
    assert len(measured.results) == 4 * 2 * 2 * 2 * 2
    assert len(measured.takeover) == 4 * 2 * 2 * 3
    assert measured.training_loss == pytest.approx(train.loss)
    assert measured.held_out_loss == pytest.approx(held_out.loss)


@pytest.mark.parametrize("init", ["kaiming_uniform", "gaussian"])
def test_takeover_is_the_law_of_a_at_its_own_deviation(init) -> None:
    """Each split and rank agrees with rows drawn at that rank's deviation, which falls as 1/r for `gaussian`."""
    random = np.random.default_rng(0)
    x = random.normal(size=(6, 20))
    grad = (random.normal(size=(7, 6)) @ x).astype(np.float32)
    layer = Layer("m", grad, {"train": x.astype(np.float32), "heldout": random.normal(size=(4, 20)).astype(np.float32)})

    def takeover(**changed) -> list[dict]:
        config = RegimeConfig(inits=(init,), rows=0, **{"seed": 3} | changed)
        # The rows of an exact measurement, of which there are more.
        draw = partial(drawn_steps.draw_takeover_rows, replace(config, exact=True), layer)
        return module_regime.measure_takeover(config, layer, 5, draw)

    exact = takeover(exact=True)
    assert [(row["layer"], row["split"], row["rank"]) for row in exact] == [
        (5, split, rank) for split in ("train", "heldout") for rank in (8, 32, 128)
    ]
    key = stream_key(3, f"m {init} takeover")  # the very draws
    drawn = np.asarray(draw_A(key, init, rank=256, p_in=20))
    for row in exact:
        lora_A = drawn * (256 / row["rank"] if init == "gaussian" else 1)
        law = constant_gradient.row_terms(grad, layer.inputs[row["split"]], lora_A)
        assert row["takeover"] == pytest.approx(law.crossing_distance(row["rank"]), rel=1e-6)
        assert [row[f"turn_{n}"] for n in (5, 25, 50, 75, 95)] == pytest.approx(
            list(law.sign_change_distances), rel=1e-6
        )
    assert len({row["takeover"] for row in exact}) == 6
    for row, expected in zip(takeover(), exact, strict=True):
        assert row["takeover"] == pytest.approx(expected["takeover"], rel=module_regime.MAX_RELATIVE_ERRORS["takeover"])
        assert not [name for name in row if name.startswith("turn")]
    fast = RegimeConfig(inits=(init,), rows=0)
    assert len(drawn_steps.draw_takeover_rows(fast, layer, init)) == fast.takeover_rows == 64
    other_draws = takeover(seed=4)[0]["takeover"]
    assert other_draws == pytest.approx(exact[0]["takeover"], rel=0.3)
    assert other_draws != pytest.approx(exact[0]["takeover"], rel=1e-6)


def test_sgd_has_no_takeover(model) -> None:
    config = replace(SMALL, optimizers=("sgd",))
    with pytest.warns(ThinWarning) as warnings:
        measured = regimes.regime(model, TRAIN, HELD_OUT, config, target_modules=TARGETS, layers=(1,))
    assert measured.takeover.empty
    messages = [str(warning.message) for warning in warnings]
    assert "at 6 held-out tokens" in messages[0]
    assert "1 of the model's 2 layers" in messages[1]
    assert all(frame.attrs["warnings"] == messages for frame in measured.files().values())


def test_modules_are_grouped_by_layer(model) -> None:
    modules = regimes.modules_by_layer(model.config, TARGETS)
    assert modules == {layer: ["self_attn.q_proj", "mlp.down_proj"] for layer in (0, 1)}
    assert regimes.distinct_names(modules) == ["self_attn.q_proj", "mlp.down_proj"]
    assert regimes.modules_by_layer(model.config, TARGETS, (1,))[1] == ["self_attn.q_proj", "mlp.down_proj"]


def check_stated_errors(layer: Layer) -> None:
    """Compare the default with exact=True for every optimizer and init, on one draw of A's rows."""
    config = RegimeConfig(ranks=(8,), rules=("lora",), rows=0)
    draw = partial(drawn_steps.draw_takeover_rows, config, layer)
    fast, exact = (
        module_regime.measure_module(replace(config, exact=exact), layer, 0, draw) for exact in (False, True)
    )
    assert fast.results == []
    assert len(exact.results) == 8
    figures = {name for row in (fast.crossings[0], fast.takeover[0]) for name in row if isinstance(row[name], float)}
    assert figures == set(module_regime.MAX_RELATIVE_ERRORS)
    for figure, bound in module_regime.MAX_RELATIVE_ERRORS.items():
        table = "takeover" if figure == "takeover" else "crossings"
        for row, expected in zip(getattr(fast, table), getattr(exact, table), strict=True):
            assert row[figure] == pytest.approx(expected[figure], rel=bound)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["0.mlp.down_proj", "15.self_attn.q_proj"])
def test_figures_of_real_layers_are_within_the_stated_error(layer_data, name) -> None:
    (layer,) = (layer for layer in read_layers(layer_data) if layer.name.endswith(name))
    check_stated_errors(layer)


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
