"""`python -m sims.sweep` on a tiny checkpoint: what a cell measures, and that interruptions repeat no cell."""

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support import commands, drawings

from figures import accuracy, accuracy_vs_rank, loss_curves, loss_vs_rate, style
from rora_theory.errors import InputError
from rora_theory.lab.adapters import load_peft
from rora_theory.lab.evaluate.scoring import Sample, Scoring
from rora_theory.lab.finetune import Metrics, Record, tokenize
from rora_theory.lab.finetune.held_out import record_losses
from rora_theory.lab.llama import load
from rora_theory.lab.sweep import results
from rora_theory.lab.sweep.cell_trainer import CellTrainer, EvaluatedCell
from rora_theory.lab.sweep.runs import Reading, ReadRun, read_runs
from rora_theory.runs import frames
from rora_theory.runs import lock as folder_lock
from rora_theory.runs.reading import CELLS, key_of, read_finished_cells
from rora_theory.stats.paired import mean_per_token
from sims import sweep as sim

PLAIN = (
    "--batch-size 4 --steps 3 --warmup 1 --widths 1 --held-out 6 --train-records 12 --dropout 0 "
    "--template clean --cutoff 400"
)


def sweep(model: Path, data: Path, out: Path, *more: str) -> commands.Ended:
    """Run a sweep over two tasks' questions."""
    files = [data / name / "train.json" for name in ("one", "two")]
    inputs = ["--model", model, "--data", *files]
    if "--no-accuracy" not in " ".join(map(str, more)):
        inputs += ["--accuracy --tasks boolq piqa --data-dir", data]
    return commands.run_command(sim.main, *inputs, PLAIN, "--out", out, *more)


def table(out: Path) -> list[dict[str, str]]:
    return commands.rows(out / "results.csv")


SAVED = "--save-adapters --seeds 0"


@pytest.fixture(scope="module")
def swept(model, data, tmp_path_factory) -> Path:
    """Return a matrix with every kind of cell, extended by a rank."""
    out = tmp_path_factory.mktemp("sweep") / "matrix"
    for methods in ("base prefix series lora dora rora quarter --ranks 4", "lora rora --ranks 2 4"):
        commands.output(sweep(model, data, out, "--methods", methods, SAVED))
    return out


@pytest.mark.slow
def test_cells(swept) -> None:
    rows = table(swept)
    assert [(row["method"], row["rank"]) for row in rows] == [
        ("base", ""), ("prefix", ""), ("series", ""), ("lora", "2"), ("lora", "4"), ("dora", "4"), ("rora", "2"),
        ("rora", "4"), ("quarter", "4"),
    ]  # fmt: skip
    assert {row["status"] for row in rows} == {"complete"}
    gammas = {(row["method"], row["rank"]): row["gamma"] for row in rows}
    assert (gammas["lora", "4"], gammas["dora", "4"], gammas["rora", "4"]) == ("16.0", "16.0", "32.0")
    assert float(gammas["quarter", "4"]) == pytest.approx(64 / 2**0.5, rel=1e-12)
    assert gammas["prefix", ""] == ""
    assert len({row["validation_loss"] for row in rows}) == len(rows), "no two cells trained the same"
    for row in rows:
        assert float(row["average"]) == pytest.approx((float(row["boolq"]) + float(row["piqa"])) / 2)
        assert float(row["validation_error"]) > 0


@pytest.mark.slow
def test_parameters_are_counted(swept) -> None:
    """The count is per layer of hidden 16, feed-forward 24, 2 query heads and 1 key/value head of 8."""
    shapes = [(16, 16), (8, 16), (8, 16), (24, 16), (16, 24)]  # q, k, v, up, down
    row = commands.selected(table(swept), method="lora", rank=2)
    assert int(row["trainable_parameters"]) == 2 * sum(2 * (a + b) for a, b in shapes)
    models = json.loads((swept / "manifest.json").read_text())["models"]
    [total] = [entry["parameters"] for entry in models.values()]
    assert total == 2 * 300 * 16 + 16 + 2 * (sum(a * b for a, b in shapes) + 16 * 16 + 24 * 16 + 2 * 16)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rora", "prefix"])
