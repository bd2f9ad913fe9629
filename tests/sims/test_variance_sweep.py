"""The sweep as a user runs it: rows, verdicts, interruption, real layers, bad input, figures."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rora_theory import scaling_factor
from rora_theory.theory import laws
from sims.variance_sweep import COLUMNS

ROOT = Path(__file__).parents[2]
SMALL = [
    "--ranks",
    "1",
    "4",
    "16",
    "--p-in",
    "64",
    "--p-out",
    "8",
    "--overlaps",
    "0",
    "0.5",
    "--relative-error",
    "0.02",
]


def run(*arguments: str, module: str = "sims.variance_sweep") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sweep") / "run"
    done = run(*SMALL, "--out", str(out), "--devices", "2")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # quiet where there is no terminal
    assert "Verdicts on the paper's equations" in done.stdout
    assert "E[w_i^2]" in done.stdout
    return out


def test_results(finished: Path) -> None:
    """Every cell has its rows; estimates sit in their errors around the law, and the law and Eq. 9 are right."""
    rows = rows_of(finished / "results.csv")
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == 2 * 3 * 2 * 3 * 4  # optimizers x rules x overlaps x ranks x quantities
    scores = []
    for row in rows:
        rank, alpha = int(row["rank"]), float(row["alpha"])
        gamma = alpha / rank ** float(row["kappa"])
        assert float(row["scaling"]) == pytest.approx(gamma, rel=1e-12)
        law = laws.random_input_moments(
            rank=rank,
            p_in=64,
            scaling=gamma,
            overlap=float(row["overlap"]),
            learning_rate=1e-4,
            optimizer=row["optimizer"],
        )
        exact = {
            "mean": law.mean[0],
            "second_moment": law.second_moment[0],
            "variance": law.variance[0],
            "norm": np.sqrt(8 * law.second_moment[0]),
        }[row["quantity"]]
        assert float(row["exact"]) == pytest.approx(exact, rel=1e-12)
        scores.append((float(row["estimate"]) - exact) / float(row["standard_error"]))
        if row["optimizer"] == "sgd" and row["quantity"] == "variance":
            assert float(row["paper"]) == pytest.approx(1e-8 * gamma**4 * rank**2 * 64, rel=1e-12)
        if row["quantity"] == "second_moment":
            assert float(row["standard_error"]) <= 0.02 * float(row["estimate"])
    assert max(map(abs, scores)) < 5.4  # false alarm 1e-5 over the 144 rows (fewer are independent)
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["status"] == "complete"
    assert manifest["config"]["ranks"] == [1, 4, 16]
    assert {"packages", "device", "seed", "start", "end", "units"} <= set(manifest)
    assert len(json.loads((finished / "verdicts.json").read_text())) == 17


def test_direct_check(finished: Path) -> None:
    rows = rows_of(finished / "direct_check.csv")
    assert {row["sampler"] for row in rows} == {"direct"}
    assert {row["rank"] for row in rows} == {"1"}
    scores = [
        (float(r["estimate"]) - float(r["exact"])) / float(r["standard_error"]) for r in rows if r["quantity"] == "mean"
    ]
    assert max(map(abs, scores)) < 5


def test_killed_and_started_again(finished: Path, tmp_path: Path) -> None:
    """SIGKILL at several moments, then on: results.csv is byte-identical, on another number of devices too."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "sims.variance_sweep", *SMALL, "--out", str(out), "--devices", "1"]
    for cells in (1, 5):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        results = out / "results.csv"
        until = time.monotonic() + 120
        while time.monotonic() < until and process.poll() is None:
            if results.exists() and len(results.read_text().splitlines()) > 12 * cells:
                break
            time.sleep(0.005)
        assert process.poll() is None, "the run ended before it could be killed"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert json.loads((out / "manifest.json").read_text())["status"] == "running"
    done = run(*SMALL, "--out", str(out), "--devices", "1")
    assert done.returncode == 0, done.stderr
    for name in ("results.csv", "direct_check.csv", "verdicts.json"):
        assert (out / name).read_bytes() == (finished / name).read_bytes()
    assert not (out / "partial.json").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ranks", "0"], "rank is 0"),
        (["--ranks", "2.5"], "2.5"),
        (["--ranks", "4", "4"], "--ranks repeats a value"),
        (["--alpha", "-1"], "--alpha is -1.0"),
        (["--alpha", "nan"], "--alpha is nan"),
        (["--alpha", "1e300"], "--alpha 1e+300 and --learning-rate 0.0001 give gamma 1.0e+300"),
        (["--rules", "-40"], "accepted are 1e-18 to 1e18"),
        (["--draws", "2" + "0" * 9], "--draws is 2000000000; accepted are at most 1,000,000,000"),
        (["--relative-error", "1e-9"], "--relative-error is 1e-09; accepted is 5e-05 or more"),
        (["--overlaps", "1.5"], "overlap is 1.5"),
        (["--rules", "loar"], "--rules has 'loar'"),
        (["--rules", "rora", "0.5"], "one rule twice"),
        (["--inits", "xavier"], "xavier"),
        (["--sampler", "reduced", "--inits", "rademacher"], "--sampler reduced"),
        (["--p-in", "0"], "--p-in is 0"),
        (["--devices", "0"], "--devices is 0"),
        (["--layer-data", "nowhere.npz"], "nowhere.npz: no such file"),
        (["--out", "/proc/none"], "/proc/none"),
    ],
)
def test_bad_arguments(arguments: list[str], said: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert said in done.stderr
    if not ({"2.5", "xavier"} & set(arguments)):  # these two are the parser's own, framed message
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith("error: ")


def test_run_folders_are_not_overwritten(finished: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    done = run(*SMALL, "--alpha", "8", "--out", str(finished))
    assert done.returncode == 2
    assert "other arguments (alpha there 16.0, here 8.0)" in done.stderr
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before

    stray = tmp_path / "full"
    stray.mkdir()
    (stray / "thesis.txt").write_text("mine")
    assert run(*SMALL, "--out", str(stray)).returncode == 2
    assert [path.name for path in stray.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text[:-20], "was changed since"),
        (lambda text: text.replace("lora", "lore", 1), "was changed since"),
        (lambda text: "\n".join(text.splitlines()[:6]) + "\n", "was changed since"),
    ],
)
def test_damaged_results(finished: Path, tmp_path: Path, damage: object, said: str) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "manifest.json").write_bytes((finished / "manifest.json").read_bytes())
    text = damage((finished / "results.csv").read_text())  # type: ignore[operator]
    (out / "results.csv").write_text(text)
    done = run(*SMALL, "--out", str(out))
    assert done.returncode == 2
    assert said in done.stderr
    assert (out / "results.csv").read_text() == text


