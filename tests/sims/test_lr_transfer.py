"""Best rates on the controlled problem and from a matrix of real runs; bad input; figures."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from figures import lr_transfer as figure
from figures import style
from rora_theory.runs.reading import CELLS
from rora_theory.stats.rate_curves import COLUMNS
from rora_theory.sweep import trained_runs
from rora_theory.toy import dynamics
from sims import lr_transfer as sim

SMALL = ["--ranks", "4", "16", "64", "--optimizers", "adam", "--steps", "8", "--seeds", "0", "1", "2"]
SMALL += ["--p-in", "32", "--p-out", "4", "--samples", "16", "--held-out", "16", "--overlap", "0.9"]
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
HEADER = ["key", "status", "model", "method", "rule", "rank", "alpha", "gamma", "learning_rate", "seed"]
HEADER += ["validation_loss", "validation_error", "answer_loss"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("rates") / "run"
    sim.main([*SMALL, "--out", str(out)])
    return out


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_rows(finished):
    rows = rows_of(finished / "results.csv")
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == 2 * 3 * 3 * 3 * len(sim.Config().grid.adam_lrs)  # trained, rules, ranks, seeds
    for row in rows:
        assert float(row["scaling"]) == pytest.approx((4 / int(row["rank"])) ** float(row["kappa"]), rel=1e-5)


@pytest.mark.slow
def test_frozen_adam_moves_as_the_signal_predicts(finished):
    """B alone under Adam: only gamma times the rate counts, so best rates of two rules differ by their gammas.

    To 5%: Adam's epsilon and the parabola's place on the grid.
    """
    best_rate_table = {(r["trained"], r["rule"], r["rank"]): r for r in rows_of(finished / "best.csv")}
    for rank in (16, 64):
        lora, rora = (best_rate_table["B", rule, str(rank)] for rule in ("lora", "rora"))
        assert not lora["edge"]
        assert not rora["edge"]
        ratio = float(lora["best_rate"]) / float(rora["best_rate"])
        assert ratio == pytest.approx((rank / 4) ** 0.5, rel=0.05)
    slopes = {(r["trained"], r["rule"]): r for r in rows_of(finished / "slopes.csv")}
    for rule, kappa in (("lora", 1.0), ("rora", 0.5)):
        # Overlap 0.9: the signal leads from rank 4 on, to about a tenth.
        assert abs(float(slopes["B", rule]["slope"]) - (kappa - 1)) < 0.2
        assert float(slopes["B", rule]["signal"]) == pytest.approx(kappa - 1, abs=1e-12)
    compared = json.loads((finished / "comparison.json").read_text())
    frozen = next(c for c in compared if c["trained"] == "B" and (c["first"], c["second"]) == ("lora", "rora"))
    assert frozen["rank"] == 64
    assert frozen["scaling_ratio"] == pytest.approx(4, rel=1e-4)
    # The grid's steps divide the gammas' ratio, so the two runs differ by Adam's epsilon alone.
    assert abs(frozen["difference"]) < 0.01 * frozen["second_loss"]


@pytest.mark.slow
def test_a_finite_but_diverged_run_is_no_point(tmp_path):
    """SGD far beyond its stable rate: a loss of 1e9 times its start is finite and would bend every parabola."""
    rates = "0.01 0.1 1 10 100 1000"
    sim.main([*SMALL, "--optimizers", "sgd", "--sgd-lrs", *rates.split(), "--out", str(tmp_path / "run")])
    rows = rows_of(tmp_path / "run" / "results.csv")
    losses = np.array([float(row["loss_train"]) for row in rows])
    small = max(float(row["loss_train"]) for row in rows if row["learning_rate"] == "0.01")
    assert np.isinf(losses).any()
    assert (losses[np.isfinite(losses)] < 2 * dynamics.DIVERGED * small).all()
    for row in rows:
        assert np.isfinite(float(row["loss_train"])) == np.isfinite(float(row["loss_held_out"]))


@pytest.mark.slow
@pytest.mark.usefixtures("carried")
def test_goes_on(finished, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "manifest.json").write_bytes((finished / "manifest.json").read_bytes())
    lines = (finished / CELLS).read_text().splitlines(keepends=True)
    (out / CELLS).write_text("".join(lines[:-1]))  # a cut at a line's end: the last cell is missing
    sim.main([*SMALL, "--out", str(out)])
    for name in ("results.csv", "best.csv", "slopes.csv", "comparison.json"):
        assert (out / name).read_bytes() == (finished / name).read_bytes()


def matrix(folder: Path, *, seeds=(0,), records=True, gap=0.0, models=("tiny",)) -> Path:
    """A folder as sims.rank_sweep writes it: lora's best rate stays at 1e-3, rora's falls as r^-1/2 from rank 8 on.

    ``gap`` is how much more rora's best loss is.
    """
    random = np.random.default_rng(0)
    tokens = random.integers(5, 20, 50)
    level = 1 + 0.3 * random.normal(size=50)  # of each record, the same in every run
    rows = [["base", "done", models[0], "base", *[""] * 6, "2.0", "0.1", "2.0"]]
    for model in models:
        for method, kappa, shift in (("lora", 1.0, 0.0), ("rora", 0.5, -0.5)):
            for rank in (8, 32, 128):
                for rate in RATES:
                    for seed in seeds:
                        best = 1e-3 * (rank / 8) ** shift
                        loss = (1 + 0.02 * np.log(rate / best) ** 2 + gap * (method == "rora")) * (1 + 0.001 * seed)
                        key = f"{model}-{method}-{rank}-{rate:g}-{seed}"
                        per_record = loss * level * tokens
                        mean = per_record.sum() / tokens.sum()
                        line = [
                            key,
                            "done",
                            model,
                            method,
                            method,
                            rank,
                            16,
                            16 / rank**kappa,
                            rate,
                            seed,
                            mean,
                            0.01,
                            mean,
                        ]
                        if (method, rank, rate) == ("rora", 128, 1e-2):
                            line[1], line[10:] = "diverged", ["", "", ""]
                        elif records:
                            cell = folder / "cells" / key
                            cell.mkdir(parents=True)
                            text = ["file,index,tokens,loss,answer_tokens,answer_loss"]
                            text += [
                                f"f,{i},{b},{a},{b},{a}"
                                for i, (a, b) in enumerate(zip(per_record, tokens, strict=True))
                            ]
                            (cell / "losses.csv").write_text("\n".join(text) + "\n")
                        rows.append(line)
    folder.mkdir(exist_ok=True)
    with (folder / "results.csv").open("w", newline="") as file:
        csv.writer(file).writerows([HEADER, *rows])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_matrix(tmp_path, seeds):
    """The parabolas that the losses were made from are found, over seeds or over records."""
    folder = matrix(tmp_path / "matrix", seeds=seeds)
    sim.main(["--matrix", str(folder), "--out", str(tmp_path / "run")])
    best_rate_table = {(r["rule"], r["rank"]): r for r in rows_of(tmp_path / "run" / "best.csv")}
    for rank in (8, 32, 128):
        # The curve's log is a parabola to second order in 0.02: 3% at these distances.
        assert float(best_rate_table["lora", str(rank)]["best_rate"]) == pytest.approx(1e-3, rel=0.03)
        assert float(best_rate_table["rora", str(rank)]["best_rate"]) == pytest.approx(
            1e-3 * (rank / 8) ** -0.5, rel=0.03
        )
    assert best_rate_table["lora", "8"]["error_over"] == ("seeds" if len(seeds) > 1 else "held-out records")
    slopes = {r["rule"]: float(r["slope"]) for r in rows_of(tmp_path / "run" / "slopes.csv")}
    assert slopes == pytest.approx({"lora": 0.0, "rora": -0.5}, abs=0.02)
    (compared,) = json.loads((tmp_path / "run" / "comparison.json").read_text())
    assert compared["rank"] == 128
    assert compared["ratio"] == pytest.approx(4, rel=0.05)
    assert compared["scaling_ratio"] == pytest.approx(128**0.5)


@pytest.mark.slow
def test_matrix_finds_a_real_difference(tmp_path):
    """2% more at the best rate, the same records in every run: found although the records' own spread is 30%."""
    for seeds, said in (((0, 1), "lora is better by"), ((0,), "undecided: one seed (")):
        folder = matrix(tmp_path / f"matrix{len(seeds)}", gap=0.02, seeds=seeds)
        sim.main(["--matrix", str(folder), "--out", str(tmp_path / f"run{len(seeds)}")])
        (compared,) = json.loads((tmp_path / f"run{len(seeds)}" / "comparison.json").read_text())
        assert compared["verdict"].startswith(said)
        assert compared["standard_error"] < 0.005
        assert "held-out records" in compared["error_over"]
    alone = matrix(tmp_path / "plain", gap=0.02, records=False)
    sim.main(["--matrix", str(alone), "--out", str(tmp_path / "bare")])
    (compared,) = json.loads((tmp_path / "bare" / "comparison.json").read_text())
    assert "not settled" in compared["verdict"]
    assert compared["standard_error"] is None


