"""`python -m sims.rank_sweep`: what a cell measures, on a tiny checkpoint; each cell once, whatever stops the run."""

import csv
import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support import checkpoint

from figures import accuracy, accuracy_vs_rank, benchmark_tables, loss_curves, loss_vs_rate, scaling_diagram, style
from rora_theory.adapters import load_peft
from rora_theory.errors import InputError
from rora_theory.evaluate.scoring import Sample, Scoring
from rora_theory.finetune import Metrics, Record, tokenize
from rora_theory.finetune.held_out import RecordLoss, record_losses
from rora_theory.io import frames
from rora_theory.llama import load
from rora_theory.runs import lock as folder_lock
from rora_theory.runs import seals
from rora_theory.runs.reading import CELLS, key_of, read_finished_cells
from rora_theory.stats.paired import mean_per_token
from rora_theory.sweep import results, trained_runs
from rora_theory.sweep.workbench import CellOutcome, Workbench
from sims import rank_sweep

PLAIN = (
    "--batch-size 4 --steps 3 --warmup 1 --widths 1 --held-out 6 --train-records 12 --dropout 0 "
    "--template clean --cutoff 400"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return checkpoint.model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two training files, and four questions of two tasks."""
    folder = checkpoint.two_files(tmp_path_factory.mktemp("data"))
    for task, labels in (("boolq", ("true", "false")), ("piqa", ("solution1", "solution2"))):
        checkpoint.questions(folder, task, labels)
    return folder


def command(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    files = [str(data / name / "train.json") for name in ("one", "two")]
    scored = ["--tasks", "boolq", "piqa", "--data-dir", str(data)]
    return ["--model", str(model), "--data", *files, "--out", str(out), *PLAIN.split(), *scored, *more]


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


SAVED = ("--save-adapters", "--seeds", "0")


@pytest.fixture(scope="module")
def swept(model, data, tmp_path_factory) -> Path:
    """A matrix of every kind of cell, which grew by a rank."""
    out = tmp_path_factory.mktemp("sweep") / "matrix"
    methods = ["base", "prefix", "series", "lora", "dora", "rora", "quarter"]
    rank_sweep.main(command(model, data, out, "--methods", *methods, "--ranks", "4", *SAVED))
    rank_sweep.main(command(model, data, out, "--methods", "lora", "rora", "--ranks", "2", "4", *SAVED))
    return out


@pytest.mark.slow
def test_cells(swept) -> None:
    rows = rows_of(swept)
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
    """Per layer of hidden 16, feed-forward 24, 2 query heads and 1 key/value head of 8."""
    shapes = [(16, 16), (8, 16), (8, 16), (24, 16), (16, 24)]  # q, k, v, up, down
    expected = {("lora", "2"): 2 * sum(2 * (a + b) for a, b in shapes)}
    expected["dora", "4"] = 2 * expected["lora", "2"] + 2 * sum(a for a, _ in shapes)
    expected["prefix", ""] = 2 * 10 * 2 * 8
    expected["series", ""] = 2 * 2 * 256 * 2 * 16  # before gate and up: of the model's width
    found = {(row["method"], row["rank"]): int(row["trainable_parameters"] or 0) for row in rows_of(swept)}
    assert {key: found[key] for key in expected} == expected
    models = json.loads((swept / "manifest.json").read_text())["models"]
    [total] = [entry["parameters"] for entry in models.values()]
    assert total == 2 * 300 * 16 + 16 + 2 * (sum(a * b for a, b in shapes) + 16 * 16 + 24 * 16 + 2 * 16)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rora", "prefix"])
def test_a_cell_s_loss_is_its_adapter_s(swept, model, data, method) -> None:
    """The saved adapter beside the weights, on the held-out records that the cell names."""
    [row, *_] = [row for row in rows_of(swept) if row["method"] == method]
    folder = swept / "cells" / row["key"]
    with (folder / "losses.csv").open(newline="") as file:
        kept = list(csv.DictReader(file))
    assert len(kept) == 6
    whole = load(str(model))
    records = [Record(**{"input": ""} | json.loads((data / r["file"]).read_text())[int(r["index"])]) for r in kept]
    examples = tokenize(records, tokenizer=whole.tokenizer, template="clean", cutoff=512, answer_only=True)
    adapter = load_peft(folder / "adapter", whole.config, whole.params)
    found = record_losses(whole.params, whole.config, examples, adapter=adapter)
    # Merged and beside the weights: float32 sums in another order.
    np.testing.assert_allclose([one.loss for one in found], [float(r["loss"]) for r in kept], rtol=1e-4)
    mean = mean_per_token([one.loss for one in found], [one.tokens for one in found])
    written = float(row["validation_loss"]), float(row["validation_error"])
    assert written == pytest.approx((mean.value, mean.error), rel=1e-4)
    base = record_losses(whole.params, whole.config, examples)
    assert abs(base[0].loss / found[0].loss - 1) > 1e-3, "the adapter counts"


def test_what_a_command_sets_reaches_the_workbench(model, data, tmp_path, monkeypatch) -> None:
    """What the identity of its cells does not hold too."""
    given = {}

    def workbench(shared, records, tasks, located, **more):
        given.update(
            more,
            dtype=shared.dtype,
            checkpoint_every=shared.checkpoint_every,
            trained_on=len(records.train),
            tasks=list(tasks),
            located=list(located),
        )
        raise InputError("seen")

    monkeypatch.setattr(rank_sweep, "Workbench", workbench)
    more = ["--ranks", "2", "--eval-template", "clean", "--score-batch-size", "3", "--dtype", "bfloat16"]
    more += ["--checkpoint-every", "7"]
    with pytest.raises(SystemExit):
        rank_sweep.main(command(model, data, tmp_path / "m", *more))
    assert given == {
        "scoring": Scoring("label", "clean"), "score_batch_size": 3, "checkpoint_every": 7, "dtype": "bfloat16",
        "trained_on": 12, "tasks": ["boolq", "piqa"], "located": [str(model)],
    }  # fmt: skip


@pytest.mark.slow
def test_the_schedule_ends_at_the_last_step(swept) -> None:
    """Three steps of nine, one of them warm-up: the rate is 0, the peak, half of it, and the peak is the cell's own."""
    for row in rows_of(swept):
        if row["method"] != "base":
            events = map(json.loads, (swept / "cells" / row["key"] / "metrics.jsonl").read_text().splitlines())
            peak = float(row["learning_rate"])
            assert [event["learning_rate"] for event in events] == pytest.approx([0, peak, peak / 2], rel=1e-6), row


@pytest.mark.slow
def test_rules_of_a_rank_share_a_compiled_step(swept) -> None:
    """But for the second rank, which grew later, with `lora` the first of its own."""
    done = read_finished_cells(swept).values()
    compiled = {(one.cell["method"], one.cell["rank"]): one.value.get("compilations") for one in done}
    assert [compiled["lora", rank] for rank in (4, 2)] == [1, 1]
    assert [compiled[method, rank] for method, rank in (("rora", 4), ("rora", 2), ("quarter", 4))] == [0, 0, 0]


@pytest.mark.slow
@pytest.mark.usefixtures("carried")
def test_a_cell_that_was_stopped_goes_on_from_its_checkpoint(swept, model, data, tmp_path, monkeypatch) -> None:
    """Ctrl-C at the last of three steps, behind a checkpoint a step: to the result of one that was not stopped."""
    out, more = tmp_path / "m", ("--methods", "rora", "--ranks", "4", "--checkpoint-every", "1", *SAVED)
    steps, add = [], Metrics.add

    def interrupted(metrics, event) -> None:
        steps.append(event.step)
        if len(steps) == 3:
            raise KeyboardInterrupt
        add(metrics, event)

    monkeypatch.setattr(Metrics, "add", interrupted)
    with pytest.raises(SystemExit) as stop:
        rank_sweep.main(command(model, data, out, *more))
    assert stop.value.code == 130
    assert not (out / "results.csv").exists()
    rank_sweep.main(command(model, data, out, *more))
    assert steps == [1, 2, 3, 3], "the first two were not taken again"
    (key,) = read_finished_cells(out)
    assert key in read_finished_cells(swept), "checkpoints do not determine the result"

    def of(folder: Path, name: str) -> str:
        text = (folder / "cells" / key / name).read_text()
        return re.sub(r'"(seconds|digest)": [^,}]*', "", text)

    names = {
        "losses.csv", "answers.csv", "metrics.jsonl", "cell.json", "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors", "adapter/README.md",
    }  # fmt: skip
    assert set(read_finished_cells(out)[key].files) == {f"cells/{key}/{name}" for name in names}
    for name in names - {"adapter/adapter_model.safetensors"}:
        assert of(out, name) == of(swept, name), name
    value, whole = (read_finished_cells(folder)[key].value for folder in (out, swept))
    assert {name for name in whole if value[name] != whole[name]} <= {
        "seconds", "train_seconds", "loss_seconds", "accuracy_seconds", "compilations"
    }  # fmt: skip


class Quick(Workbench):
    """Measures at once what is made of the cell's own hash, so that runs can be compared to the byte."""

    def open(self, _: str) -> list[str]:
        self.train_examples, self.model = None, SimpleNamespace(tokenizer=None)
        return []

    def measure(self, cell, *_) -> CellOutcome:
        random = np.random.default_rng(int(key_of(cell), 16))
        rate = cell.learning_rate or 1.0
        loss = float(abs(np.log(rate / (1e-3 if cell.method == "lora" else 3e-3))) + 1e-3 * random.random())
        result = {"status": "complete", "validation_loss": loss, "validation_error": 0.1, "answer_loss": loss}
        result |= {"answer_error": 0.1, "seconds": 1.0, "steps": 3}
        losses = [RecordLoss(10, loss + one, 2, loss) for one in random.random(len(self.records.held_out)).tolist()]
        samples = []
        if cell.evaluation is not None:
            level = {"task": "average", "accuracy": 0.5, "error": 0.1, "unparsed": 0.0, "chance": 0.5}
            result["levels"] = [level]
            right = random.random(4) < 0.5
            samples = [Sample("piqa", i, "solution1", "solution1", bool(one)) for i, one in enumerate(right)]
        return CellOutcome(result, None, losses, samples)


@pytest.fixture
def quick(monkeypatch) -> type[Quick]:
    """Sweeps whose cells take no time."""
    quicken(monkeypatch)
    return Quick


def quicken(monkeypatch) -> None:
    monkeypatch.setattr(rank_sweep, "Workbench", Quick)
    monkeypatch.setattr(rank_sweep.prompts, "save_prompts", lambda *_, **__: None)  # which a tokenizer is needed for


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def fail(*_: object) -> None:
    raise RuntimeError("no such thing")


def stopped(number: int, what, words: list[str]) -> int:
    """The exit status of a sweep in whose cell of that number, from 1, ``what`` happens instead of its work."""
    begun, measure = [], Quick.measure

    def work(self, cell, folder) -> CellOutcome:
        begun.append(cell)
        if len(begun) == number:
            (folder / "checkpoints").mkdir()
            (folder / "losses.csv").write_text("half")
            what()
        return measure(self, cell)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Quick, "measure", work)
        with pytest.raises(SystemExit) as stop:
            rank_sweep.main(words)
    return stop.value.code


