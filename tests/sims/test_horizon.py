"""The command on tiny weights: it goes on, grows, judges what the folder has, and says what is missing."""

from pathlib import Path

import pandas as pd
import pytest
from support import checkpoint, regime_runs

from rora_theory.io import frames
from rora_theory.runs.reading import CELLS
from sims import horizon as sim

LRS = ("1e-3", "1e-2", "1e-1")
FULL_LRS = ("1e-4", "1e-3", "1e-2")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> list[str]:
    data = checkpoint.two_files(tmp_path_factory.mktemp("data"))
    model = checkpoint.model(tmp_path_factory.mktemp("model"))
    words = ["--data", *(str(data / name / "train.json") for name in ("one", "two")), "--model", str(model)]
    words += [
        "--ranks",
        "2",
        "--read-at",
        "1",
        "2",
        "--train-records",
        "12",
        "--held-out",
        "6",
        "--cutoff",
        "400",
        "--warmup",
        "0",
    ]
    return [*words, "--regime", str(regime_runs.write(tmp_path_factory.mktemp("regime") / "run"))]


@pytest.mark.slow
@pytest.mark.usefixtures("carried")
def test_it_says_what_is_missing_grows_and_judges_all_that_the_folder_has(base, tmp_path, capsys) -> None:
    out = tmp_path / "run"
    sim.main([*base, "--strengths", "4", "--lrs", *LRS[:2], "--out", str(out)])
    assert "No rank and strength has three rates yet; 2 runs" in " ".join(capsys.readouterr().out.split())
    sim.main([*base, "--strengths", "4", "--lrs", *LRS, "--out", str(out)])
    assert "no two of their best rates can be compared yet" in " ".join(capsys.readouterr().out.split())
    first = (out / CELLS).read_text()
    sim.main([*base, "--strengths", "40", "--lrs", *LRS, "--full-lrs", *FULL_LRS, "--out", str(out)])
    said = " ".join(capsys.readouterr().out.split())
    assert "compared with 9 runs:" in said
    assert "Comparisons, each at its own best rate" in said
    assert (out / CELLS).read_text().startswith(first), "what was done is not done again"
    rows = frames.read_csv(out / "results.csv")
    full, rows = rows[rows["rank"].isna()], rows[rows["rank"].notna()]
    assert len(rows) == 2 * 3 * 2
    assert set(rows["strength"]) == {4, 40}
    assert (rows["gamma"] == rows["strength"] / 2).all()
    assert full["learning_rate"].tolist() == [float(rate) for rate in FULL_LRS for _ in (1, 2)]
    assert full["strength"].isna().all()
    assert full.query("step == 2")["validation_loss"].nunique() == 3
    beside = frames.read_csv(out / "beside.csv")
    assert sorted(beside[["step", "rank", "strength", "beside"]].to_numpy().tolist()) == [
        [s, 2, g, other] for s in (1, 2) for g, other in ((4, "full"), (4, "gamma r = 40"), (40, "full"))
    ]
    losses = rows.set_index(["step", "learning_rate", "strength"])["validation_loss"].unstack()
    one_rate = frames.read_csv(out / "one_rate.csv").set_index(["step", "learning_rate"])["difference"]
    pd.testing.assert_series_equal(one_rate, losses[4] - losses[40], check_names=False, check_dtype=False, rtol=1e-9)
    found = frames.read_csv(out / "exponents.csv")
    assert found["step"].tolist() == [1, 2]
    assert (found["over"] == "strength").all()
    assert Path(out / "records.csv").read_text().count("\n") == 7


@pytest.mark.slow
@pytest.mark.usefixtures("carried")
def test_a_folder_of_another_setting_stands_beside_it(base, tmp_path, capsys) -> None:
    """Of the same records; the same setting and other records are refused before anything is trained."""
    words = [*base, "--strengths", "4", "--lrs", *LRS]
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    sim.main([*words, "--out", one])
    sim.main([*words, "--targets", "q_proj", "--compare-to", one, "--out", other])
    beside = frames.read_csv(Path(other) / "beside.csv")
    name = "targets q_proj k_proj v_proj up_proj down_proj"
    assert beside[["step", "rank", "strength", "beside"]].to_numpy().tolist() == [[s, 2, 4, name] for s in (1, 2)]
    assert (beside["difference"] != 0).all()
    own, all_modules = (frames.read_csv(Path(path) / "best.csv").set_index("step") for path in (other, one))
    difference = (own["best_loss"] - all_modules["best_loss"]).to_numpy()
    assert beside["difference"].to_numpy() == pytest.approx(difference, abs=2e-5), "these less those"
    capsys.readouterr()
    for more, said in ((["--compare-to", one], "no setting differs"), (["--held-out", "5"], "records differs")):
        with pytest.raises(SystemExit) as stop:
            sim.main([*words, "--compare-to", one, *more, "--out", str(tmp_path / "new")])
        assert stop.value.code == 2
        assert said in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [("--lrs 1e-3 1e-3", "lrs"), ("--read-at 2 1", "read"), ("--strengths -1", "strengths"), ("--ranks 0", "rank")],
)
def test_bad_input(base, words, said, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        sim.main([*base, *words.split(), "--out", str(tmp_path / "run")])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