def test_the_loss_of_a_cell_is_that_of_its_adapter(swept, model, data, method) -> None:
    """The saved adapter is evaluated beside the weights, on the held-out records that the cell names."""
    [row, *_] = [row for row in table(swept) if row["method"] == method]
    (run,) = (run for run in read_runs(swept) if run.key == row["key"])
    written = commands.rows(swept / "records.csv")
    assert len(written) == 6
    original = load(str(model))
    records = [Record(**{"input": ""} | json.loads((data / r["source"]).read_text())[int(r["index"])]) for r in written]
    examples = tokenize(records, tokenizer=original.tokenizer, template="clean", cutoff=512, answer_only=True)
    adapter = load_peft(swept / "cells" / row["key"] / "adapter", original.config)
    actual = record_losses(original.params, original.config, examples, adapter=adapter)
    assert [item.tokens for item in actual] == [int(r["tokens"]) for r in written]
    # Merged and beside the weights: float32 sums in another order.
    np.testing.assert_allclose([item.loss for item in actual], run.read.readings[-1].losses, rtol=1e-4)
    mean = mean_per_token([item.loss for item in actual], [item.tokens for item in actual])
    summary = float(row["validation_loss"]), float(row["validation_error"])
    assert summary == pytest.approx((mean.value, mean.error), rel=1e-4)
    base = record_losses(original.params, original.config, examples)
    assert abs(base[0].loss / actual[0].loss - 1) > 1e-3, "the adapter changes the loss"


def test_options_reach_the_cell_trainer(model, data, tmp_path, monkeypatch) -> None:
    """This includes settings that are not in the identity of its cells."""
    received = {}

    def build_cell_trainer(plan, **more):
        received.update(more, dtype=plan.training.dtype, checkpoint_every=plan.training.checkpoint_every)
        received.update(trained_on=len(plan.records.train), tasks=list(plan.tasks), located=list(plan.located))
        received.update(scoring=plan.scoring)
        raise InputError("seen")

    monkeypatch.setattr(sim, "CellTrainer", build_cell_trainer)
    more = "--ranks 2 --eval-template clean --score-batch-size 3 --dtype bfloat16 --checkpoint-every 7"
    assert "seen" in commands.refusal(sweep(model, data, tmp_path / "m", more))
    assert received == {
        "scoring": Scoring("label", "clean"), "score_batch_size": 3, "checkpoint_every": 7, "dtype": "bfloat16",
        "trained_on": 12, "tasks": ["boolq", "piqa"], "located": [str(model)], "measures_parts": False,
    }  # fmt: skip


@pytest.mark.slow
def test_the_schedule_ends_at_the_last_step(swept) -> None:
    """In three of nine steps, with one of warm-up, the rate is 0, the cell's peak, and half of it."""
    for row in table(swept):
        if row["method"] != "base":
            events = map(json.loads, (swept / "cells" / row["key"] / "metrics.jsonl").read_text().splitlines())
            peak = float(row["learning_rate"])
            assert [event["learning_rate"] for event in events] == pytest.approx([0, peak, peak / 2], rel=1e-6), row


@pytest.mark.slow
def test_rules_of_a_rank_share_a_compiled_step(swept) -> None:
    """The exception is the second rank, which was added later, with `lora` the first of its own."""
    done = read_finished_cells(swept).values()
    compiled = {(item.cell["method"], item.cell["rank"]): item.value.get("compilations") for item in done}
    assert [compiled["lora", rank] for rank in (4, 2)] == [1, 1]
    assert [compiled[method, rank] for method, rank in (("rora", 4), ("rora", 2), ("quarter", 4))] == [0, 0, 0]