FOUR = ("--methods", "base", "lora", "rora", "--ranks", "2", "--seeds", "0", "1")
FILES = ("results.csv", "differences.csv", CELLS)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_sweep_that_was_stopped_leaves_the_same_bytes(model, data, tmp_path, capsys) -> None:
    """In every one of its five cells, by Ctrl-C or by a failure, after which all other cells are done."""
    whole = tmp_path / "whole"
    rank_sweep.main(command(model, data, whole, *FOUR))
    assert "Lowest validation loss of 5 cells: " in capsys.readouterr().out
    assert len(frames.read_csv(whole / "differences.csv")) == 3  # each less the base, and rora less lora
    keys = list(read_finished_cells(whole))
    for number in range(1, 6):
        for what, status, done in ((interrupt, 130, number - 1), (fail, 1, 4)):
            out = tmp_path / f"{what.__name__} {number}"
            assert stopped(number, what, command(model, data, out, *FOUR)) == status
            assert len(read_finished_cells(out)) == done
            said = capsys.readouterr()
            if what is fail:
                assert len(frames.read_csv(out / "results.csv")) == 4
                assert len(frames.read_csv(out / "differences.csv")) == (1 if number == 1 else 3)
                assert "failed (RuntimeError: no such thing); its traceback is in " in said.err
                assert said.err.splitlines()[-1].startswith("error: 1 of 5 cells failed, the first ")
            rank_sweep.main(command(model, data, out, *FOUR))
            assert capsys.readouterr().out.count(": loss ") == 5 - done, "what is done is not done again"
            for name in (*FILES, *(f"cells/{key}/{name}" for key in keys for name in ("losses.csv", "cell.json"))):
                assert (out / name).read_bytes() == (whole / name).read_bytes(), (out.name, name)


