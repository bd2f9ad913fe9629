"""Best rates in the controlled problem, and their figure."""

from pathlib import Path

import numpy as np
import pytest
from support import commands, drawings

from figures import lr_transfer as figure
from rora_theory.lab.sweep.controlled_grid import DIVERGED, LOSS_COLUMNS
from sims import lr_transfer as sim

SMALL = "--ranks 4 16 64 --optimizers adam --read-at 8 --seeds 0 1 2 --p-in 32 --p-out 4 --samples 16 --held-out 16"
SMALL += " --overlap 0.9"
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


def run_lr_transfer(out: Path, *words: object) -> Path:
    """Run the command, and return its folder."""
    commands.output(commands.run_command(sim.main, *words, "--out", out))
    return out


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return run_lr_transfer(tmp_path_factory.mktemp("rates") / "run", SMALL)


@pytest.mark.slow
def test_rows_and_their_figure(finished):
    rows = commands.rows(finished / "results.csv")
    assert tuple(rows[0]) == LOSS_COLUMNS
    assert len(rows) == 2 * 3 * 3 * 3 * len(sim.LrTransferOptions().grid.adam_lrs)  # trained, rules, ranks, seeds
    for row in rows:
        assert float(row["scaling"]) == pytest.approx((4 / int(row["rank"])) ** float(row["kappa"]), rel=1e-5)
    assert drawings.names(figure, finished) == {"lr_transfer"}


@pytest.mark.slow
def test_frozen_adam_moves_as_the_signal_predicts(finished):
    """With B alone under Adam only gamma times the rate counts, so best rates of two rules differ by their gammas.

    To 5%: Adam's epsilon and the parabola's place on the grid.
    """
    best_rates = commands.rows(finished / "best.csv")
    for rank in (16, 64):
        lora, rora = (commands.selected(best_rates, trained="B", rule=rule, rank=rank) for rule in ("lora", "rora"))
        assert not lora["edge"]
        assert not rora["edge"]
        ratio = float(lora["best_rate"]) / float(rora["best_rate"])
        assert ratio == pytest.approx((rank / 4) ** 0.5, rel=0.05)
    slopes = commands.rows(finished / "slopes.csv")
    for rule, kappa in (("lora", 1.0), ("rora", 0.5)):
        row = commands.selected(slopes, trained="B", rule=rule)
        # Overlap 0.9: the signal dominates from rank 4 on, to about a tenth.
        assert abs(float(row["slope"]) - (kappa - 1)) < 0.2
        assert float(row["signal"]) == pytest.approx(kappa - 1, abs=1e-12)


@pytest.mark.slow
def test_a_finite_but_diverged_run_is_no_point(tmp_path):
    """SGD far above its stable rate has a finite loss of 1e9 times its start, which would distort every parabola."""
    words = "--optimizers sgd --sgd-lrs 0.01 0.1 1 10 100 1000"
    rows = commands.rows(run_lr_transfer(tmp_path / "run", SMALL, words) / "results.csv")
    losses = np.array([float(row["loss_train"]) for row in rows])
    small = max(float(row["loss_train"]) for row in rows if row["learning_rate"] == "0.01")
    assert np.isinf(losses).any()
    assert (losses[np.isfinite(losses)] < 2 * DIVERGED * small).all()
    for row in rows:
        assert np.isfinite(float(row["loss_train"])) == np.isfinite(float(row["loss_held_out"]))


@pytest.mark.slow
@pytest.mark.usefixtures("pickled_work")
def test_an_interrupted_run_resumes(finished, tmp_path):
    commands.check_resumption(sim.main, [SMALL], finished, tmp_path / "run")