@pytest.mark.slow
@pytest.mark.usefixtures("pickled_work")
def test_an_interrupted_cell_resumes_from_its_checkpoint(swept, model, data, tmp_path, monkeypatch) -> None:
    """After Ctrl-C at the last of three steps, with a checkpoint at each, the result is that of an uninterrupted
    cell.
    """
    out, more = tmp_path / "m", f"--methods rora --ranks 4 --checkpoint-every 1 {SAVED}"
    steps, add = [], Metrics.add

    def interrupted(metrics, event) -> None:
        steps.append(event.step)
        if len(steps) == 3:
            raise KeyboardInterrupt
        add(metrics, event)

    monkeypatch.setattr(Metrics, "add", interrupted)
    assert sweep(model, data, out, more).status == 130
    assert not (out / "results.csv").exists()
    commands.output(sweep(model, data, out, more))
    assert steps == [1, 2, 3, 3, 3], "the first two steps were not repeated; the pause comes after the last"
    (key,) = read_finished_cells(out)
    assert key in read_finished_cells(swept), "checkpoints do not determine the result"

    def timeless(folder: Path, name: str) -> str:
        text = (folder / "cells" / key / name).read_text()
        return re.sub(r'"seconds": [^,}]*', "", text)

    names = {
        "answers.csv", "metrics.jsonl", "cell.json", "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors", "adapter/README.md",
    }  # fmt: skip
    assert set(read_finished_cells(out)[key].files) == {f"cells/{key}/{name}" for name in names}
    for name in names - {"adapter/adapter_model.safetensors"}:
        assert timeless(out, name) == timeless(swept, name), name
    value, original = (read_finished_cells(folder)[key].value for folder in (out, swept))
    assert {name for name in original if value[name] != original[name]} <= {
        "seconds", "train_seconds", "loss_seconds", "accuracy_seconds", "compilations"
    }  # fmt: skip


class Quick(CellTrainer):
    """CellTrainer that derives results from a cell's hash at once, so that runs can be compared to the byte."""

    def open(self, *_: str) -> list[str]:
        self.train_examples, self.model = [], SimpleNamespace(tokenizer=None)
        self.held_out = SimpleNamespace(input_lengths=np.array([10] * 6), target_counts=np.array([2] * 6))
        return []

    def tokenize(self, _: str) -> None:
        self.open()

    def evaluate_cell(self, cell, *_) -> EvaluatedCell:
        self.open()
        random = np.random.default_rng(int(key_of(cell), 16))
        best = 1e-3 if cell.method == "lora" else 3e-3
        loss = float(abs(np.log((cell.rate or 1.0) / best)) + 1e-3 * random.random())
        losses = [loss + item for item in random.random(6).tolist()]
        run = ReadRun([loss] * 3, [Reading(3, [10 * item for item in losses], losses)])
        result, samples = {"seconds": 1.0}, []
        if cell.evaluation is not None:
            level = {"task": "average", "accuracy": 0.5, "error": 0.1, "unparsed": 0.0, "chance": 0.5}
            result["levels"] = [level]
            right = random.random(4) < 0.5
            samples = [Sample("piqa", i, "solution1", "solution1", bool(item)) for i, item in enumerate(right)]
        return EvaluatedCell(run, result, None, samples)


@pytest.fixture
def quick(monkeypatch) -> None:
    """Run sweeps whose cells take no time."""
    monkeypatch.setattr(sim, "CellTrainer", Quick)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def fail(*_: object) -> None:
    raise RuntimeError("no such thing")


def stopped(number: int, what, *words: object) -> commands.Ended:
    """End a sweep by doing ``what`` instead of the work of the cell with that number, counted from 1."""
    begun, evaluate_cell = [], Quick.evaluate_cell

    def work(self, cell, folder) -> EvaluatedCell:
        begun.append(cell)
        if len(begun) == number:
            (folder / "checkpoints").mkdir()
            (folder / "answers.csv").write_text("half")
            what()
        return evaluate_cell(self, cell)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Quick, "evaluate_cell", work)
        return sweep(*words)