@pytest.fixture
def layers(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    arrays = {}
    for name in ("model.layers.0.mlp.down_proj", "model.layers.10.self_attn.q_proj"):
        x = rng.standard_normal((12, 24)) + 0.5
        arrays |= {f"{name}/grad": rng.standard_normal((6, 12)) @ x, f"{name}/x_train": x}
        arrays |= {f"{name}/x_heldout": rng.standard_normal((9, 24)) + 0.5}
    path = tmp_path / "layers.npz"
    np.savez(path, **arrays)
    return path


def test_layers_against_the_law(layers: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = run("--layer-data", str(layers), "--ranks", "1", "8", "32", "--out", str(out), "--relative-error", "0.02")
    assert done.returncode == 0, done.stderr
    rows = rows_of(out / "results.csv")
    assert len(rows) == 2 * 3 * 2 * 2 * 3  # layers x ranks x optimizers x splits x rules
    scores = [(float(row["estimate"]) - float(row["exact"])) / float(row["standard_error"]) for row in rows]
    assert max(map(abs, scores)) < 5
    assert {row["init"] for row in rows} == {"kaiming_uniform"}
    with np.load(layers) as data:
        law = laws.first_step_moments(
            data["model.layers.0.mlp.down_proj/grad"],
            data["model.layers.0.mlp.down_proj/x_heldout"],
            rank=8,
            scaling=scaling_factor("rora", alpha=16, rank=8),
            learning_rate=1e-4,
            init="kaiming_uniform",
        )
    row = next(
        r
        for r in rows
        if (r["layer"], r["rank"], r["rule"], r["optimizer"], r["split"])
        == ("model.layers.0.mlp.down_proj", "8", "rora", "sgd", "heldout")
    )
    assert float(row["exact"]) == pytest.approx(np.sqrt(np.mean(law.second_moment)), rel=1e-6)
    crossings = rows_of(out / "crossing_ranks.csv")
    assert len(crossings) == 8
    assert all(float(row["crossing_rank"]) >= 1 for row in crossings)

    again = run("--layer-data", str(layers), "--ranks", "1", "8", "32", "--out", str(out), "--relative-error", "0.02")
    assert again.returncode == 0
    drawn = run(str(out), module="figures.layers_vs_rank")
    assert drawn.returncode == 0, drawn.stderr
    assert (out / "layers_vs_rank.svg").stat().st_size > 1000


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("grad", np.ones((6, 23)), "shape"),
        ("x_train", np.full((3, 24), np.nan), "not a finite float32"),
        ("x_heldout", None, "is missing"),
    ],
)
def test_bad_layer_data(layers: Path, tmp_path: Path, key: str, value: np.ndarray | None, said: str) -> None:
    with np.load(layers) as data:
        arrays = {name: data[name] for name in data.files}
    arrays[f"model.layers.10.self_attn.q_proj/{key}"] = value
    path = tmp_path / "bad.npz"
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    done = run("--layer-data", str(path), "--out", str(tmp_path / "run"))
    assert done.returncode == 2
    assert said in done.stderr
    assert "bad.npz" in done.stderr