@pytest.mark.usefixtures("quick")
def test_a_sweep_grows_by_what_it_lacks(model, data, tmp_path, capsys) -> None:
    """Ranks, seeds and rates; tasks that were not scored at first, and never again without them."""
    out = tmp_path / "m"

    def run(*more: str) -> int:
        rank_sweep.main(command(model, data, out, "--methods", "lora", *more))
        return capsys.readouterr().out.count(": loss ")

    assert run("--ranks", "2", "--seeds", "0", "--no-accuracy") == 1
    assert run("--ranks", "2", "--seeds", "0") == 1, "scored now"
    assert run("--ranks", "2", "--seeds", "0", "--no-accuracy") == 0
    assert run("--ranks", "2", "4", "--seeds", "0", "1") == 3
    assert run("--ranks", "4", "--seeds", "1", "--lrs", "3e-4", "1e-3") == 1
    rows = rows_of(out)
    assert [(row["rank"], row["learning_rate"], row["seed"]) for row in rows] == [
        ("2", "0.0003", "0"), ("2", "0.0003", "1"), ("4", "0.0003", "0"), ("4", "0.0003", "1"), ("4", "0.001", "1"),
    ]  # fmt: skip
    assert {row["protocol"] for row in rows} == {"label"}
    manifest = json.loads((out / "manifest.json").read_text())
    assert [session["status"] for session in manifest["sessions"]] == ["complete"] * 5
    assert manifest["sessions"][0]["command"] == manifest["command"]
    with pytest.raises(SystemExit):
        run("--ranks", "2", "--limit", "1")
    assert "(evaluation there {" in capsys.readouterr().err


