"""`python -m sims.transfer`: tables and snippet, a measured regime, the check on a model, bad input."""

import csv
import subprocess
import sys
from pathlib import Path

import checkpoint
import pytest

from rora_theory.transfer import Setting
from rora_theory.transfer import transfer as carry
from sims import regime, transfer
from sims.common import cli
from sims.common.run_folder import RunFolder

ROOT = Path(__file__).parents[2]


def snippet(text: str) -> dict:
    """The keyword arguments of the printed LoraConfig."""
    code = text[text.index("from peft") :]
    code = code[: code.index("\n)") + 2]
    space: dict = {}
    exec(code.replace("from peft import LoraConfig", "LoraConfig = dict"), space)
    return space["config"]


def test_as_a_user_runs_it() -> None:
    """The issue of most users: LoRA under AdamW, signal alone, keeps alpha; alpha = 2r is 16 times too strong."""
    arguments = "--from-rank 8 --to-rank 128 --alpha 16 --lr 3e-4 --rule lora --optimizer adamw"
    command = [sys.executable, "-m", "sims.transfer", *arguments.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    config = snippet(done.stdout)
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (128, 16, False)
    lines = {line.split("  ")[0].strip(): line.split() for line in done.stdout.splitlines() if line.strip()}
    assert lines["signal"][1:] == ["16", "0.0003", "1"]
    assert lines["cross-talk"][1:] == ["64", "0.0012", "0.25"]
    assert lines["alpha = 2r"][-4:] == ["2", "16", "x", "1.88e-05"] or lines["alpha = 2r"][-3] == "16"
    assert lines["alpha = 16, as it was, use_rslora"][-3:-1] == ["11.31", "x"]


@pytest.fixture
def run(tmp_path) -> Path:
    """A regime run's crossing ranks: two types of module, two layers."""
    folder = RunFolder.open("regime", {}, out=tmp_path / "run")
    apart = {"adam": 0, "sgd": 50, "heldout": 0, "train": 9}
    rows = [
        dict.fromkeys(regime.CROSSING_COLUMNS, 1.0)
        | {"module": f"model.layers.{layer}.{name}", "layer": layer, "optimizer": optimizer, "init": init}
        | {"split": split, "linear_term": 1.0 + 5 * layer + 2 * position + apart[optimizer] + apart[split]}
        for layer in (0, 1)
        for position, name in enumerate(("self_attn.q_proj", "mlp.down_proj"))
        for optimizer in ("sgd", "adam")
        for init in ("kaiming_uniform", "gaussian")
        for split in ("train", "heldout")
    ]  # fmt: skip
    folder.write_rows(regime.CROSSING_COLUMNS, rows, regime.CROSSINGS)
    return folder.path


@pytest.mark.parametrize(("optimizer", "split", "base"), [("adamw", "heldout", 1.0), ("sgd", "train", 60.0)])
def test_a_measured_regime(run, capsys, optimizer, split, base) -> None:
    """The terms of the asked optimizer and split, a pattern by type."""
    config = transfer.Config(regime=str(run), optimizer=optimizer, split=split)
    transfer.main(config)
    written = snippet(capsys.readouterr().out)
    terms = {
        f"model.layers.{layer}.{name}": base + 5 * layer + 2 * position
        for layer in (0, 1)
        for position, name in enumerate(("self_attn.q_proj", "mlp.down_proj"))
    }
    expected = carry(Setting(8, 16.0, 3e-4, "lora", optimizer), 128, terms)
    assert written["target_modules"] == ["q_proj", "down_proj"]
    assert written["lora_alpha"] == pytest.approx(expected.alpha, rel=1e-5)
    assert written["alpha_pattern"] == pytest.approx(expected.by_type(), rel=1e-5)


def test_check_on_a_model(tmp_path) -> None:
    """SGD in a tiny model: without change the step grows, and the alphas of a measured regime bring it back."""
    model, data = checkpoint.model(tmp_path / "model"), checkpoint.records(tmp_path / "train.json")
    small = {"items": 4, "heldout_items": 4, "rows": 0, "tokens": 10**6, "targets": ("q_proj", "down_proj")}
    regime.run(
        regime.Config(data=(str(data),), model=str(model), optimizers=("sgd",), out=tmp_path / "regime", **small)
    )
    config = transfer.Config(
        from_rank=2,
        to_rank=8,
        rule="0",
        optimizer="sgd",
        lr=1e-4,
        regime=str(tmp_path / "regime"),
        check=(str(model), str(data)),
        items=4,
        seeds=24,
        out=tmp_path / "out",
    )
    transfer.main(config)
    with (tmp_path / "out" / "summary.csv").open(newline="") as file:
        rows = {(row["plan"], row["quantity"]): row for row in csv.DictReader(file)}
    terms = transfer.measured(tmp_path / "regime", optimizer="sgd", init="kaiming_uniform", split="heldout")
    found = carry(Setting(2, 16.0, 1e-4, 0.0, "sgd"), 8, terms)
    grown = found.judge("", found.unchanged).step
    for plan, expected in (("neither changed", grown), ("one alpha", 1), ("one rate", 1), ("alpha by module", 1)):
        row = rows[plan, "modules"]
        error = float(row["standard_error"])
        assert error < 0.1 * expected
        assert abs(float(row["ratio"]) - expected) < 4.5 * error, plan  # 4 comparisons: false alarm 3e-5
    assert grown > 2  # so that the tuned step's return is no accident
    assert {row["plan"] for row in rows.values()} >= {"neither changed, use_rslora", "alpha by type"}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"rule": "lore"}, "--rule has 'lore'"),
        ({"to_rank": 0}, "rank is 0"),
        ({"lr": -1.0}, "learning_rate is -1.0"),
        ({"regime": "nowhere"}, "nowhere: has no crossing_ranks.csv; accepted are signal, cross-talk"),
        ({"check": ("smollm2-135m",)}, "check is smollm2-135m"),
        ({"check": ("smollm2-135m", "x.json"), "seeds": 1}, "seeds is 1"),
        ({"check": ("smollm2-135m", "x.json"), "seed": -1}, "seed is -1"),
        ({"rule": "400"}, "rule is 400.0: 16.0 / 8^400 is not a float above 0"),
    ],
)
def test_bad_input(capsys, changed, said) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: transfer.main(transfer.Config(**changed)))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_run_that_lacks_the_init(run) -> None:
    with pytest.raises(transfer.InputError, match="has no row of optimizer adam, init normal, split heldout"):
        transfer.measured(run, optimizer="adamw", init="normal", split="heldout")
