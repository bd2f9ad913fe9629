"""Simulation of the paper's setting: one stream for all rules against the exact law; exponents; verdicts."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from rora_theory import laws
from rora_theory.laws import sampling
from rora_theory.paper import simulation, verdicts
from rora_theory.paper.simulation import SimulationCell, SimulationConfig

pytestmark = pytest.mark.usefixtures("optimised")  # many draws

CONFIG = SimulationConfig(
    ranks=(1, 16, 4), relative_error=0.02, alpha=8.0, lr=1e-3, p_in=64, p_out=8, overlaps=(0.0, 0.5)
)


@pytest.fixture(scope="module")
def sums_of_cell() -> dict[SimulationCell, list[sampling.StreamMoments]]:
    return {cell: simulation.draw_cell(CONFIG, cell) for cell in simulation.simulation_cells(CONFIG)}


def test_cells_are_the_grid_and_the_direct_check() -> None:
    """The grid has unit scaling and the table's order; the check covers all scalings where the grid is not direct."""
    cells = simulation.simulation_cells(CONFIG)
    grid = [cell for cell in cells if not cell.steps]
    assert cells[: len(grid)] == grid
    assert [(c.setting.optimizer, c.setting.overlap, c.setting.rank) for c in grid] == [
        (optimizer, overlap, rank) for optimizer in ("sgd", "adam") for overlap in (0.0, 0.5) for rank in (1, 16, 4)
    ]
    assert {(c.setting.scaling, c.setting.learning_rate, c.setting.init) for c in grid} == {(1.0, 1.0, "normal")}
    check = cells[len(grid) :]
    assert [(c.setting.overlap, c.setting.rank, c.sampler) for c in check] == [(0.0, 1, "direct"), (0.5, 1, "direct")]
    for cell in check:
        unit = replace(cell.setting, scaling=8.0, learning_rate=1e-3)
        assert cell.steps == (replace(unit, optimizer="sgd"),) * 3 + (replace(unit, optimizer="adam"),) * 3
    eight = simulation.simulation_cells(replace(CONFIG, ranks=(8,)))[-1]
    assert [step.scaling for step in eight.steps] == pytest.approx((1.0, 8**0.5, 8**0.75) * 2)
    assert len({str(cell) for cell in cells}) == len(cells)
    uniform = SimulationConfig(inits=("kaiming_uniform",))
    for config in (
        uniform,
        replace(CONFIG, p_in=4096, p_out=4096, overlaps=SimulationConfig().overlaps, sampler="direct"),
    ):
        assert {(cell.sampler, cell.steps) for cell in simulation.simulation_cells(config)} == {("direct", ())}


@pytest.mark.slow
def test_rows_are_the_law_s_within_their_errors(
    sums_of_cell: dict[SimulationCell, list[sampling.StreamMoments]],
) -> None:
    """Rows of every rule come from one stream; the direct check takes a separate step for each rule.

    |z| below 5.6: a false alarm of 1e-5 over 288 rows, of which fewer are independent.
    """
    table = simulation.simulation_table(
        row for cell, sums in sums_of_cell.items() for row in simulation.simulation_rows(CONFIG, cell, sums)
    )
    assert tuple(table) == simulation.COLUMNS
    assert len(table) == 2 * 2 * 3 * 3 * 4 + 4 * 3 * 4  # optimizers, overlaps, ranks, rules, quantities; the check
    assert table["scaling"].to_numpy() == pytest.approx(8.0 / table["rank"] ** table["kappa"], rel=1e-12)
    scores = (table["estimate"] - table["exact"]) / table["standard_error"]
    assert scores.abs().max() < 5.6
    for row in table.sample(20, random_state=0).to_dict("records"):
        law = laws.random_input_moments(
            rank=row["rank"], p_in=64, scaling=row["scaling"], overlap=row["overlap"], learning_rate=1e-3,
            optimizer=row["optimizer"],
        )  # fmt: skip
        second = law.second_moment[0]
        exact = {"mean": law.mean[0], "second_moment": second, "variance": law.variance[0], "norm": (8 * second) ** 0.5}
        assert row["exact"] == pytest.approx(exact[row["quantity"]], rel=1e-12)
    printed = table[(table["optimizer"] == "sgd") & (table["quantity"] == "variance")]
    assert printed["paper"].to_numpy() == pytest.approx(1e-6 * printed["scaling"] ** 4 * printed["rank"] ** 2 * 64)
    assert table["paper"].isna().equals(table["optimizer"] == "adam")
    reduced = table[table["sampler"] != "direct"]
    relative = (reduced["standard_error"] / reduced["estimate"]).abs()
    assert (relative[reduced["quantity"] == "second_moment"] <= 0.02).all()
    # Rules differ by their power of gamma alone.
    by_curve = relative.groupby([reduced[name] for name in ("optimizer", "overlap", "rank", "quantity")])
    np.testing.assert_allclose(by_curve.min(), by_curve.max(), rtol=1e-12)


