"""The grid in real layers: rows against the law, exponents between the users' ranks, crossing ranks."""

import numpy as np
import pytest

from rora_theory.io import frames
from rora_theory.measure.layers import layer_grid, layer_rms
from rora_theory.measure.layers.layer_data import SPLITS, Layer
from rora_theory.scaling import scaling_factor
from rora_theory.theory import laws
from rora_theory.theory.grid import StepGrid

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


@pytest.mark.slow
def test_rows_are_the_law_s_within_their_errors() -> None:
    """Every optimizer, rule and split, each beside its own law. |z| below 5: a false alarm of 1e-4 over all rows."""
    cells = layer_grid.layer_cells(GRID, LAYERS)
    rows = [row for cell in cells for row in layer_grid.layer_rows(GRID, LAYERS, cell)]
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
        own = slopes.loc[optimizer, "kaiming_uniform", "heldout", "two"]
        apart = own.loc["rora"] - own.loc["lora"]
        assert (apart["slope"], apart["exact"]) == pytest.approx((power / 2, power / 2), abs=1e-3)
    alone = layer_grid.layer_exponents(table[table["rank"] == 8], low=8, high=128)
    assert alone["slope"].isna().all()
    assert len(alone) == len(slopes)
    assert set(layer_grid.layer_exponents(table, low=16, high=128)["low"]) == {2}  # one rank between: over all


def test_an_asked_init_is_taken() -> None:
    grid = StepGrid(ranks=(4,), inits=("normal", "gaussian"))
    assert [(cell.layer, cell.init) for cell in layer_grid.layer_cells(grid, LAYERS)] == [
        (layer, init) for layer in ("one", "two") for init in ("normal", "gaussian")
    ]


def test_crossings_are_by_layer_split_and_optimizer() -> None:
    found = layer_grid.crossings(GRID, LAYERS)
    assert len(found) == 8
    row = found.iloc[5]
    assert (row["layer"], row["split"], row["optimizer"]) == ("two", "train", "adam")
    alone = layer_rms.crossing(LAYERS[1], "train", "adam").crossing_rank
    assert row["crossing_rank"] == pytest.approx(alone, rel=1e-12)