@pytest.mark.usefixtures("quick")
def test_a_folder_has_one_driver(model, data, tmp_path, capsys) -> None:
    """The second is told who the first is; nothing of the first's is touched."""
    out = tmp_path / "m"
    rank_sweep.main(command(model, data, out, *FOUR))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != folder_lock.LOCK}
    lock = folder_lock.acquire(out)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        rank_sweep.main(command(model, data, out, *FOUR, "--ranks", "4"))
    said = capsys.readouterr().err
    assert (stop.value.code, said.count("\n")) == (2, 1)
    assert re.search(r"is in use by process \d+ on \S+ since \d{4}-", said)
    rank_sweep.main(command(model, data, out, *FOUR, "--list"))
    assert capsys.readouterr().out.count(" done") == 5, "it may be looked at"
    os.close(lock)
    assert before == {
        path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != folder_lock.LOCK
    }


@pytest.mark.usefixtures("quick")
def test_the_cells_are_listed_with_their_state(model, data, tmp_path, capsys) -> None:
    out = tmp_path / "m"
    rank_sweep.main(command(model, data, out, *FOUR, "--list"))
    assert capsys.readouterr().out.count(" new") == 5
    assert not out.exists()
    assert stopped(2, fail, command(model, data, out, *FOUR)) == 1
    capsys.readouterr()
    rank_sweep.main(command(model, data, out, *FOUR, "--no-accuracy", "--list"))
    shown = capsys.readouterr().out
    assert (shown.count(" done"), shown.count(" failed")) == (4, 0), "unscored, they are the scored ones"
    rank_sweep.main(command(model, data, out, *FOUR, "--list"))
    shown = capsys.readouterr().out
    assert (shown.count(" done"), shown.count(" failed")) == (4, 1)