@pytest.mark.slow
def test_a_requested_number_of_draws_is_the_grid_s() -> None:
    """The direct check has no stopping rule and keeps its own number of draws."""
    config = SimulationConfig(ranks=(1,), draws=300, p_in=8, p_out=2)
    first, *_, last = simulation.simulation_cells(config)
    counts = [[sums.count for sums in simulation.draw_cell(config, cell)] for cell in (first, last)]
    assert counts == [[300], [simulation.CHECK_DRAWS] * 6]


def test_exponents_are_of_all_ranks_and_of_the_thirds() -> None:
    """A bent curve has a different slope over each range; the ranks need not be sorted."""
    ranks = np.array([32, 1, 2, 16, 4, 8])
    norm = np.where(ranks <= 4, ranks, 4.0)
    line = {"optimizer": "sgd", "init": "normal", "overlap": 0.0, "rule": "lora", "quantity": "norm"}
    table = simulation.simulation_table(
        line | {"rank": rank, "estimate": value, "standard_error": 0.0, "exact": 1.0}
        for rank, value in zip(ranks.tolist(), norm.tolist(), strict=True)
    )
    exponents = simulation.simulated_exponents(table)
    assert exponents[["low", "high"]].to_numpy().tolist() == [[1, 32], [1, 2], [16, 32]]
    assert exponents["slope"].tolist()[1:] == pytest.approx([1.0, 0.0], abs=1e-12)
    assert 0 < exponents["slope"][0] < 1
    assert simulation.simulated_exponents(table[:1]).empty
    assert len(simulation.simulated_exponents(table[:2])) == 1


def test_the_largest_score_is_that_of_the_second_moment() -> None:
    rows = [
        {"quantity": quantity, "estimate": estimate, "standard_error": 0.5, "exact": 2.0}
        for quantity, estimate in (("mean", 9.0), ("second_moment", 3.0), ("second_moment", 0.5))
    ]
    assert simulation.largest_score(simulation.simulation_table(rows)) == 3.0
    undefined = simulation.simulation_table([*rows, rows[1] | {"estimate": math.nan}])
    assert math.isnan(simulation.largest_score(undefined))


@pytest.mark.slow
def test_verdicts_reuse_known_sums(
    sums_of_cell: dict[SimulationCell, list[sampling.StreamMoments]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No stream is drawn twice, and missing ones are drawn like the grid's cells."""
    requested: list[sampling.RandomStep] = []
    draw = simulation.draw_cell

    def watched(config: SimulationConfig, cell: SimulationCell, devices: Any = None) -> list[sampling.StreamMoments]:
        requested.append(cell.setting)
        return draw(config, cell, devices)

    monkeypatch.setattr(simulation, "draw_cell", watched)
    known = {cell.setting: sums[0] for cell, sums in sums_of_cell.items() if not cell.steps}
    judged = simulation.judge_simulation(CONFIG, known)
    assert len(judged) == 17
    assert sorted(judged, key=verdicts.order_in_paper)[2].equation == "gradient A"
    assert requested
    assert not set(requested) & set(known)
    assert len(requested) == len(set(requested))
    known |= {setting: draw(CONFIG, SimulationCell(setting, "chi_square"))[0] for setting in requested}
    assert simulation.judge_simulation(CONFIG, known) == judged


def test_each_rule_has_its_gamma() -> None:
    config = SimulationConfig(rules=("lora", "rora", 0.25), alpha=8.0)
    assert dict(config.scalings(16)) == pytest.approx({"lora": 0.5, "rora": 2.0, 0.25: 4.0})


@pytest.mark.parametrize("order", [sorted, lambda ranks: ranks[::-1]])
def test_the_exponent_of_each_curve_is_its_power_in_each_range(order: Callable[[list[int]], list[int]]) -> None:
    """With two points the error is the root sum of squares of the relative errors over the distance in log rank."""
    ranks = np.array(order([4, 64, 256]))
    curves = [
        pd.DataFrame({"rank": ranks, "estimate": 3.0 * ranks**power, "exact": 2.0 * ranks**0.25, "rule": rule})
        for rule, power in (("lora", -0.5), ("rora", 1.0))
    ]
    table = pd.concat(curves)
    table = table.assign(standard_error=0.1 * table["estimate"], init="normal")
    fits = simulation.exponent_table(table, ["rule", "init"], [[4, 64], [64]]).to_dict("records")
    assert [(fit["rule"], fit["low"], fit["high"]) for fit in fits] == [
        ("lora", 4, 64),
        ("lora", 64, 64),
        ("rora", 4, 64),
        ("rora", 64, 64),
    ]
    for fit, power in zip(fits[::2], (-0.5, 1.0), strict=True):
        figures = [fit[name] for name in ("slope", "standard_error", "exact")]
        assert figures == pytest.approx([power, 0.1 * 2**0.5 / np.log(16), 0.25])
    assert all(np.isnan(fit[name]) for fit in fits[1::2] for name in ("slope", "standard_error", "exact"))
    assert simulation.exponent_table(table, ["rule", "init"], []).empty
