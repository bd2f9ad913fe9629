"""The table of a probe's losses, and the displacement constant from the run that may provide it."""

import math

import pytest

from rora_theory.advice.best_rate import Run
from rora_theory.laws.displacement import measured_constant
from rora_theory.measure.tuning.curve import CURVE_COLUMNS, compute_displacement_constant, curve_frame
from rora_theory.measure.tuning.plan import ProbePlan, make_plan
from rora_theory.measure.tuning.trial import ProbeRun

TOKENS = (10, 30)
PLAN: ProbePlan = make_plan(
    Run(128, 64.0, 2000, "cosine", 8), probe_rank=8, batch_tokens=1000, held_out_tokens=10_000
)  # fmt: skip
SHORT, FULL = PLAN.screen_steps or 0, PLAN.probe_steps


def test_the_table_has_a_row_for_each_run() -> None:
    """Rates that only the screening trained, and those that diverged, were stopped early."""
    runs = [
        ProbeRun(4e-4, FULL, diverged_at=3),
        ProbeRun(2e-4, FULL, (20.0, 40.0)),
        ProbeRun(2e-4 * (1 + 1e-8), SHORT, (30.0, 50.0)),
        ProbeRun(1e-4, SHORT, (30.0, 70.0)),
    ]
    table = curve_frame(PLAN, runs, TOKENS)
    assert tuple(table) == CURVE_COLUMNS
    assert table["steps"].tolist() == [SHORT, SHORT, FULL, FULL]
    assert table["learning_rate"].to_numpy() == pytest.approx([1e-4, 2e-4, 2e-4, 4e-4])
    assert table["held_out_loss"].tolist() == [2.5, 2.0, 1.5, math.inf]
    assert table["stopped_early"].tolist() == [True, False, False, True]
    assert table["diverged_at"].isna().tolist() == [True, True, True, False]


def test_the_constant_is_that_of_the_highest_rate_up_to_the_best() -> None:
    """Half a step of a quarter decade above the best rate is allowed: a factor of 1.33."""

    def constant(*rates: float, **others: ProbeRun) -> float | None:
        runs = [ProbeRun(rate, FULL, (20.0, 40.0), (1e3 * rate, 2e3 * rate)) for rate in rates]
        return compute_displacement_constant(PLAN, [*others.values(), *runs], 1e-3)

    def expected(rate: float) -> float:
        return measured_constant(64.0, (1e3 * rate, 2e3 * rate))

    assert expected(1e-3) != pytest.approx(expected(1.3e-3))
    assert constant(5e-4, 1e-3, 2e-3) == pytest.approx(expected(1e-3))
    assert constant(1e-3, 5e-4) == pytest.approx(expected(1e-3)), "in any order"
    assert constant(1e-3, 1.33e-3) == pytest.approx(expected(1.33e-3))
    assert constant(1e-3, 1.34e-3) == pytest.approx(expected(1e-3))
    assert constant(1.4e-3) is None
    # Runs of the screening, without a measured ratio, and that diverged do not provide it.
    for other in (
        ProbeRun(1e-3, SHORT, (20.0, 40.0), (5.0, 5.0)),
        ProbeRun(1e-3, FULL, (20.0, 40.0)),
        ProbeRun(1e-3, FULL, ratios=(5.0, 5.0), diverged_at=2),
    ):
        assert constant(5e-4, other=other) == pytest.approx(expected(5e-4))
        assert constant(other=other) is None
