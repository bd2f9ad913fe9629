"""Best rates on the controlled problem and from a matrix of real runs; bad input; figures."""

import csv
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from figures import lr_transfer as figure
from figures import style
from rora_theory.sweep import trained_runs
from rora_theory.toy import dynamics
from sims import lr_transfer as sim
from sims.common.cells import CELLS

ARGUMENTS = (
    "--ranks 4 16 64 --optimizers adam --steps 8 --seeds 3 --p-in 32 --p-out 4 --samples 16 --held-out 16 --overlap 0.9"
)
SMALL = ARGUMENTS.split()
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


def test_rows(finished):
    rows = rows_of(finished / "results.csv")
    assert tuple(rows[0]) == sim.COLUMNS
    assert len(rows) == 2 * 3 * 3 * 3 * len(sim.Config().adam_rates)  # trained, rules, ranks, seeds
    for row in rows:
        assert float(row["scaling"]) == pytest.approx((4 / int(row["rank"])) ** float(row["kappa"]), rel=1e-5)


def test_frozen_adam_moves_as_the_signal_predicts(finished):
    """B alone under Adam: only gamma times the rate counts, so best rates of two rules differ by their gammas.

    To 5%: Adam's epsilon and the parabola's place on the grid.
    """
    bests = {(r["trained"], r["rule"], r["rank"]): r for r in rows_of(finished / "best.csv")}
    for rank in (16, 64):
        lora, rora = (bests["B", rule, str(rank)] for rule in ("lora", "rora"))
        assert not lora["edge"]
        assert not rora["edge"]
        ratio = float(lora["best_rate"]) / float(rora["best_rate"])
        assert ratio == pytest.approx((rank / 4) ** 0.5, rel=0.05)
    slopes = {(r["trained"], r["rule"]): r for r in rows_of(finished / "slopes.csv")}
    for rule, kappa in (("lora", 1.0), ("rora", 0.5)):
        # Overlap 0.9: the signal leads from rank 4 on, to about a tenth.
        assert abs(float(slopes["B", rule]["slope"]) - (kappa - 1)) < 0.2
        assert float(slopes["B", rule]["signal"]) == kappa - 1
    compared = json.loads((finished / "comparison.json").read_text())
    frozen = next(c for c in compared if c["trained"] == "B" and (c["first"], c["second"]) == ("lora", "rora"))
    assert frozen["rank"] == 64
    assert frozen["scaling_ratio"] == pytest.approx(4, rel=1e-4)
    # The grid's steps divide the gammas' ratio, so the two runs differ by Adam's epsilon alone.
    assert abs(frozen["difference"]) < 0.01 * frozen["second_loss"]


def test_a_finite_but_diverged_run_is_no_point(tmp_path):
    """SGD far beyond its stable rate: a loss of 1e9 times its start is finite and would bend every parabola."""
    rates = "0.01 0.1 1 10 100 1000"
    sim.main([*SMALL, "--optimizers", "sgd", "--sgd-rates", *rates.split(), "--out", str(tmp_path / "run")])
    rows = rows_of(tmp_path / "run" / "results.csv")
    losses = np.array([float(row["loss_train"]) for row in rows])
    small = max(float(row["loss_train"]) for row in rows if row["learning_rate"] == "0.01")
    assert np.isinf(losses).any()
    assert (losses[np.isfinite(losses)] < 2 * dynamics.DIVERGED * small).all()
    for row in rows:
        assert np.isfinite(float(row["loss_train"])) == np.isfinite(float(row["loss_held_out"]))