@pytest.mark.slow
def test_a_folder_holds_one_way_of_training_and_one_model(swept, model, data, capsys, tmp_path, monkeypatch) -> None:
    """Other settings, or another model at the same place, are refused."""
    for change in (["--warmup", "2"], ["--dropout", "0.1"], ["--cutoff", "300"]):
        with pytest.raises(SystemExit):
            rank_sweep.main([*command(model, data, swept, "--ranks", "2"), *change])
        assert "other arguments (settings there" in capsys.readouterr().err
    other, out = tmp_path / "model", tmp_path / "m"
    shutil.copytree(model, other)
    quicken(monkeypatch)
    rank_sweep.main(command(other, data, out, "--methods", "base"))
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    with pytest.raises(SystemExit):
        rank_sweep.main(command(other, data, out, "--methods", "base"))
    assert "other arguments (model_sha256 there" in capsys.readouterr().err


@pytest.mark.slow
def test_a_file_changed_by_hand_is_drawn_by_no_figure(swept, tmp_path, capsys) -> None:
    """The table's, and a cell's own."""
    out = tmp_path / "m"
    shutil.copytree(swept, out)
    [row, *_] = [row for row in rows_of(out) if row["method"] == "rora"]
    for path, draw in (
        (out / "results.csv", lambda: accuracy_vs_rank.draw(accuracy_vs_rank.Config(out))),
        (out / "results.csv", lambda: trained_runs.read_runs(out)),
        (out / "cells" / row["key"] / "metrics.jsonl", lambda: loss_curves.draw(loss_curves.Config((out,), rank=2))),
        (out / "cells" / row["key"] / "losses.csv", lambda: trained_runs.read_runs(out)),
    ):
        whole = path.read_text()
        path.write_text(whole.replace("1", "2", 1))
        with pytest.raises((SystemExit, InputError)) as refused:
            draw()
        said = capsys.readouterr().err + str(refused.value)
        assert f"{path}: was changed since the run wrote it" in said
        path.write_text(whole)
    trained_runs.read_runs(out)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
        ("a|b", "a\\|b"),
        ("[x](javascript:y)", "\\[x\\](javascript:y)"),
        ("*a* `b` ~~c~~ d_e &amp; f\ng\\", "\\*a\\* \\`b\\` \\~\\~c\\~\\~ d\\_e &amp;amp; f g\\\\"),
        ("LoRA, alpha/r^(1/4)", "LoRA, alpha/r^(1/4)"),
    ],
)
def test_names_are_no_markup(name, shown) -> None:
    """Of a model, as a folder may be called."""
    assert benchmark_tables.escaped(name) == shown
    line = benchmark_tables.printed("I")[0]
    named = dataclasses.replace(line, model=name, method=name, source=name)
    manifest = {"config": {"data": {"train_records": 1}, "evaluation": {"protocol": name}}}
    manifest["config"]["training"] = {"steps": 1, "batch": 1}
    text = benchmark_tables.markdown([named], "I", manifest)
    assert text.count(shown) == 4
    assert "<script" not in text
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in text.splitlines() if row.startswith("|")}) == 1


@pytest.mark.usefixtures("quick")
def test_a_tuned_design_goes_on_at_the_best_rate(model, data, tmp_path, capsys) -> None:
    out = tmp_path / "m"
    rates = ("1e-4", "1e-3")
    more = ["--design", "tuned_rate", "--methods", "lora", "--ranks", "2", "--lrs", *rates, "--seeds", "0", "1"]
    rank_sweep.main(command(model, data, out, *more))
    rows = rows_of(out)
    first = {row["learning_rate"]: float(row["validation_loss"]) for row in rows if row["seed"] == "0"}
    assert set(first) == {"0.0001", "0.001"}
    [second] = [row for row in rows if row["seed"] == "1"]
    best = min(first, key=lambda rate: first[rate])
    assert second["learning_rate"] == best
    assert second["protocol"] == "label", "the others are scored"
    assert [row["best_rate"] for row in rows] == ["edge" if row["learning_rate"] == best else "" for row in rows]
    assert f"lora r=2: learning rate {float(best):g}; it is at the edge" in capsys.readouterr().out
    assert stopped(1, fail, command(model, data, out, *more, "3", "--lrs", *rates, "3e-3")) == 1
    assert len(rows_of(out)) == 3, "the other seeds wait until every rate was tried at the first"


