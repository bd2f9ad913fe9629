"""What is called thin, by the error of the estimate: beside draws of known spread, on both sides of each threshold."""

import math
import warnings

import numpy as np
import pandas as pd
import pytest

from rora_theory import Setting, transfer
from rora_theory.measure.regimes import thin


def crossings(logs: np.ndarray, ratio: float = 2.0, tokens: int = 64) -> pd.DataFrame:
    """Rows of one kind of module; ``logs``: ln c by layer; ``ratio``: of the quartiles of r* over tokens."""
    rows = {"module": [f"model.layers.{i}.mlp.up_proj" for i in range(len(logs))], "layer": range(len(logs))}
    rows |= {"optimizer": "adam", "init": "gaussian", "split": "heldout", "tokens": tokens}
    return pd.DataFrame(rows).assign(linear_term=np.exp(logs), lower_quartile=1.0, upper_quartile=ratio)


def test_an_error_of_a_fifth_moves_alpha_by_a_tenth() -> None:
    """Under Adam, whatever the ranks and the linear term: d ln alpha / d ln c is at most 1/2."""
    for low, high in ((1, 10**6), (8, 128), (128, 2)):
        for c in (1e-3, 3.0, 1e4):
            alphas = [
                transfer(Setting(low, 16.0, 1e-4), high, {"m": c * factor}).alpha
                for factor in (1, math.exp(thin.MAX_STANDARD_ERROR))
            ]
            assert abs(math.log(alphas[1] / alphas[0])) <= thin.MAX_STANDARD_ERROR / 2


def test_the_error_over_tokens_is_that_of_draws() -> None:
    """The sample median's standard deviation over 4000 samples of 64 (known to 1.1%, here to 4 of its errors, and 1.5%
    for what 64 is short of many), for a normal ln r* whose quartiles are an eighth apart."""
    deviation = math.log(8) / (2 * 0.674490)
    drawn = np.random.default_rng(0).normal(0, deviation, (4000, 64))
    (said,) = thin.token_warnings(crossings(np.zeros(1), 8.0))
    told = thin._MEDIAN_ERROR_PER_QUARTILE_RANGE * math.log(8) / 8
    assert np.median(drawn, axis=1).std() == pytest.approx(told, rel=0.06)
    assert f"a standard error of {told:.0%} or more" in said


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        (crossings(np.zeros(2), 5.5), ""),  # 0.929 ln 5.5 / 8 = 0.198
        (crossings(np.zeros(2), 5.7), "at 64 held-out tokens, and half of the modules"),
        (crossings(np.zeros(2), 1.5, 16), ""),
        (crossings(np.zeros(2), 1.5, 15), "at 15 held-out tokens, fewer than the 16 needed"),
    ],
)
def test_few_tokens(frame, said) -> None:
    found = thin.regime_warnings(frame, 2)
    assert [said in one for one in found] == [True] * bool(said)


def test_the_fewest_tokens_and_the_middle_error_count() -> None:
    """Of three modules: one read at fewer tokens than the others; two of which the error is told, one of which not."""
    frame = crossings(np.zeros(3), 1.5)
    (said,) = thin.token_warnings(frame.assign(tokens=[64, 15, 64]))
    assert "at 15 held-out tokens, fewer than the 16 needed" in said
    assert not thin.token_warnings(frame.assign(upper_quartile=[1.5, 1.5, 100.0]))
    assert thin.token_warnings(frame.assign(upper_quartile=[1.5, 100.0, 100.0]))
    (said,) = thin.token_warnings(frame[:1].assign(lower_quartile=math.inf, upper_quartile=math.inf))
    assert "half of the modules have a crossing rank of unknown error" in said


def test_a_kind_that_one_measured_layer_has_is_not_known() -> None:
    frame = crossings(np.zeros(3), 1.5)
    frame["module"] = ["layers.0.up_proj", "layers.1.up_proj", "layers.2.router"]
    (said,) = thin.layer_warnings(frame, 30)
    assert "3 of the model's 30 layers were measured; the mean of router's linear term" in said
    assert "an unknown error" in said


@pytest.mark.parametrize("term", [-0.5, 0.0, math.inf])
def test_a_linear_term_without_a_logarithm_is_not_known(term) -> None:
    """Whatever the other layers', and without a warning of NumPy's."""
    frame = crossings(np.zeros(4), 1.5)
    frame.loc[3, "linear_term"] = term
    (said,) = thin.layer_warnings(frame, 30)
    assert "up_proj's linear term over layers has an unknown error" in said


@pytest.mark.parametrize(
    ("count", "spread", "of_all", "said"),
    [
        (30, 9.0, 30, None),  # all are measured
        (2, 0.0, 30, "2 of the model's 30 layers were measured, fewer than the 3 needed"),
        (3, 0.3, 30, None),  # 0.3 / sqrt(3) sqrt(0.9) = 0.16
        (3, 0.6, 30, "the mean of up_proj's linear term over layers has a standard error of 33%"),
        (10, 0.6, 30, None),  # 0.15
        (3, 9.0, None, None),
    ],
)
def test_few_layers(count, spread, of_all, said) -> None:
    steps = np.linspace(-1, 1, count)
    logs = spread * steps / steps.std(ddof=1)
    found = thin.regime_warnings(crossings(logs, 1.5), of_all)
    assert [said in one for one in found] == [True] * (said is not None)


@pytest.mark.parametrize(
    ("ranks", "is_thin"), [((2, 8, 32), False), ((2, 16), True), ((4, 8, 16), True), ((1, 3, 8), False)]
)
def test_few_ranks(ranks, is_thin) -> None:
    assert bool(thin.rank_warnings(ranks)) == is_thin


def test_a_frame_says_it_and_so_does_a_warning() -> None:
    frames = [crossings(np.zeros(1)), crossings(np.zeros(1))]
    with pytest.warns(thin.ThinWarning, match="^thin: a$"):
        thin.warn(frames, ["thin: a"])
    assert [frame.attrs["warnings"] for frame in frames] == [["thin: a"]] * 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        thin.warn(frames, [])
    assert frames[0].attrs["warnings"] == []
