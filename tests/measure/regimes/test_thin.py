"""Criteria for a thin measurement, by the estimate's error: draws of known spread around each threshold."""

import math

import numpy as np
import pandas as pd
import pytest

from rora_theory import Setting, transfer
from rora_theory.measure.regimes import thin


def crossings(logs: np.ndarray, ratio: float = 2.0, tokens: int = 64) -> pd.DataFrame:
    """Return rows of one kind of module; ``logs`` is ln c by layer, ``ratio`` that of r*'s quartiles over tokens."""
    rows = {"module": [f"model.layers.{i}.mlp.up_proj" for i in range(len(logs))], "layer": range(len(logs))}
    rows |= {"optimizer": "adam", "init": "gaussian", "split": "heldout", "tokens": tokens}
    return pd.DataFrame(rows).assign(linear_term=np.exp(logs), lower_quartile=1.0, upper_quartile=ratio)


def spread(count: int, deviation: float) -> np.ndarray:
    """Return logarithms with this standard deviation."""
    steps = np.linspace(-1, 1, count)
    return deviation * steps / steps.std(ddof=1)


def test_an_error_of_a_fifth_moves_alpha_by_a_tenth() -> None:
    """Under Adam d ln alpha / d ln c is at most 1/2, for any ranks and linear term."""
    for low, high in ((1, 10**6), (8, 128), (128, 2)):
        for c in (1e-3, 3.0, 1e4):
            alphas = [
                transfer(Setting(low, 16.0, 1e-4), high, {"m": c * factor}).alpha
                for factor in (1, math.exp(thin.MAX_STANDARD_ERROR))
            ]
            assert abs(math.log(alphas[1] / alphas[0])) <= thin.MAX_STANDARD_ERROR / 2


def test_the_error_over_tokens_is_that_of_draws() -> None:
    """The reference is the sample median's standard deviation over 4000 samples of 64, for a normal ln r* whose
    quartiles are an eighth apart. It is known to 1.1%, so the bound is 4 of its errors, plus 1.5% since 64 tokens
    are few.
    """
    deviation = math.log(8) / (2 * 0.674490)
    drawn = np.random.default_rng(0).normal(0, deviation, (4000, 64))
    (warning,) = thin.token_warnings(crossings(np.zeros(1), 8.0))
    expected = thin._MEDIAN_ERROR_PER_QUARTILE_RANGE * math.log(8) / 8
    assert np.median(drawn, axis=1).std() == pytest.approx(expected, rel=0.06)
    assert f"a standard error of {expected:.0%} or more" in warning


FEW = "of the model's 30 layers were measured"


@pytest.mark.parametrize(
    ("frame", "layers", "message"),
    [
        # Tokens: by the spread of r* over them, if they are enough to know it.
        (crossings(np.zeros(2), 5.5), 2, ""),  # 0.929 ln 5.5 / 8 = 0.198
        (crossings(np.zeros(2), 5.7), 2, "at 64 held-out tokens, and half of the modules"),
        (crossings(np.zeros(2), 1.5, 16), 2, ""),
        (crossings(np.zeros(2), 1.5, 15), 2, "at 15 held-out tokens, fewer than the 16 needed"),
        # The module that was read at the fewest tokens, and the middle one of the modules' errors.
        (crossings(np.zeros(3), 1.5).assign(tokens=[64, 15, 64]), 3, "at 15 held-out tokens, fewer than the 16 needed"),
        (crossings(np.zeros(3), 1.5).assign(upper_quartile=[1.5, 1.5, 100.0]), 3, ""),
        (crossings(np.zeros(3), 1.5).assign(upper_quartile=[1.5, 100.0, 100.0]), 3, "at 64 held-out tokens"),
        (
            crossings(np.zeros(1)).assign(lower_quartile=math.inf, upper_quartile=math.inf), 1,
            "half of the modules have a crossing rank of unknown error",
        ),
        # Layers: by the spread of ln c over those that were measured; here its deviation is given.
        (crossings(spread(30, 9.0), 1.5), 30, ""),  # all are measured
        (crossings(spread(2, 0.0), 1.5), 30, f"2 {FEW}, fewer than the 3 needed"),
        (crossings(spread(3, 0.3), 1.5), 30, ""),  # 0.3 / sqrt(3) sqrt(0.9) = 0.16
        (crossings(spread(3, 0.6), 1.5), 30, f"3 {FEW}; the mean of up_proj's linear term over layers has a standard "
                                             "error of 33%"),
        (crossings(spread(10, 0.6), 1.5), 30, ""),  # 0.15
        (crossings(spread(3, 9.0), 1.5), None, ""),
        # One layer has a kind of module, or a linear term has no logarithm: an unknown error.
        (
            crossings(np.zeros(3), 1.5).assign(module=["layers.0.up_proj", "layers.1.up_proj", "layers.2.router"]), 30,
            f"3 {FEW}; the mean of router's linear term over layers has an unknown error",
        ),
        *(
            (crossings(np.zeros(4), 1.5).assign(linear_term=[1.0, 1.0, 1.0, term]), 30,
             "up_proj's linear term over layers has an unknown error")
            for term in (-0.5, 0.0, math.inf)
        ),
    ],
)  # fmt: skip
def test_few_tokens_or_layers(frame, layers, message) -> None:
    assert [message in warning for warning in thin.regime_warnings(frame, layers)] == [True] * bool(message)


@pytest.mark.parametrize(
    ("ranks", "is_thin"), [((2, 8, 32), False), ((2, 16), True), ((4, 8, 16), True), ((1, 3, 8), False)]
)
def test_few_ranks(ranks, is_thin) -> None:
    assert bool(thin.rank_warnings(ranks)) == is_thin


def test_the_message_is_in_the_frames_and_in_a_warning() -> None:
    frames = [crossings(np.zeros(1)), crossings(np.zeros(1))]
    with pytest.warns(thin.ThinWarning, match="^thin: a$"):
        thin.warn(frames, ["thin: a"])
    assert [frame.attrs["warnings"] for frame in frames] == [["thin: a"]] * 2
    thin.warn(frames, [])  # a warning would be an error
    assert frames[0].attrs["warnings"] == []
