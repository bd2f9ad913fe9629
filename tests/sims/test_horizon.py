"""`python -m sims.sweep --config configs/horizon.yaml` on tiny weights: resumption, further runs, their analysis."""

import shutil
from pathlib import Path

import pandas as pd
import pytest
from support import commands, regime_runs

from rora_theory.runs import frames
from rora_theory.runs.reading import CELLS
from sims import sweep as sim

CONFIG = Path(__file__).parents[2] / "configs" / "horizon.yaml"
ARGUMENTS = "--ranks 2 --read-at 1 2 --train-records 12 --held-out 6 --cutoff 400 --warmup 0 --widths 1"
FULL_LRS = [1e-4, 1e-3, 1e-2]


@pytest.fixture(scope="module")
def base(model, data, tmp_path_factory) -> list[str]:
    files = [str(data / name / "train.json") for name in ("one", "two")]
    regime = regime_runs.write(tmp_path_factory.mktemp("regime") / "run")
    return ["--config", str(CONFIG), "--data", *files, "--model", str(model), "--regime", str(regime), ARGUMENTS]


def run_horizon(base: list[str], words: str) -> commands.Ended:
    """Run the command; what it prints is on one line."""
    status, out, err = commands.run_command(sim.main, *base, words)
    return commands.Ended(status, " ".join(out.split()), err)


@pytest.fixture(scope="module")
def begun(base, tmp_path_factory) -> Path:
    """A folder of one gain, which lacked a rate at first."""
    out = tmp_path_factory.mktemp("horizon") / "run"
    printed = run_horizon(base, f"--gains 4 --lrs 1e-3 1e-2 --out {out}").out
    assert "Lowest validation loss of 2 cells" in printed
    printed = run_horizon(base, f"--gains 4 --lrs 1e-3 1e-2 1e-1 --out {out}").out
    assert "No two best rates of the 3 runs" in printed
    return out


@pytest.mark.slow
@pytest.mark.usefixtures("pickled_work")
def test_a_grown_folder_is_analysed_with_all_of_its_runs(base, begun, tmp_path) -> None:
    out = Path(shutil.copytree(begun, tmp_path / "run"))
    first = (out / CELLS).read_text()
    printed = run_horizon(base, f"--gains 40 --lrs 1e-3 1e-2 1e-1 --full-lrs 1e-4 1e-3 1e-2 --out {out}").out
    assert "of 9 runs:" in printed
    assert "Comparisons, each at its own best rate" in printed
    assert (out / CELLS).read_text().startswith(first), "finished cells are not computed again"
    rows = frames.read_csv(out / "results.csv")
    full, rows = rows[rows["method"] == "full"], rows[rows["rank"].notna()]
    assert len(rows) == 2 * 3 * 2
    assert set(rows["gain"]) == {4, 40}
    assert (rows["gamma"] == rows["gain"] / 2).all()
    assert full["learning_rate"].tolist() == [rate for rate in FULL_LRS for _ in (1, 2)]
    assert full["gain"].isna().all()
    assert full.query("step == 2")["validation_loss"].nunique() == 3
    comparisons = frames.read_csv(out / "comparisons.csv")
    assert sorted(comparisons[["step", "rank", "gain", "compared_with"]].to_numpy().tolist()) == [
        [s, 2, g, other] for s in (1, 2) for g, other in ((4, "full"), (4, "gamma r = 40"), (40, "full"))
    ]
    losses = rows.set_index(["step", "learning_rate", "gain"])["validation_loss"].unstack()
    one_rate = frames.read_csv(out / "one_rate.csv").set_index(["step", "learning_rate"])["difference"]
    pd.testing.assert_series_equal(one_rate, losses[4] - losses[40], check_names=False, check_dtype=False, rtol=1e-9)
    exponents = frames.read_csv(out / "exponents.csv")
    assert exponents["step"].tolist() == [1, 2]
    assert (exponents["over"] == "gain").all()
    assert (out / "records.csv").read_text().count("\n") == 7


@pytest.mark.slow
@pytest.mark.usefixtures("pickled_work")
def test_runs_of_another_setting_are_compared(base, begun, tmp_path) -> None:
    """The tests of the library cover runs that cannot be compared."""
    other, words = tmp_path / "other", "--gains 4 --lrs 1e-3 1e-2 1e-1"
    assert run_horizon(base, f"{words} --targets q_proj --compare-to {begun} --out {other}").status == 0
    comparisons = frames.read_csv(other / "comparisons.csv")
    name = "targets q_proj k_proj v_proj up_proj down_proj"
    assert comparisons[["step", "rank", "gain", "compared_with"]].to_numpy().tolist() == [
        [s, 2, 4, name] for s in (1, 2)
    ]
    assert (comparisons["difference"] != 0).all()
    q_alone, all_modules = (frames.read_csv(path / "best.csv").set_index("step") for path in (other, begun))
    difference = (q_alone["best_loss"] - all_modules["best_loss"]).to_numpy()
    assert comparisons["difference"].to_numpy() == pytest.approx(difference, abs=2e-5), (
        "the runs of this folder minus those of the other"
    )


@pytest.mark.slow
@pytest.mark.usefixtures("pickled_work")
def test_further_axes_extend_a_folder_and_are_compared_with_its_first_runs(base, begun, tmp_path) -> None:
    """Under a schedule that decays, each number of steps is a run of its own; its first runs are not repeated."""
    out = Path(shutil.copytree(begun, tmp_path / "run"))
    words = "--gains 4 --lrs 1e-3 1e-2 1e-1 --axes schedule=constant,cosine batch_size=4,8"
    printed = run_horizon(base, f"{words} --out {out}").out
    assert "Lowest validation loss of 18 cells" in printed
    assert "cosine 8" in printed, "the tables name the settings"
    rows = frames.read_csv(out / "results.csv")
    # The shared schedule has one run for both numbers of steps, and the other has two.
    assert rows.groupby(["schedule", "batch_size"]).size().tolist() == [6, 6, 6, 6]
    assert rows.groupby(["schedule", "batch_size"])["key"].nunique().to_dict() == {
        ("constant", 4): 3, ("constant", 8): 3, ("cosine", 4): 6, ("cosine", 8): 6,
    }  # fmt: skip
    first = frames.read_csv(begun / "results.csv").set_index(["learning_rate", "step"])["validation_loss"]
    again = rows.query("schedule == 'constant' and batch_size == 4").set_index(["learning_rate", "step"])
    pd.testing.assert_series_equal(again["validation_loss"], first, check_like=True)
    best = frames.read_csv(out / "best.csv")
    assert len(best) == 2 * 2 * 2
    compared = frames.read_csv(out / "comparisons.csv")
    assert set(compared["compared_with"]) == {"batch_size 4, schedule constant"}
    assert len(compared) == 3 * 2