def test_an_asked_init_is_taken_with_layers(layers: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["--layer-data", str(layers), "--ranks", "4", "--inits", "normal", "gaussian", "--draws", "64"]
    assert run(*arguments, "--out", str(out)).returncode == 0
    assert {row["init"] for row in rows_of(out / "results.csv")} == {"normal", "gaussian"}


def test_real_layers(layer_data: Path) -> None:
    """Real layers of a real model: their regime, from the law, with the figures the README quotes."""
    from rora_theory.measure.layer_data import read

    found = read(layer_data)
    assert len(found) == 9
    for layer in found:
        for x in layer.inputs.values():
            sgd, adam = (
                float(np.median(laws.crossing_rank(layer.grad, x, optimizer=name))) for name in laws.OPTIMIZERS
            )
            assert 1 <= sgd < 64
            assert sgd < adam < 64


def test_norm_figure(finished: Path, tmp_path: Path) -> None:
    for _ in range(2):
        drawn = run(str(finished), "--out", str(tmp_path / "figure"), module="figures.norm_vs_rank")
        assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "figure" / "norm_vs_rank.png").stat().st_size > 10_000
    svg = (tmp_path / "figure" / "norm_vs_rank.svg").read_text()
    assert all(word in svg for word in ("SGD, overlap 0", "exact law", "paper, Eq. 11"))


def test_exponent_map(tmp_path: Path) -> None:
    drawn = run("--out", str(tmp_path), "--p-in", "256", module="figures.exponent_map")
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "exponent_map.png").exists()
    assert (tmp_path / "exponent_map.svg").exists()


def test_a_figure_of_nothing(tmp_path: Path) -> None:
    drawn = run(str(tmp_path), module="figures.norm_vs_rank")
    assert drawn.returncode == 2
    assert "manifest.json: no such file; accepted is the file of a run folder" in drawn.stderr
