"""Whether the law holds in a table, the kappa that is flat, and summaries by type of module and depth."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from rora_theory.io import frames
from rora_theory.measure.regimes import tables as regime_tables
from rora_theory.measure.regimes.tables import JudgeConfig
from rora_theory.optimizers import OPTIMIZERS
from rora_theory.stats.verdicts import RESOLUTION


def judged_row(measured: float, error: float, adapters: int = 1000, **more: object) -> dict:
    row = {"module": "m", "split": "train", "optimizer": "sgd", "init": "gaussian", "rank": 1, "predicted": 2.0}
    return row | {"measured": 2 * measured, "standard_error": 2 * error, "adapters": adapters} | more


@pytest.mark.parametrize(
    ("measured", "error", "word"),
    [
        (1.019, 1e-9, "holds"),
        (0.979, 1e-9, "fails"),
        (1.1, 0.04, "holds"),
        (0.88, 0.04, "fails"),
        (1.03, 0.007, "fails"),
    ],
)
def test_the_judge_s_two_bars(measured: float, error: float, word: str) -> None:
    """The larger of 2% and the error bar, 2.58 standard errors at one comparison: not their sum, not the smaller."""
    found = regime_tables.judge_regime(pd.DataFrame([judged_row(measured, error)]), JudgeConfig(false_alarm=0.01))
    assert (found["verdict"], found["outside"]) == (word, int(word == "fails"))
    assert found["error_bars_in_standard_errors"]["1000"] == pytest.approx(2.58, abs=0.01)
    two = regime_tables.judge_regime(pd.DataFrame([judged_row(measured, error), judged_row(1.0, 1.0, adapters=4)]))
    assert two["error_bars_in_standard_errors"]["4"] == pytest.approx(7.45, abs=0.01)  # Student's t, at half of it


def judged(*rows: dict) -> dict:
    return regime_tables.judge_regime(pd.DataFrame(rows))


WIDE = 0.26 / 2.58
"""A standard error whose bar is wider than a quarter of the prediction, at one comparison of many adapters."""


@pytest.mark.parametrize(
    ("measured", "error", "verdict", "undecided"),
    [
        (1.2, WIDE, "undecided", 1),
        (0.8, WIDE, "undecided", 1),
        (1.2, 0.24 / 2.58, "holds", 0),  # the bar excludes a value that is a quarter larger
        (1.0, WIDE, "undecided", 1),  # a value off by a quarter could have given this one
        (1.27, WIDE, "fails", 0),  # outside a bar that is wide
    ],
)
def test_a_bar_wider_than_a_quarter_decides_nothing(
    measured: float, error: float, verdict: str, undecided: int
) -> None:
    found = judged(judged_row(measured, error))
    assert (found["verdict"], found["undecided"], found["outside"]) == (verdict, undecided, int(verdict == "fails"))


def test_few_adapters_and_many_comparisons_tell_nothing() -> None:
    """Four adapters at a thousandth of a hundredth have a bar of 60 standard errors: twice the law lies within it."""
    rows = [judged_row(2.0, 0.05, adapters=4)] + [judged_row(1.0, 0.05, adapters=4)] * 999
    found = judged(*rows)
    assert found["error_bars_in_standard_errors"]["4"] > 55
    assert (found["verdict"], found["undecided"], found["outside"]) == ("undecided", 1000, 0)
    assert judged(*rows, judged_row(9.0, 0.05, adapters=4))["verdict"] == "fails", "before undecided"
    assert regime_tables.in_words(found).startswith(
        "verdict: undecided. 1000 of 1000 figures agree within 2% or their error bar (total false alarm probability "
        "0.01), 1000 of them within an error bar wider than 25%, which decides nothing; 99.9% within 2%; largest "
        "deviation 100.0%"
    )


@pytest.mark.parametrize(
    ("measured", "error"), [(math.nan, math.nan), (math.inf, math.nan), (1.0, math.nan), (1.0, math.inf)]
)
def test_a_measurement_that_is_no_finite_number_fails(measured: float, error: float) -> None:
    """Where adapters were drawn; rows without any were not tried. The other figures are of what is finite."""
    wrong = judged_row(measured, error)
    found = judged(judged_row(1.01, 0.01), wrong, judged_row(math.nan, math.nan, adapters=math.nan))
    assert (found["verdict"], found["comparisons"], found["outside"], found["not_finite"]) == ("fails", 2, 1, 1)
    assert (found["largest_deviation"], found["largest_t"]) == pytest.approx((0.01, 1.0))
    assert found["nearest_to_failing"]["measured"] == 2.02
    expected = (
        "verdict: fails. 1 of 2 figures agree within 2% or their error bar (total false alarm probability 0.01); "
        "1 not finite; "
    )
    assert regime_tables.in_words(found).startswith(expected)
    alone = judged(wrong)
    assert (alone["verdict"], alone["largest_deviation"], alone["nearest_to_failing"]) == ("fails", None, None)
    assert regime_tables.in_words(alone).endswith(" within 2%")
    assert not any(isinstance(value, float) and not math.isfinite(value) for value in alone.values())
    table = regime_tables.measured_over_predicted(pd.DataFrame([judged_row(1.0, 0.01), wrong]))
    assert not np.isfinite(table[["mean_ratio", "standard_error"]].to_numpy(float)).all(), "it does not vanish"


@pytest.mark.parametrize(("adapters", "verdict"), [((1000, 4), "fails"), ((4, 1000), "holds")])
def test_each_figure_has_the_bar_of_its_own_adapters(adapters: tuple[int, int], verdict: str) -> None:
    """12% off at an error of 3%: out of the bar of a thousand adapters, within that of four."""
    rows = [judged_row(0.88, 0.03, adapters=adapters[0]), judged_row(1.0, 0.01, adapters=adapters[1])]
    assert judged(*rows)["verdict"] == verdict


def test_one_adapter_does_not_hold() -> None:
    assert judged(judged_row(20.0, 0.1, adapters=1))["verdict"] == "fails"


def test_what_was_not_tried_has_no_verdict() -> None:
    assert judged(judged_row(math.nan, math.nan, adapters=math.nan)) is None
    assert regime_tables.judge_regime(pd.DataFrame([{"predicted": 1.0}])) is None


def test_the_published_verdict_stands() -> None:
    """Of the rows that are published, a fifteenth of those measured."""
    folder = Path(__file__).parents[3] / "results" / "published" / "regime"
    published = json.loads((folder / "verdict.json").read_text())
    found = regime_tables.judge_regime(frames.read_csv(folder / "results.csv"))
    assert (found["verdict"], found["outside"], found["undecided"]) == (published["verdict"], 0, 0)
    widest = max(published["error_bars_in_standard_errors"].values()) * found["median_relative_standard_error"]
    assert widest < RESOLUTION, "at as many comparisons as the whole run has too"


def test_agreement_is_a_mean_over_modules() -> None:
    """Its error is that of a mean of independent modules: half of one's for four alike."""
    rows = [judged_row(ratio, 0.02, split=name) for name in ("train", "heldout") for ratio in (1.0, 1.0, 1.0, 1.0)]
    found = regime_tables.measured_over_predicted(pd.DataFrame(rows))
    assert list(found["split"]) == ["train", "heldout"]
    for line in found.itertuples():
        assert line.modules == 4
        assert (line.mean_ratio, line.largest_deviation) == pytest.approx((1.0, 0.0), abs=1e-12)
        assert line.standard_error == pytest.approx(0.01)


