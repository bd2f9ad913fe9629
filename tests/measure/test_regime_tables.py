"""Whether the law holds in a table, the kappa that is flat, and summaries by type of module and depth."""

import math

import numpy as np
import pandas as pd
import pytest

from rora_theory.measure import regime_tables
from rora_theory.measure.regime_tables import JudgeConfig
from rora_theory.theory import laws


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


def test_agreement_is_a_mean_over_modules() -> None:
    """Its error is that of a mean of independent modules: half of one's for four alike."""
    rows = [judged_row(ratio, 0.02, split=name) for name in ("train", "heldout") for ratio in (1.0, 1.0, 1.0, 1.0)]
    found = regime_tables.measured_over_predicted(pd.DataFrame(rows))
    assert list(found["split"]) == ["train", "heldout"]
    for line in found.itertuples():
        assert (line.modules, line.mean_ratio, line.largest_deviation) == (4, 1.0, 0.0)
        assert line.standard_error == pytest.approx(0.01)


def test_flat_kappa() -> None:
    """The four corners of the table, and the init whose deviation falls as 1/r."""
    flat = {
        (optimizer, init, c): round(regime_tables.flat_kappa_between(optimizer, init, c), 9)
        for optimizer in laws.OPTIMIZERS
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
    assert (first["crossing_rank"], first["median"], last["crossing_rank"], last["median"]) == (1.5, 1.0, 5.5, 9.0)
    assert (first["lowest_kappa"], first["highest_kappa"]) == pytest.approx((0.25, 0.5))
    assert (last["all"], last["seen"], last["fewest_sinks"], last["most_sinks"]) == (50, 7, 14, 15)
    assert "all" not in regime_tables.crossings_by_depth(
        pd.DataFrame(rows), pd.DataFrame(tokens).iloc[:0], "sgd", "normal"
    )


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
