"""The measured rms of a first step against the law, and the layer's crossing rank against a split's two terms."""

import numpy as np
import pytest

from rora_theory.measure.layers import layer_data, layer_rms
from rora_theory.optimizers import OPTIMIZERS, Optimizer
from rora_theory.random.draws import stream_key
from rora_theory.theory import laws

RANDOM = np.random.default_rng(0)
LAYER = layer_data.Layer(
    "layer",
    RANDOM.standard_normal((6, 24)).astype(np.float32),
    {split: RANDOM.standard_normal((5, 24)).astype(np.float32) + 0.5 for split in layer_data.SPLITS},
)


def test_measured_is_the_law_s() -> None:
    """Two optimizers, two splits: |z| below 5.1 in all four, a false alarm of 1e-6; draws are as asked."""
    steps = [("sgd", 2.0), ("adam", 0.5)]
    common = {"rank": 8, "learning_rate": 1e-3, "init": "kaiming_uniform"}
    key = stream_key(0, "a stream")
    found, draws = layer_rms.measured_rms(LAYER, key, steps=steps, relative_error=1.0, draws=600, **common)
    exact = [value for step in steps for value in layer_rms.exact_rms(LAYER, step, **common)]
    assert draws == 600
    assert max(abs(a.value - b) / a.error for a, b in zip(found, exact, strict=True)) < 5.1
    found, _ = layer_rms.measured_rms(LAYER, key, steps=steps, relative_error=0.05, **common)
    assert max(a.error / a.value for a in found) <= 0.05


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_layer_s_crossing_is_where_its_terms_are_equal(optimizer: Optimizer) -> None:
    """Each token's terms are |x|^2 r and |x|^2 r (r - o) / (r* - o), o 1 for Adam: equal in sum at the layer's r*."""
    x = LAYER.inputs["heldout"]
    found, weight = layer_rms.crossing(LAYER, "heldout", optimizer), np.sum(np.float64(x) ** 2, axis=1)
    offset = 0.0 if optimizer == "sgd" else 1.0
    ranks = laws.crossing_rank(LAYER.grad, x, optimizer=optimizer)
    signal = np.sum(weight * (found.crossing_rank - offset) / (ranks - offset))
    assert signal == pytest.approx(np.sum(weight), rel=1e-12)
    assert found.median == pytest.approx(np.median(ranks), rel=1e-12)
    assert found.lower_quartile <= found.median <= found.upper_quartile