def test_what_is_read_of_a_matrix(tmp_path):
    """The loss that was asked for, infinite where a run diverged, each cell's own records; no base, none unfinished."""
    folder = matrix(tmp_path / "matrix")
    rows = rows_of(folder / "results.csv")
    for row in rows:
        if row["validation_loss"]:
            row["answer_loss"] = str(10 * float(row["validation_loss"]))
    rows += [rows[1] | {"key": "later", "status": "running", "validation_loss": "", "answer_loss": ""}]
    with (folder / "results.csv").open("w", newline="") as file:
        csv.writer(file).writerows([HEADER, *(row.values() for row in rows)])
    found = {kind: trained_runs.read_runs(folder, loss=kind) for kind in ("validation", "answer")}
    assert len(found["validation"]) == len(rows) - 2
    for plain, answer in zip(*found.values(), strict=True):
        assert answer.loss == pytest.approx(10 * plain.loss) or plain.loss == answer.loss == np.inf
        assert (plain.records is None) == (plain.loss == np.inf)
        if plain.records is not None:
            assert plain.records.sum() / plain.tokens.sum() == pytest.approx(plain.loss)
    assert [(c.method, c.rank, c.rate) for c in found["validation"] if c.loss == np.inf] == [("rora", 128, 1e-2)]