def test_agreement_of_modules_that_differ() -> None:
    """The root of the mean square, its error to first order: m = sqrt((1/4 + 4) / 2) of 1/2 ± 0.03 and 2 ± 0.01."""
    rows = [judged_row(0.5, 0.03), judged_row(2.0, 0.01)]
    (line,) = regime_tables.measured_over_predicted(pd.DataFrame(rows)).itertuples()
    mean = math.sqrt((0.25 + 4.0) / 2)
    assert line.mean_ratio == pytest.approx(mean)
    assert line.standard_error == pytest.approx(math.hypot(0.5 * 0.03, 2.0 * 0.01) / 2 / mean)
    assert (line.largest_deviation, line.largest_t) == pytest.approx((1.0, 100.0))


def test_flat_kappa() -> None:
    """The four corners of the table, and the init whose deviation falls as 1/r."""
    flat = {
        (optimizer, init, c): round(regime_tables.flat_kappa_between(optimizer, init, c), 9)
        for optimizer in OPTIMIZERS
        for init in ("kaiming_uniform", "gaussian")
        for c in (0.0, math.inf)
    }
    assert [flat["sgd", "kaiming_uniform", c] for c in (0.0, math.inf)] == [0.5, 0.25]
    assert [flat["adam", "kaiming_uniform", c] for c in (0.0, math.inf)] == [1.0, 0.5]
    assert [flat["sgd", "gaussian", c] for c in (0.0, math.inf)] == [-0.5, -0.75]
    assert [flat["adam", "gaussian", c] for c in (0.0, math.inf)] == [0.0, -0.5]
    assert np.isfinite(list(flat.values())).all()


