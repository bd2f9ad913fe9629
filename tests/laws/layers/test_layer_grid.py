"""The grid on real layers: measured sizes against the law, exponents between common ranks, crossing ranks."""

import numpy as np
import pytest

from rora_theory import laws
from rora_theory.laws.grid import StepGrid
from rora_theory.laws.layers import layer_grid, layer_rms
from rora_theory.laws.layers.layer_data import SPLITS, Layer
from rora_theory.laws.random.draws import stream_key
from rora_theory.optimizers import OPTIMIZERS
from rora_theory.runs import frames
from rora_theory.scaling import scaling_factor

RANDOM = np.random.default_rng(0)
LAYERS = [
    Layer(
        name,
        RANDOM.standard_normal((6, 24)).astype(np.float32),
        {split: RANDOM.standard_normal((5 + n, 24)).astype(np.float32) + 0.5 for n, split in enumerate(SPLITS)},
    )
    for name in ("one", "two")
]
GRID = StepGrid(ranks=(2, 8, 32), draws=300, lr=1e-3, alpha=4.0)


def test_the_measured_size_is_the_law_s() -> None:
    """For two optimizers and two splits |z| is below 5.1, a false-alarm rate of 1e-6; the number of draws is as
    requested.
    """
    steps = [("sgd", 2.0), ("adam", 0.5)]
    common = {"rank": 8, "learning_rate": 1e-3, "init": "kaiming_uniform"}
    key = stream_key(0, "a stream")
    sizes, draws = layer_rms.measured_rms(LAYERS[0], key, steps=steps, relative_error=1.0, draws=600, **common)
    exact = [value for step in steps for value in layer_rms.exact_rms(LAYERS[0], step, **common)]
    assert draws == 600
    assert max(abs(a.value - b) / a.error for a, b in zip(sizes, exact, strict=True)) < 5.1
    sizes, _ = layer_rms.measured_rms(LAYERS[0], key, steps=steps, relative_error=0.05, **common)
    assert max(size.error / size.value for size in sizes) <= 0.05


@pytest.mark.slow
def test_rows_are_the_law_s_within_their_errors() -> None:
    """Every optimizer, rule and split has its own law. |z| is below 5, a false-alarm rate of 1e-4 over all rows."""
    rows = [row for cell in layer_grid.layer_cells(GRID, LAYERS) for row in layer_grid.layer_rows(GRID, LAYERS, cell)]
    assert {tuple(row) for row in rows} == {layer_grid.COLUMNS}
    table = frames.from_rows(rows, layer_grid.COLUMNS)
    assert len(table) == 2 * 3 * 2 * 3 * 2  # layers, ranks, optimizers, rules, splits
    assert ((table["estimate"] - table["exact"]) / table["standard_error"]).abs().max() < 5
    assert set(table["init"]) == {"kaiming_uniform"}
    assert dict(zip(table["split"], table["tokens"], strict=True)) == {"train": 5, "heldout": 6}
    for row in table.sample(8, random_state=0).to_dict("records"):
        layer = next(layer for layer in LAYERS if layer.name == row["layer"])
        assert row["scaling"] == pytest.approx(scaling_factor(row["kappa"], alpha=4.0, rank=row["rank"]), rel=1e-12)
        law = laws.first_step_moments(
            layer.grad, layer.inputs[row["split"]], rank=row["rank"], scaling=row["scaling"], learning_rate=1e-3,
            optimizer=row["optimizer"], init="kaiming_uniform", epsilon=layer_rms.EPSILON,
        )  # fmt: skip
        assert row["exact"] == pytest.approx(np.sqrt(np.mean(law.second_moment)), rel=1e-9)
    # Rules are factors of one step: their exponents differ by gamma's alone.
    slopes = layer_grid.layer_exponents(table, low=8, high=32).set_index(layer_grid.GROUP).sort_index()
    assert set(zip(slopes["low"], slopes["high"], strict=True)) == {(8, 32)}
    for optimizer, power in (("sgd", 2), ("adam", 1)):
        by_rule = slopes.loc[optimizer, "kaiming_uniform", "heldout", "two"]
        apart = by_rule.loc["rora"] - by_rule.loc["lora"]
        assert (apart["slope"], apart["exact"]) == pytest.approx((power / 2, power / 2), abs=1e-3)
    of_one_rank = layer_grid.layer_exponents(table[table["rank"] == 8], low=8, high=128)
    assert of_one_rank["slope"].isna().all()
    assert len(of_one_rank) == len(slopes)
    assert set(layer_grid.layer_exponents(table, low=16, high=128)["low"]) == {2}  # one rank between: over all


def test_a_requested_init_is_used() -> None:
    grid = StepGrid(ranks=(4,), inits=("normal", "gaussian"))
    assert [(cell.layer, cell.init) for cell in layer_grid.layer_cells(grid, LAYERS)] == [
        (layer, init) for layer in ("one", "two") for init in ("normal", "gaussian")
    ]


def test_crossings_are_where_the_terms_are_equal() -> None:
    """For each layer, split and optimizer, a token's terms are |x|^2 r and |x|^2 r (r - o) / (r* - o), with o = 1
    for Adam. Their sums are equal at the layer's r*.
    """
    crossings = layer_grid.crossings(GRID, LAYERS).set_index(["layer", "split", "optimizer"])
    assert len(crossings) == 8
    for layer in LAYERS:
        for split in SPLITS:
            for optimizer in OPTIMIZERS:
                row = crossings.loc[layer.name, split, optimizer]
                x, offset = layer.inputs[split], 0.0 if optimizer == "sgd" else 1.0
                ranks = laws.crossing_rank(layer.grad, x, optimizer=optimizer)
                weight = np.sum(np.float64(x) ** 2, axis=1)
                signal = np.sum(weight * (row["crossing_rank"] - offset) / (ranks - offset))
                assert signal == pytest.approx(np.sum(weight), rel=1e-12)
                quartiles = row[["lower_quartile", "median", "upper_quartile"]].to_list()
                assert quartiles == pytest.approx(np.quantile(ranks, [0.25, 0.5, 0.75]), rel=1e-12)