def test_bad_matrices(tmp_path, capsys):
    def refused(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            sim.main([*arguments, "--out", str(tmp_path / "out")])
        assert stopped.value.code == 2
        assert not (tmp_path / "out").exists()
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "results.csv" in refused("--matrix", str(tmp_path / "nowhere"))
    two = matrix(tmp_path / "two", models=("tiny", "small"), records=False)
    assert "--matrix-model" in refused("--matrix", str(two))
    assert "model large" in refused("--matrix", str(two), "--matrix-model", "large")
    text = (two / "results.csv").read_text()
    (two / "results.csv").write_text(text.replace("learning_rate", "rate"))
    assert "no column 'learning_rate'" in refused("--matrix", str(two))
    (two / "results.csv").write_text(
        text.replace("tiny-lora-8-0.001-0,done,tiny,lora,lora,8,", "x,done,tiny,lora,lora,8.5,")
    )
    assert "damaged" in refused("--matrix", str(two), "--matrix-model", "tiny")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--adam-lrs 0.1 0.2", "--adam-lrs"),
        ("--sgd-lrs 0.1 0.2 0", "--sgd-lrs"),
        ("--seeds 1", "--seeds"),
        ("--seeds 0 -1", "--seeds"),
        ("--steps 0", "--steps"),
        ("--ranks 8", "--ranks"),
        ("--rules 0.5 rora", "--rules must have different rules, got one rule twice: 0.5 rora"),
        ("--rules lore", "--rules"),
        ("--teacher-rank 0", "teacher_rank"),
        ("--teacher-rank 999", "--teacher-rank"),
        ("--ranks 2 8", "--teacher-rank"),
        ("--matrix-model tiny", "--matrix-model tiny has no effect without --matrix"),
        ("--matrix-loss answer", "--matrix-loss answer has no effect without --matrix"),
        ("--matrix . --ranks 8 16", "--ranks 8 16 has no effect with --matrix"),
        ("--matrix . --no-freeze-control", "--freeze-control False has no effect with --matrix"),
        ("--matrix . --noise 0.2", "--noise 0.2 has no effect with --matrix"),
        ("--matrix . --judge train", "--judge train has no effect with --matrix"),
        ("--matrix . --workers 2", "--workers 2 has no effect with --matrix"),
    ],
)
def test_bad_input(arguments, named, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        sim.main([*arguments.split(), "--out", str(tmp_path / "run")])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert named in error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_figures(finished, tmp_path, capsys):
    style.main(figure.draw, figure.Config(finished, out=tmp_path / "controlled"))
    folder = matrix(tmp_path / "matrix")
    sim.main(["--matrix", str(folder), "--out", str(tmp_path / "run")])
    capsys.readouterr()
    style.main(figure.draw, figure.Config(tmp_path / "run"))
    assert len(capsys.readouterr().out.split()) == 2
    assert (tmp_path / "run" / "lr_transfer.png").stat().st_size > 10000