FOUR = "--methods base lora rora --ranks 2 --seeds 0 1"
FILES = ("results.csv", "differences.csv", CELLS)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("number", [1, 4])
@pytest.mark.parametrize("what", [interrupt, fail])
def test_a_resumed_sweep_writes_the_same_bytes(model, data, tmp_path, number, what) -> None:
    """It stops by Ctrl-C, or by a failure after which all other cells finish, in the base's cell or in another."""
    original, out = tmp_path / "whole", tmp_path / "stopped"
    assert "Lowest validation loss of 5 cells: " in commands.output(sweep(model, data, original, FOUR))
    assert len(frames.read_csv(original / "differences.csv")) == 3  # each less the base, and rora less lora
    ended = stopped(number, what, model, data, out, FOUR)
    done = len(read_finished_cells(out))
    assert (ended.status, done) == ((130, number - 1) if what is interrupt else (1, 4))
    if what is fail:
        assert len(frames.read_csv(out / "results.csv")) == 4
        assert len(frames.read_csv(out / "differences.csv")) == (1 if number == 1 else 3)
        assert "RuntimeError: no such thing" in ended.err
    resumed = commands.output(sweep(model, data, out, FOUR))
    assert resumed.count(": loss ") == 5 - done, "finished cells are not computed again"
    keys = read_finished_cells(original)
    for name in (*FILES, *(f"cells/{key}/{name}" for key in keys for name in ("answers.csv", "cell.json"))):
        assert (out / name).read_bytes() == (original / name).read_bytes(), name


@pytest.mark.usefixtures("quick")
def test_a_grown_sweep_runs_only_missing_cells(model, data, tmp_path) -> None:
    """It grows by ranks, seeds and rates; other tasks belong to another folder."""
    out = tmp_path / "m"
    for more, trained in (
        ("--ranks 2 --seeds 0", 1),
        ("--ranks 2 4 --seeds 0 1", 3),
        ("--ranks 4 --seeds 1 --lrs 3e-4 1e-3", 1),
    ):
        printed = commands.output(sweep(model, data, out, "--methods lora", more))
        assert printed.count(": loss ") == trained, more
    rows = table(out)
    assert [(row["rank"], row["learning_rate"], row["seed"]) for row in rows] == [
        ("2", "0.0003", "0"), ("2", "0.0003", "1"), ("4", "0.0003", "0"), ("4", "0.0003", "1"), ("4", "0.001", "1"),
    ]  # fmt: skip
    assert {row["protocol"] for row in rows} == {"label"}
    manifest = json.loads((out / "manifest.json").read_text())
    assert [session["status"] for session in manifest["sessions"]] == ["complete"] * 3
    assert manifest["sessions"][0]["command"] == manifest["command"]
    other = sweep(model, data, out, "--methods lora --ranks 2 --limit 1")
    assert "(evaluation there {" in commands.refusal(other)


@pytest.mark.usefixtures("quick")
def test_the_cells_are_listed_with_their_state(model, data, tmp_path) -> None:
    out = tmp_path / "m"

    def states(*more: str) -> list[int]:
        printed = sweep(model, data, out, FOUR, *more, "--list").out
        return [printed.count(f" {state}") for state in ("new", "done", "failed")]

    assert states() == [5, 0, 0]
    assert not out.exists()
    assert stopped(2, fail, model, data, out, FOUR).status == 1
    lock = folder_lock.acquire(out)
    assert states()[1:] == [4, 1], "a folder in use may be read"
    os.close(lock)