def words_of(path) -> str:
    """What a figure says, whatever its lines; text drawn as paths is in comments."""
    return " ".join(re.sub(r"<!--|-->|<[^>]*>", " ", path.read_text()).split())


@pytest.mark.slow
def test_figures_and_tables(swept, tmp_path, capsys) -> None:
    """Drawn from the folder alone; the tables hold every row of ours and of the paper's."""
    accuracy_vs_rank.draw(accuracy_vs_rank.Config(swept, out=tmp_path))
    loss_vs_rate.draw(loss_vs_rate.Config(swept, rank=4, out=tmp_path))
    loss_curves.draw(loss_curves.Config((swept,), rank=4, out=tmp_path))
    scaling_diagram.draw(scaling_diagram.Config(out=tmp_path))
    accuracy.draw(accuracy.Config(swept, rank=4, out=tmp_path))
    drawn = words_of(tmp_path / "accuracy.svg")
    assert all(name in drawn for name in ("LoRA", "no adapter", "less the model alone", "less LoRA", "average"))
    with pytest.raises(SystemExit):
        accuracy.draw(accuracy.Config(swept, rank=3, out=tmp_path))
    assert "has the ranks 2, 4. Choose one with --rank" in capsys.readouterr().err
    for name in ("accuracy_vs_rank", "loss_vs_rate", "loss_curves", "scaling_diagram"):
        for ending in ("png", "svg"):
            assert (tmp_path / f"{name}.{ending}").stat().st_size > 1000
    drawn = (tmp_path / "accuracy_vs_rank.svg").read_text()
    assert "nats" in drawn
    assert "average accuracy, label" in drawn
    drawn = words_of(tmp_path / "loss_vs_rate.svg")
    assert all(name in drawn for name in ("LoRA", "RoRA", "DoRA", "prefix tuning", "series adapter", "no adapter"))
    assert "r = 4, " in drawn
    assert "(above)" not in drawn
    loss_vs_rate.draw(loss_vs_rate.Config(swept, rank=4, top=0.5, out=tmp_path))  # below every loss
    assert "(above)" in (tmp_path / "loss_vs_rate.svg").read_text()
    with pytest.raises(SystemExit):
        loss_vs_rate.draw(loss_vs_rate.Config(swept, out=tmp_path))
    assert "has the ranks 2, 4. Choose one with --rank" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"--top must be a finite number above 0, got .*"):
        loss_vs_rate.draw(loss_vs_rate.Config(swept, rank=4, top=0.0, out=tmp_path))
    for layout in ("I", "II"):
        benchmark_tables.draw(benchmark_tables.Config(swept, layout=layout, out=tmp_path))
    with (tmp_path / "table_I.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    ours = {(line["method"], line["rank"]): line for line in lines if line["source"] == "this run"}
    assert {"Prefix", "Series", "LoRA", "DoRA", "RoRA", "none"} <= {method for method, _ in ours}
    row = next(row for row in rows_of(swept) if (row["method"], row["rank"]) == ("rora", "4"))
    assert float(ours["RoRA", "4"]["BoolQ"]) == pytest.approx(100 * float(row["boolq"]))
    [model] = json.loads((swept / "manifest.json").read_text())["models"].values()
    share = int(row["trainable_parameters"]) / (int(row["trainable_parameters"]) + model["parameters"])
    assert float(ours["RoRA", "4"]["params_percent"]) == pytest.approx(100 * share, rel=1e-3)
    printed = [line for line in lines if line["source"] == "paper, as printed"]
    assert {line["method"] for line in printed} == {"Prefix", "Series", "Parallel", "LoRA", "DoRA", "RoRA"}
    text = (tmp_path / "table_II.md").read_text()
    assert "not comparable with this run's" in text
    with pytest.raises(InputError, match=r"manifest\.json: no such file\. Expected the file of a run folder"):
        style.main(accuracy_vs_rank.draw, accuracy_vs_rank.Config(tmp_path))


def test_figures_show_what_diverged_and_refuse_a_mixture(tmp_path, capsys) -> None:
    """A run of three cells by hand: what is drawn, not what was tried, is what the title says."""
    columns = dict.fromkeys(results.COLUMNS, "")
    shared = {
        "status": "complete",
        "model": "runs/half/model",
        "method": "rora",
        "rule": "rora",
        "alpha": "64.0",
        "gamma": "8.0",
    }
    shared |= {"rank": "64", "learning_rate": "0.001", "best_rate": "yes", "validation_loss": "1.0", "steps": "5"}
    shared |= {"validation_error": "0.1", "seed": "0"}
    rows = [columns | shared, columns | shared | {"seed": "1", "status": "diverged", "validation_loss": ""}]
    rows += [columns | shared | {"learning_rate": "0.01", "best_rate": ""}]
    rows += [columns | shared | {"rank": "16", "gamma": "16.0", "status": "diverged", "best_rate": ""}]
    config = {"training": {"batch": 4, "steps": 5}, "data": {"held_out": 6, "train_records": 8}}
    manifest = {"experiment": "rank_sweep", "config": config, "design": "table1"}

    def write() -> None:
        (tmp_path / "manifest.json").write_text(json.dumps(seals.seal(manifest)))
        (tmp_path / "results.csv").write_text(frames.to_csv(frames.from_rows(rows, results.COLUMNS)))

    write()
    accuracy_vs_rank.draw(accuracy_vs_rank.Config(tmp_path, lr=1e-3))
    drawn = words_of(tmp_path / "accuracy_vs_rank.svg")
    assert "half, " in drawn
    assert "lr 0.001, 5 steps of 4, 6 held-out records" in drawn
    assert "some seeds diverged" in drawn
    assert "all seeds diverged" in drawn
    accuracy_vs_rank.draw(accuracy_vs_rank.Config(tmp_path, tuned=True))
    assert "best lr of a seed on these records" in words_of(tmp_path / "accuracy_vs_rank.svg")
    rows[0] |= {"average": "0.5", "average_error": "0.01", "average_unparsed": "0.25", "protocol": "generate"}
    rows[1] |= {"protocol": "generate"}
    rows[2] |= {"rank": "8"}
    write()
    benchmark_tables.draw(benchmark_tables.Config(tmp_path))
    assert (
        "| 25.0 | this run, 1 seed, 1 diverged, alpha 64, lr 0.001 (best tried) |"
        in (tmp_path / "table_I.md").read_text()
    )
    rows[2] |= {"rank": "64", "alpha": "128.0"}
    write()
    with pytest.raises(SystemExit):
        style.main(accuracy_vs_rank.draw, accuracy_vs_rank.Config(tmp_path))
    assert "rora r=64 has alpha 64, 128. Choose one with --alpha" in capsys.readouterr().err
    rows = [row | {"method": "prefix", "rank": "", "alpha": ""} for row in rows]
    write()
    with pytest.raises(SystemExit):
        style.main(accuracy_vs_rank.draw, accuracy_vs_rank.Config(tmp_path))
    assert "has no cell of lora, " in capsys.readouterr().err


def test_bad_input_is_one_line_before_anything_is_written(model, data, tmp_path, capsys) -> None:
    for more, message in {
        ("--methods", "qlora"): "'qlora'; supported: base, prefix",
        ("--ranks", "4", "4"): "--ranks must have different values, got 4 4",
        ("--ranks", "0"): "--ranks must be an integer of 1 or more, got 0",
        ("--ranks", "64"): "64",
        ("--lrs", "-1"): "--lrs must be a finite number above 0, got -1",
        ("--rank", "4"): "--rank",
        ("--score-batch-size", "0"): "--score-batch-size must be an integer of 1 or more, got 0",
        ("--limit", "0"): "--limit must be an integer of 1 or more, got 0",
        ("--seeds", "-1"): "seeds must be an integer of 0 or more, got -1",
        ("--held-out", "100"): "records to hold out",
        ("--train-records", "100"): "train_records 100",
        ("--alpha", "0"): "alpha must be a finite number above 0, got 0",
        ("--tasks", "arc"): "arc",
        ("--data-dir", str(tmp_path / "none")): "none",
    }.items():
        with pytest.raises(SystemExit) as caught:
            rank_sweep.main(command(model, data, tmp_path / "m", *more))
        stderr = capsys.readouterr().err
        assert caught.value.code == 2, more
        assert message in stderr, (more, stderr)
        assert stderr.count("\n") == 1, more
        assert not (tmp_path / "m").exists(), more