def test_crossings_by_depth() -> None:
    """Medians over the layers of a third, by hand; kappas at the range's ends; sinks of those modules alone."""
    rows = [
        {"layer": layer, "module": f"model.layers.{layer}.{name}", "split": split, "optimizer": "sgd", "init": "normal"}
        | {"crossing_rank": 1.0 + layer, "lower_quartile": 0.5, "median": 2.0 * layer, "upper_quartile": 9.0}
        | {"linear_term": math.inf if layer == 1 else 0.0}
        for layer in range(6)
        for name in ("self_attn.q_proj", "mlp.up_proj")
        for split in ("train", "heldout")
    ]
    rows += [row | {"optimizer": "adam", "crossing_rank": 1e6} for row in rows]
    tokens = [
        {"module": f"model.layers.{layer}.{name}", "split": split, "all": 50, "seen": 7, "sinks": layer + more}
        for layer in range(6)
        for name, more in (("self_attn.q_proj", 0), ("mlp.up_proj", 10))
        for split in ("train", "heldout")
    ]
    found = regime_tables.crossings_by_depth(pd.DataFrame(rows), pd.DataFrame(tokens), "sgd", "normal")
    places = found[["kind", "layers", "split"]].to_numpy().tolist()
    assert places == [
        [kind, layers, split]
        for kind in ("q_proj", "up_proj")
        for layers in ("0-1", "2-3", "4-5")
        for split in ("train", "heldout")
    ]
    first, last = found.iloc[0], found.iloc[-1]
    medians = (first["crossing_rank"], first["median"], last["crossing_rank"], last["median"])
    assert medians == pytest.approx((1.5, 1.0, 5.5, 9.0))
    assert (first["lowest_kappa"], first["highest_kappa"]) == pytest.approx((0.25, 0.5))
    assert (last["all"], last["seen"], last["fewest_sinks"], last["most_sinks"]) == (50, 7, 14, 15)
    assert "all" not in regime_tables.crossings_by_depth(
        pd.DataFrame(rows), pd.DataFrame(tokens).iloc[:0], "sgd", "normal"
    )


def test_medians_by_depth_are_no_means() -> None:
    """Of three layers the last is far from the others; of one third, as they have the same number."""
    far = {0: 1.0, 1: 2.0, 2: 30.0}
    own = [{"layer": 0, "module": f"model.layers.{layer}.mlp.up_proj", "split": "train"} for layer in far]
    names = ("crossing_rank", "lower_quartile", "median", "upper_quartile")
    rows = [
        row | {"optimizer": "sgd", "init": "normal", "linear_term": 1.0} | dict.fromkeys(names, value)
        for row, value in zip(own, far.values(), strict=True)
    ]
    rows += [row | {"split": "heldout"} for row in rows]
    found = regime_tables.crossings_by_depth(
        pd.DataFrame(rows), pd.DataFrame(columns=regime_tables.TOKEN_COLUMNS), "sgd", "normal"
    )
    assert found[list(names)].to_numpy().tolist() == [[2.0] * 4] * 2
    moved = [
        row | {"init": "normal", "rank": 8, "takeover": value, "turn_5": 10 * value}
        for row, value in zip(own, far.values(), strict=True)
    ]
    (line,) = regime_tables.takeover_by_depth(pd.DataFrame(moved), "normal").to_dict("records")
    assert [line[name] for name in ("median", "smallest", "largest", "turn_5")] == [2.0, 1.0, 30.0, 20.0]


def test_spread_over_layers() -> None:
    """Over the layers, by type of module and the keys that the table has."""
    rows = [
        {"layer": layer, "module": f"model.layers.{layer}.mlp.{name}", "split": "heldout", "init": "normal"}
        | {"rank": rank, "takeover": rank * (1.0 + layer), "turn_5": 10.0}
        for layer in (0, 1, 29)
        for name in ("up_proj", "down_proj")
        for rank in (8, 32)
    ]
    spread = regime_tables.spread_over_layers(pd.DataFrame(rows), ("takeover",))
    assert list(spread) == ["kind", "split", "init", "rank", "layers", "takeover", "takeover_low", "takeover_high"]
    assert spread[["kind", "rank"]].to_numpy().tolist() == [
        [kind, rank] for kind in ("up_proj", "down_proj") for rank in (8, 32)
    ]
    assert spread.iloc[3, 4:].tolist() == [3, 64.0, 32.0, 960.0]


@pytest.mark.parametrize("run", ["regime_held_out", "regime_after/plain_16"])
def test_published_summaries(run) -> None:
    folder = Path(__file__).parents[3] / "results" / "published" / run
    crossings, takeover = (frames.read_csv(folder / name) for name in (regime_tables.CROSSINGS, regime_tables.TAKEOVER))
    for name, expected in regime_tables.summaries(crossings, takeover).items():
        pd.testing.assert_frame_equal(frames.read_csv(folder / name), expected, check_dtype=False, rtol=1e-12)


def test_takeover_by_depth() -> None:
    """By split and rank over the layers of a third; the turn is of all of them."""
    rows = [
        {"layer": layer, "module": f"model.layers.{layer}.mlp.up_proj", "split": "heldout", "init": init}
        | {"rank": rank, "takeover": rank * (1.0 + layer) * factor, "turn_5": 10.0 * rank}
        for layer in range(3)
        for init, factor in (("gaussian", 100.0), ("normal", 1.0))
        for rank in (8, 32)
    ]
    found = regime_tables.takeover_by_depth(pd.DataFrame(rows), "normal").to_dict("records")
    assert [(row["layers"], row["rank"], row["median"]) for row in found[2:4]] == [("1", 8, 16.0), ("1", 32, 64.0)]
    assert found[2]["turn_5"] == 200.0
    whole = pd.DataFrame(rows).assign(layer=0)
    (first, _) = regime_tables.takeover_by_depth(whole, "normal").to_dict("records")
    assert (first["median"], first["smallest"], first["largest"]) == (16.0, 8.0, 24.0)
