"""Which held-out tokens count, the frames of a tiny model's regime, and the distance at which A takes over."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from support import checkpoint

from rora_theory import InputError
from rora_theory.data.batches import Batch
from rora_theory.llama import Model, load
from rora_theory.measure import tokens, unseen
from rora_theory.measure.layers import drawn_steps
from rora_theory.measure.layers.layer_data import Layer, read_layers
from rora_theory.measure.layers.model_layers import real_tokens, record
from rora_theory.measure.regimes import model as regimes
from rora_theory.measure.regimes import module_regime
from rora_theory.measure.regimes.module_regime import RegimeConfig
from rora_theory.measure.regimes.thin import ThinWarning
from rora_theory.random.draws import draw_A, stream_key
from rora_theory.theory import horizon

pytestmark = pytest.mark.filterwarnings("ignore::rora_theory.measure.regimes.thin.ThinWarning")  # so few tokens
TARGETS = ("q_proj", "down_proj")
SMALL = RegimeConfig(ranks=(1, 4), rules=("lora",), rows=0, tokens=9, exact=True)
TEMPLATE = [1, 5, 6, 7]


def batch(*rows: list[int], width: int = 8) -> Batch:
    """Rows padded with 0, every token but the last a target's place."""
    inputs, weights = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), np.float32)
    for i, row in enumerate(rows):
        inputs[i, : len(row)], weights[i, : len(row)] = row, 1
    return Batch(inputs, np.roll(inputs, -1, axis=1), weights, None)


TRAIN = batch([*TEMPLATE, 9, 10], [*TEMPLATE, 11, 12, 13])
HELD_OUT = batch([*TEMPLATE, 10, 10, 8], [*TEMPLATE, 11, 14], [*TEMPLATE, 9, 10, 0, 3], width=16)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    return load(checkpoint.model(tmp_path_factory.mktemp("model")))


def test_what_was_seen_is_a_beginning() -> None:
    """The template, and what goes on as one trained row does; not tokens that stand elsewhere, nor the padding."""
    found = unseen.mark_seen(HELD_OUT, [TRAIN])
    np.testing.assert_array_equal(found.sum(axis=1), [4, 5, 6])
    assert found[:, :4].all()  # beginnings
    assert not unseen.mark_seen(batch([2, *TEMPLATE]), [TRAIN]).any()
    both = batch([*TEMPLATE, 11, 12, 13, 15])
    assert unseen.mark_seen(both, [batch([1, 2]), TRAIN]).sum() == 7


def test_what_leaves_no_token_of_its_own_is_refused() -> None:
    """Nor is padding one."""
    unseen.check_unseen(HELD_OUT, [TRAIN])
    with pytest.raises(InputError, match="all 4 held-out tokens"):
        unseen.check_unseen(batch(TEMPLATE), [TRAIN])
    with pytest.raises(InputError, match="every held-out token within --cutoff"):
        unseen.mask_seen(TRAIN, [TRAIN])


@pytest.mark.slow
def test_the_template_alone_is_masked_whole(model) -> None:
    """As is the training batch itself: nothing is left, which is said before anything is measured."""
    for held_out, seen in ((TRAIN, 13), (batch(TEMPLATE), 4)):
        assert unseen.mark_seen(held_out, [TRAIN])[real_tokens(held_out)].all()
        with pytest.raises(InputError, match=f"{seen} held-out tokens: {seen} "):
            regimes.regime(model, TRAIN, held_out, SMALL, target_modules=TARGETS)


def test_a_sink_is_ten_times_the_median() -> None:
    x = np.ones((5, 4), np.float32)
    x[1] *= 9.9
    x[3] *= 10.1
    np.testing.assert_array_equal(tokens.sinks(np.linalg.norm(x, axis=1)), [False, False, False, True, False])


def test_a_sample_is_the_same_in_every_module() -> None:
    """Of the tokens that are not masked, each once, ascending; all of them where there are fewer."""
    masked = np.array([False, True] * 10)
    found = tokens.sample(6, 0, masked)
    assert len(set(found.tolist())) == 6
    assert not masked[found].any()
    np.testing.assert_array_equal(found, np.sort(found))
    np.testing.assert_array_equal(found, tokens.sample(6, 0, masked))
    assert found.tolist() != tokens.sample(6, 1, masked).tolist()
    np.testing.assert_array_equal(tokens.sample(64, 0, masked), np.flatnonzero(~masked))