@pytest.mark.usefixtures("quick")
def test_models_of_one_folder_are_analysed_by_themselves(model, data, tmp_path) -> None:
    """Every table has a column for the model, and losses of two models are not compared."""
    copy, out = Path(shutil.copytree(model, tmp_path / "other")), tmp_path / "m"
    files = [data / name / "train.json" for name in ("one", "two")]
    words = "--methods base lora rora --ranks 2 --seeds 0 1 --lrs 1e-4 1e-3 1e-2"
    commands.output(
        commands.run_command(sim.main, "--model", model, copy, "--data", *files, PLAIN, words, "--out", out)
    )
    assert len(commands.rows(out / "records.csv")) == 2 * 6
    best = frames.read_csv(out / "best.csv")
    assert best.groupby("model").size().to_dict() == {str(model): 2, str(copy): 2}
    assert set(frames.read_csv(out / "comparisons.csv")["compared_with"]) == {"gamma r = 90.5097"}
    rows = table(out)
    assert [row["model"] for row in rows if row["method"] == "base"] == sorted((str(model), str(copy)))
    marked = [row["learning_rate"] for row in rows if row["method"] == "lora" and row["best_rate"] == "yes"]
    assert marked == ["0.001"] * 4, "of each model at each seed"


@pytest.mark.slow
def test_figures(swept) -> None:
    """They are drawn from the folder alone."""
    methods = ("LoRA", "RoRA", "DoRA", "prefix tuning", "series adapter", "no adapter")
    for figure, name, options, words in (
        (accuracy, "accuracy", {"rank": 4}, ("LoRA", "no adapter", "minus the base model", "minus LoRA", "average")),
        (accuracy_vs_rank, "accuracy_vs_rank", {}, ("nats", "average accuracy, label")),
        (loss_vs_rate, "loss_vs_rate", {"rank": 4}, (*methods, "r = 4, ")),
        (loss_curves, "loss_curves", {"rank": 4}, ()),
    ):
        drawn = drawings.words(figure, swept, **options)[name]
        assert [word for word in words if word not in drawn] == []
        assert "(above)" not in drawn
    assert "(above)" in drawings.words(loss_vs_rate, swept, rank=4, top=0.5)["loss_vs_rate"], "below every loss"


def test_figures_show_what_diverged_and_refuse_a_mixture(tmp_path, capsys) -> None:
    """In a run of three invented cells, the title states what is drawn, not what was tried."""
    columns = dict.fromkeys(results.COLUMNS, "")
    shared = {
        "status": "complete", "model": "runs/half/model", "method": "rora", "rule": "rora", "rank": "64",
        "alpha": "64.0", "gamma": "8.0", "learning_rate": "0.001", "best_rate": "yes", "validation_loss": "1.0",
        "validation_error": "0.1", "steps": "5", "seed": "0",
    }  # fmt: skip
    rows = [columns | shared, columns | shared | {"seed": "1", "status": "diverged", "validation_loss": ""}]
    rows += [columns | shared | {"learning_rate": "0.01", "best_rate": ""}]
    rows += [columns | shared | {"rank": "16", "gamma": "16.0", "status": "diverged", "best_rate": ""}]
    config = {"training": {"batch": 4, "steps": 5}, "data": {"held_out": 6, "train_records": 8}}
    manifest = {"experiment": "sweep", "config": config}

    def write(rows) -> None:
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        (tmp_path / "results.csv").write_text(frames.to_csv(frames.from_rows(rows, results.COLUMNS)))

    write(rows)
    drawn = drawings.words(accuracy_vs_rank, tmp_path, lr=1e-3)["accuracy_vs_rank"]
    assert "half, " in drawn
    assert "lr 0.001, 5 steps of 4, 6 held-out records" in drawn
    assert "some seeds diverged" in drawn
    assert "all seeds diverged" in drawn
    drawn = drawings.words(accuracy_vs_rank, tmp_path, tuned=True)["accuracy_vs_rank"]
    assert "best lr of a seed on these records" in drawn
    rows[2] |= {"rank": "64", "alpha": "128.0"}
    write(rows)
    with pytest.raises(SystemExit):
        style.main(accuracy_vs_rank.draw_accuracy_vs_rank, accuracy_vs_rank.AccuracyVsRankOptions(tmp_path))
    assert "rora r=64 has alpha 64, 128. Choose one with --alpha" in capsys.readouterr().err