@pytest.mark.parametrize(
    ("by_seed", "over"), [((0.1, -0.1, 0.3), "seeds"), ((0.1, 0.1001, 0.0999), "held-out records")]
)
def test_the_larger_error_is_reported(by_seed, over):
    """Two methods on four records, three seeds: the error by hand over seeds and over records, and the larger one."""
    tokens = np.array([10.0, 20.0, 30.0, 40.0])
    noise = np.array([1.0, -2.0, 2.0, -1.0])
    cells = []
    for method, sign in (("lora", 0.0), ("rora", 1.0)):
        for seed, gap in enumerate(by_seed):
            for rate, more in ((1e-3, 0.5), (3e-3, 0.0), (1e-2, 0.5)):
                records = (2 + more + sign * gap) * tokens + sign * noise
                loss = records.sum() / tokens.sum()
                cells += [
                    trained_runs.Run(method, rank, 16 / rank, rate, seed, loss, records, tokens) for rank in (4, 8)
                ]
    (found,) = sim.compare_matrix(sim.matrix_curves(cells), cells)
    assert found.error_over == over
    assert found.difference == pytest.approx(-np.mean(by_seed), rel=1e-9)
    expected = {"seeds": np.std(by_seed, ddof=1) / 3**0.5, "held-out records": np.sqrt(np.sum(noise**2) * 4 / 3) / 100}
    assert found.standard_error == pytest.approx(expected[over], rel=1e-6)


def test_seeds_that_lack_a_rate_are_no_curve():
    whole = [trained_runs.Run("lora", r, 16 / r, rate, 0, 1.0 + rate, None, None) for r in (4, 8) for rate in RATES]
    part = [trained_runs.Run("lora", r, 16 / r, rate, 1, 9.0, None, None) for r in (4, 8) for rate in RATES[:4]]
    curves = sim.matrix_curves([*whole, *part])
    assert [curve.losses.tolist() for curve in curves] == [[[1.0 + rate for rate in RATES]]] * 2


def test_what_is_judged_is_what_was_asked():
    """Each loss in its own column and curve: at rates that move nothing, those of each seed's own problem."""
    rates = (1e-12, 2e-12, 3e-12)
    config = sim.Config(
        ranks=(4, 8), rules=("lora",), optimizers=("adam",), freeze_control=False, adam_rates=rates, steps=1, seeds=2,
        p_in=16, p_out=3, samples=5, held_out=7,
    )  # fmt: skip
    rows = [row for cell in sim.grid(config) for row in sim.cell_rows(config, cell)]
    for seed in range(2):
        key = jax.random.split(jax.random.fold_in(jax.random.key(0), seed))[0]
        drawn = dynamics.draw_problem(key, sim.problem(config))
        for name, target in (("train", drawn.target_train), ("held_out", drawn.target_held_out)):
            expected = np.sum(np.square(target)) / (2 * len(target))
            judged = sim.Config(**{**vars(config), "judge": name})
            for curve in sim.curves_of(judged, rows):
                assert curve.losses[seed] == pytest.approx([expected] * 3, rel=1e-4), (seed, name)


def test_b_alone_is_b_alone():
    """A cell of the control has the losses of training with A frozen; the other has not."""
    config = sim.Config(
        ranks=(4, 8), rules=("lora",), optimizers=("sgd",), sgd_rates=(0.1, 0.2, 0.3), steps=3, seeds=2, p_in=16,
        p_out=3, samples=5, held_out=7,
    )  # fmt: skip
    keys = [jax.random.split(jax.random.fold_in(jax.random.key(0), seed)) for seed in range(2)]
    drawn = jax.tree.map(lambda *a: np.stack(a), *(dynamics.draw_problem(a, sim.problem(config)) for a, _ in keys))
    adapters = jax.tree.map(
        lambda *a: np.stack(a), *(dynamics.draw_adapters(b, sim.problem(config), rank=4) for _, b in keys)
    )
    rates = np.float32(config.sgd_rates)
    losses = {
        frozen: np.asarray(
            dynamics.final_losses(adapters, drawn, 1.0, rates, optimizer="sgd", steps=3, frozen=frozen)[0]
        )
        for frozen in ("A", None)
    }
    assert np.abs(losses["A"] / losses[None] - 1).min() > 1e-3
    for trained, frozen in (("B", "A"), ("both", None)):
        rows = sim.cell_rows(config, sim.Cell("sgd", trained, 4, "lora"))
        # Five digits are written.
        np.testing.assert_allclose([row["loss_train"] for row in rows], losses[frozen].ravel(), rtol=5e-5)


