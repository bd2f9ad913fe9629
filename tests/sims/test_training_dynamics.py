"""The experiment at small size: rows, slopes and answers, going on after an interruption, diverged runs, bad input."""

import csv
import json
from pathlib import Path

import pytest

from figures import style
from figures import training_dynamics as figure
from sims import training_dynamics as sim
from sims.common.cells import CELLS

ARGUMENTS = (
    "--ranks 4 64 --optimizers sgd adam --models linear --starts A --steps 1 4 --seeds 16 --p-in 64 --p-out 6 "
    "--samples 1 --held-out 4 --sgd-rate 1e-4 --adam-rate 1e-6"
)
SMALL = ARGUMENTS.split()


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dynamics") / "run"
    sim.main([*SMALL, "--out", str(out)])
    return out


def slope(rows, **wanted):
    found = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    assert len(found) == 1
    return float(found[0]["slope"]), float(found[0]["standard_error"]), found[0]["verdict"]


def test_slopes_are_the_table(finished):
    """One training input, so the signal leads on it: kappa = 1/2 and 1 are flat; ranks up to p_in, held-out apart.

    The exact law's slopes over these ranks are within 0.03 of the limit on the training input (r* is 1 and 2.6); the
    rest is the sampling error.
    """
    rows = rows_of(finished / "exponents.csv")
    common = {"trained": "both", "range": "all", "step": "1"}
    for optimizer, power, flat in (("sgd", 2, 0.5), ("adam", 1, 1.0)):
        for rule, kappa in (("lora", 1.0), ("rora", 0.5), ("0.25", 0.25)):
            value, error, verdict = slope(rows, optimizer=optimizer, rule=rule, quantity="output_train", **common)
            assert abs(value - power * (flat - kappa)) < 0.03 + 4 * error
            assert (verdict == "flat") <= (kappa == flat)  # the others must fail
        # Held out, in a direction of its own: the cross-talk's half power, drawn up by r near p_in.
        value, error, _ = slope(rows, optimizer=optimizer, rule="rora", quantity="output_held_out", **common)
        assert 0.5 - power / 2 < value + 4 * error
        assert value - 4 * error < 0.75 - power / 2


def test_files(finished):
    rows = rows_of(finished / "seeds.csv")
    cells = 2 * 2 * 3 * 2  # optimizers, ranks, rules, A trained or frozen
    assert len(rows) == cells * 16 * 3
    assert tuple(rows[0]) == sim.SEED_COLUMNS
    first = [row for row in rows if row["step"] == "0"]
    assert {row["output_train"] for row in first} == {"0.0"}
    for row in rows:
        kappa = {"lora": 1, "rora": 0.5, "0.25": 0.25}[row["rule"]]
        assert float(row["scaling"]) == pytest.approx((4 / int(row["rank"])) ** kappa)
    means = rows_of(finished / "results.csv")
    assert len(means) == cells * 3
    assert tuple(means[0]) == sim.COLUMNS
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["status"] == "complete"
    assert manifest["config"]["samples"] == 1
    assert len(json.loads((finished / "answers.json").read_text())) == 6


def test_goes_on(finished, tmp_path):
    """What an interrupted run left is kept, the rest done, to the same bytes; another command is refused."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "manifest.json").write_bytes((finished / "manifest.json").read_bytes())
    lines = (finished / CELLS).read_text().splitlines(keepends=True)
    assert len(lines) == 24
    (out / CELLS).write_text("".join(lines[:-1]) + lines[-1][:100])  # all cells but the last, which was being written
    sim.main([*SMALL, "--out", str(out)])
    for name in ("seeds.csv", "results.csv", "exponents.csv", "answers.json"):
        assert (out / name).read_bytes() == (finished / name).read_bytes()
    with pytest.raises(SystemExit) as stopped:
        sim.main([*SMALL, "--seed", "1", "--out", str(out)])
    assert stopped.value.code == 2


def test_the_frozen_control_trains_b_alone(finished):
    """With A frozen, A x stays bit for bit while the output moves; trained, Adam moves it in the fifth digit."""
    rows = {
        tuple(row[name] for name in ("trained", "optimizer", "rule", "rank", "seed", "step")): row
        for row in rows_of(finished / "seeds.csv")
    }
    for (trained, optimizer, *rest, step), row in rows.items():
        if step == "4":
            assert float(row["output_train"]) > 0
            before = float(rows[trained, optimizer, *rest, "0"]["inner"])
            if trained == "B":
                assert float(row["inner"]) == before
            elif optimizer == "adam":
                assert float(row["inner"]) != before


def test_each_optimizer_has_its_rate():
    config = sim.Config(sgd_rate=1.0, momentum_rate=2.0, adam_rate=3.0)
    assert [sim.rate(config, name) for name in ("sgd", "momentum", "adam", "adamw")] == [1, 2, 3, 3]


def test_diverged_runs_are_reported(tmp_path, capsys):
    sim.main([*SMALL, "--optimizers", "sgd", "--no-freeze-control", "--sgd-rate", "3", "--out", str(tmp_path / "run")])
    shown = capsys.readouterr().out
    assert "diverged by the last step" in shown
    rows = rows_of(tmp_path / "run" / "results.csv")
    assert any(int(row["diverged"]) for row in rows if row["step"] == "4")
    assert not any(int(row["diverged"]) for row in rows if row["step"] == "0")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--ranks 4", "--ranks"),
        ("--ranks 4 4", "--ranks"),
        ("--ranks 0 4", "--ranks"),
        ("--rules lora 1.0", "--rules"),
        ("--rules best", "--rules"),
        ("--steps 2 1", "steps"),
        ("--seeds 1", "--seeds"),
        ("--gamma 0", "--gamma"),
        ("--reference-rank 0", "--reference-rank"),
        ("--adam-rate nan", "--adam-rate"),
        ("--overlap 2", "overlap"),
        ("--samples 0", "samples"),
    ],
)
def test_bad_input(arguments, named, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        sim.main([*arguments.split(), "--out", str(tmp_path / "run")])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert named in error
    assert not (tmp_path / "run").exists()


def test_figures(finished, tmp_path, capsys):
    style.main(figure.draw, figure.Config(finished, out=tmp_path))
    assert len(capsys.readouterr().out.split()) == 4
    assert all(path.stat().st_size > 5000 for path in tmp_path.iterdir())
    with pytest.raises(SystemExit):
        figure.draw(figure.Config(finished, model="mlp"))