@pytest.mark.slow
def test_frames_are_of_the_tokens_that_count(model, monkeypatch) -> None:
    """By hand: the cross-talk of SGD, |G|^2 times the mean |x'|^2, of each split; held out the 6 new tokens less sinks.

    A split in the other's place, a mask on the training batch or none on the held-out one is another mean.
    """
    monkeypatch.setattr(tokens, "SINK_RATIO", 1.05)
    found = regimes.regime(model, TRAIN, HELD_OUT, SMALL, target_modules=TARGETS)
    plain = regimes.regime(
        model, TRAIN, HELD_OUT, RegimeConfig(**vars(SMALL) | {"mask": False}), target_modules=TARGETS
    )
    names = ("self_attn.q_proj", "mlp.down_proj")
    train, held_out = (record(model.params, model.config, each, names) for each in (TRAIN, HELD_OUT))
    new = np.array([0] * 4 + [1] * 3 + [0] * 5 + [1] + [0] * 6 + [1] * 2, bool)
    sinks = 0
    for row in found.tokens.itertuples():
        layer, module = row.layer, row.module.split(".", 3)[3]
        gradient = np.sum(np.float64(train.gradient(module, layer)) ** 2)
        norms = {
            split: np.linalg.norm(np.float64(each.inputs[module][layer]), axis=1)
            for split, each in (("train", train), ("heldout", held_out))
        }
        kept = new & (norms["heldout"] <= 1.05 * np.median(norms["heldout"]))
        sinks += int(new.sum() - kept.sum())
        counts = {"train": (13, 0, 0, 9), "heldout": (21, 15, 6 - kept.sum(), kept.sum())}
        assert tuple(row)[4:] == counts[row.split]
        if row.split == "heldout":
            where = {"module": row.module, "split": "heldout", "optimizer": "sgd", "init": "gaussian"}
            (one,) = found.crossings.loc[(found.crossings[list(where)] == where).all(axis=1), "cross_talk"]
            assert one == pytest.approx(gradient * np.mean(norms["heldout"][kept] ** 2), rel=1e-5)
    assert sinks
    assert (plain.tokens[["seen", "sinks"]] == 0).all(axis=None)
    assert set(plain.tokens["read"]) == {9}
    same = found.crossings["split"] == "train"
    np.testing.assert_allclose(found.crossings[same]["signal"], plain.crossings[same]["signal"], rtol=1e-6)
    assert (np.abs(found.crossings[~same]["signal"] / plain.crossings[~same]["signal"] - 1) > 1e-3).all()
    assert len(found.results) == 4 * 2 * 2 * 2 * 2
    assert len(found.takeover) == 4 * 2 * 2 * 3
    assert found.training_loss == pytest.approx(train.loss)
    assert found.held_out_loss == pytest.approx(held_out.loss)


@pytest.mark.parametrize("init", ["kaiming_uniform", "gaussian"])
def test_takeover_is_the_law_of_a_at_its_own_deviation(init) -> None:
    """For each split and rank as from rows drawn at that rank's deviation; `gaussian` falls as 1/r."""
    random = np.random.default_rng(0)
    x = random.normal(size=(6, 20))
    grad = (random.normal(size=(7, 6)) @ x).astype(np.float32)
    layer = Layer("m", grad, {"train": x.astype(np.float32), "heldout": random.normal(size=(4, 20)).astype(np.float32)})
    config = RegimeConfig(inits=(init,), rows=0, seed=3, exact=True)
    found = module_regime.takeover(config, layer, 5, partial(drawn_steps.takeover_rows, config, layer))
    assert [(row["layer"], row["split"], row["rank"]) for row in found] == [
        (5, split, rank) for split in ("train", "heldout") for rank in (8, 32, 128)
    ]
    key = stream_key(3, f"m {init} takeover")  # the very draws
    drawn = np.asarray(draw_A(key, init, rank=256, p_in=20))
    for row in found:
        own = drawn * (256 / row["rank"] if init == "gaussian" else 1)
        law = horizon.row_terms(grad, layer.inputs[row["split"]], own)
        assert row["takeover"] == pytest.approx(law.takeover(row["rank"]), rel=1e-6)
        assert [row[f"turn_{n}"] for n in (5, 25, 50, 75, 95)] == pytest.approx(list(law.turn), rel=1e-6)
    assert len({row["takeover"] for row in found}) == 6
    fast = module_regime.takeover(
        RegimeConfig(inits=(init,), rows=0, seed=3), layer, 5, partial(drawn_steps.takeover_rows, config, layer)
    )
    for row, other in zip(found, fast, strict=True):
        assert other["takeover"] == pytest.approx(row["takeover"], rel=module_regime.ERRORS["takeover"])
        assert not [name for name in other if name.startswith("turn")]
    reseeded = RegimeConfig(inits=(init,), rows=0, seed=4)
    other = module_regime.takeover(reseeded, layer, 5, partial(drawn_steps.takeover_rows, reseeded, layer))
    assert other[0]["takeover"] == pytest.approx(found[0]["takeover"], rel=0.3)
    assert other[0]["takeover"] != found[0]["takeover"]


def test_only_adam_is_taken_over(model) -> None:
    config = RegimeConfig(**vars(SMALL) | {"optimizers": ("sgd",)})
    with pytest.warns(ThinWarning) as told:
        found = regimes.regime(model, TRAIN, HELD_OUT, config, target_modules=TARGETS, layers=(1,))
    assert found.takeover.empty
    for frame in found.files().values():
        words = frame.attrs["warnings"]
        assert [str(one.message) for one in told] == words
    assert "at 6 held-out tokens" in words[0]
    assert "1 of the model's 2 layers" in words[1]


def test_modules_go_by_layer(model) -> None:
    found = regimes.modules_by_layer(model.config, TARGETS)
    assert found == {layer: ["self_attn.q_proj", "mlp.down_proj"] for layer in (0, 1)}
    assert regimes.distinct_names(found) == ["self_attn.q_proj", "mlp.down_proj"]
    assert regimes.modules_by_layer(model.config, TARGETS, (1,))[1] == ["self_attn.q_proj", "mlp.down_proj"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["0.mlp.down_proj", "15.self_attn.q_proj", "29.self_attn.v_proj"])
def test_figures_of_real_layers_are_as_near_as_is_stated(layer_data, name) -> None:
    """The default beside exact=True, for every optimizer and init, on one draw of A's rows."""
    (layer,) = (layer for layer in read_layers(layer_data) if layer.name.endswith(name))
    config = RegimeConfig(ranks=(8,), rules=("lora",), rows=0)
    draw = partial(drawn_steps.takeover_rows, config, layer)
    found, expected = (
        module_regime.measure_module(replace(config, exact=exact), layer, 0, draw) for exact in (False, True)
    )
    assert found.results == []
    assert len(expected.results) == 8
    for figure, bound in module_regime.ERRORS.items():
        table = "takeover" if figure == "takeover" else "crossings"
        for row, other in zip(getattr(found, table), getattr(expected, table), strict=True):
            assert row[figure] == pytest.approx(other[figure], rel=bound)