def test_rates_of_an_optimizer():
    config = sim.Config(adam_rates=(3.0, 1.0, 2.0), sgd_rates=(30.0, 10.0, 20.0))
    found = {name: sim.rates_of(config, name).tolist() for name in dynamics.OPTIMIZERS}
    assert found == {"adam": [1, 2, 3], "adamw": [1, 2, 3], "sgd": [10, 20, 30], "momentum": [1, 2, 3]}


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
                            text = ["file,index,loss,tokens,answer_loss,answer_tokens"]
                            text += [
                                f"f,{i},{a},{b},{a},{b}"
                                for i, (a, b) in enumerate(zip(per_record, tokens, strict=True))
                            ]
                            (cell / "losses.csv").write_text("\n".join(text) + "\n")
                        rows.append(line)
    folder.mkdir(exist_ok=True)
    with (folder / "results.csv").open("w", newline="") as file:
        csv.writer(file).writerows([HEADER, *rows])
    return folder


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_matrix(tmp_path, seeds):
    """The parabolas that the losses were made from are found, over seeds or over records."""
    folder = matrix(tmp_path / "matrix", seeds=seeds)
    sim.main(["--matrix", str(folder), "--out", str(tmp_path / "run")])
    bests = {(r["rule"], r["rank"]): r for r in rows_of(tmp_path / "run" / "best.csv")}
    for rank in (8, 32, 128):
        # The curve's log is a parabola to second order in 0.02: 3% at these distances.
        assert float(bests["lora", str(rank)]["best_rate"]) == pytest.approx(1e-3, rel=0.03)
        assert float(bests["rora", str(rank)]["best_rate"]) == pytest.approx(1e-3 * (rank / 8) ** -0.5, rel=0.03)
    assert bests["lora", "8"]["error_over"] == ("seeds" if len(seeds) > 1 else "held-out records")
    slopes = {r["rule"]: float(r["slope"]) for r in rows_of(tmp_path / "run" / "slopes.csv")}
    assert slopes == pytest.approx({"lora": 0.0, "rora": -0.5}, abs=0.02)
    (compared,) = json.loads((tmp_path / "run" / "comparison.json").read_text())
    assert compared["rank"] == 128
    assert compared["ratio"] == pytest.approx(4, rel=0.05)
    assert compared["scaling_ratio"] == pytest.approx(128**0.5)


def test_matrix_finds_a_real_difference(tmp_path):
    """2% more at the best rate, the same records in every run: found although the records' own spread is 30%."""
    folder = matrix(tmp_path / "matrix", gap=0.02)
    sim.main(["--matrix", str(folder), "--out", str(tmp_path / "run")])
    (compared,) = json.loads((tmp_path / "run" / "comparison.json").read_text())
    assert "lora is better" in compared["verdict"]
    assert compared["standard_error"] < 0.005
    assert compared["error_over"] == "held-out records"
    alone = matrix(tmp_path / "plain", gap=0.02, records=False)
    sim.main(["--matrix", str(alone), "--out", str(tmp_path / "run2")])
    (compared,) = json.loads((tmp_path / "run2" / "comparison.json").read_text())
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
    found = {kind: trained_runs.read(folder, loss=kind) for kind in ("validation", "answer")}
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
    assert "no column learning_rate" in refused("--matrix", str(two))
    (two / "results.csv").write_text(
        text.replace("tiny-lora-8-0.001-0,done,tiny,lora,lora,8,", "x,done,tiny,lora,lora,8.5,")
    )
    assert "damaged" in refused("--matrix", str(two), "--matrix-model", "tiny")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--adam-rates 0.1 0.2", "--adam-rates"),
        ("--sgd-rates 0.1 0.2 0", "--sgd-rates"),
        ("--seeds 1", "--seeds"),
        ("--steps 0", "--steps"),
        ("--ranks 8", "--ranks"),
        ("--rules 0.5 rora", "--rules"),
        ("--teacher-rank 0", "teacher_rank"),
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


def test_figures(finished, tmp_path, capsys):
    style.main(figure.draw, figure.Config(finished, out=tmp_path / "controlled"))
    folder = matrix(tmp_path / "matrix")
    sim.main(["--matrix", str(folder), "--out", str(tmp_path / "run")])
    capsys.readouterr()
    style.main(figure.draw, figure.Config(tmp_path / "run"))
    assert len(capsys.readouterr().out.split()) == 2
    assert (tmp_path / "run" / "lr_transfer.png").stat().st_size > 10000
