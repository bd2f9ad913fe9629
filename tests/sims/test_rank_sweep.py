"""`python -m sims.rank_sweep` on a tiny checkpoint: each cell once, what it measures, designs, kills, bad input."""

import csv
import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from support import checkpoint

from figures import accuracy_vs_rank, benchmark_tables, loss_curves, loss_vs_rate, scaling_diagram, style
from rora_theory.adapters import LoraConfig, PrefixConfig, init, load_peft, merge
from rora_theory.adapters import replace as adapter_replace
from rora_theory.errors import InputError
from rora_theory.evaluate.scoring import score as commonsense_score
from rora_theory.finetune import Record, tokenize
from rora_theory.finetune.held_out import mean_per_token, record_losses
from rora_theory.llama import load, locate
from sims import matrix_rates, rank_results, rank_sweep
from sims.common import matrix

PLAIN = (
    "--batch 4 --steps 3 --warmup 1 --widths 1 --held-out 6 --train-records 12 --dropout 0 "
    "--template clean --cutoff 400"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return checkpoint.model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two training files, and four questions of two tasks."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("one", "two"):
        (folder / name).mkdir()
        checkpoint.records(folder / name / "train.json", 30)
    rows = json.loads((folder / "two" / "train.json").read_text())
    for row in rows:
        row["instruction"] = "two " + row["instruction"]
    (folder / "two" / "train.json").write_text(json.dumps(rows))
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


@pytest.fixture(scope="module")
def swept(model, data, tmp_path_factory) -> Path:
    """A matrix of every kind of cell."""
    out = tmp_path_factory.mktemp("sweep") / "matrix"
    methods = ["base", "prefix", "series", "lora", "dora", "rora", "quarter"]
    rank_sweep.main(
        command(model, data, out, "--methods", *methods, "--ranks", "2", "4", "--seeds", "0", "--save-adapters", "True")
    )
    return out


def test_cells(swept) -> None:
    rows = rows_of(swept)
    assert [(row["method"], row["rank"]) for row in rows] == [
        ("base", ""),
        ("prefix", ""),
        ("series", ""),
        *[(method, rank) for method in ("lora", "dora", "rora", "quarter") for rank in ("2", "4")],
    ]
    assert {row["status"] for row in rows} == {"complete"}
    gammas = {(row["method"], row["rank"]): row["gamma"] for row in rows}
    assert (gammas["lora", "4"], gammas["dora", "4"], gammas["rora", "4"]) == ("16.0", "16.0", "32.0")
    assert float(gammas["quarter", "4"]) == pytest.approx(64 / 2**0.5, rel=1e-12)
    assert gammas["prefix", ""] == ""
    assert len({row["validation_loss"] for row in rows}) == len(rows), "no two cells trained the same"
    for row in rows:
        assert float(row["average"]) == pytest.approx((float(row["boolq"]) + float(row["piqa"])) / 2)
        assert float(row["validation_error"]) > 0


def test_parameters_are_counted(swept) -> None:
    """Per layer of hidden 16, feed-forward 24, 2 query heads and 1 key/value head of 8."""
    shapes = [(16, 16), (8, 16), (8, 16), (24, 16), (16, 24)]  # q, k, v, up, down
    expected = {("lora", "2"): 2 * sum(2 * (a + b) for a, b in shapes)}
    expected["dora", "2"] = expected["lora", "2"] + 2 * sum(a for a, _ in shapes)
    expected["prefix", ""] = 2 * 10 * 2 * 8
    expected["series", ""] = 2 * 2 * 256 * 2 * 16  # before gate and up: of the model's width
    found = {(row["method"], row["rank"]): int(row["trainable_parameters"] or 0) for row in rows_of(swept)}
    assert {key: found[key] for key in expected} == expected
    models = json.loads((swept / "manifest.json").read_text())["models"]
    [total] = [entry["parameters"] for entry in models.values()]
    assert total == 2 * 300 * 16 + 16 + 2 * (sum(a * b for a, b in shapes) + 16 * 16 + 24 * 16 + 2 * 16)


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
    mean, error = mean_per_token([one.loss for one in found], [one.tokens for one in found])
    assert (float(row["validation_loss"]), float(row["validation_error"])) == pytest.approx((mean, error), rel=1e-4)
    base = record_losses(whole.params, whole.config, examples)
    assert abs(base[0].loss / found[0].loss - 1) > 1e-3, "the adapter counts"


@pytest.fixture(scope="module")
def bench(model, data) -> rank_sweep.Workbench:
    """The tiny checkpoint in memory, as a sweep has it."""
    files = tuple(str(data / name / "train.json") for name in ("one", "two"))
    config = rank_sweep.Config(
        data=files, model=(str(model),), held_out=6, train_records=12, batch=4, cutoff=400, widths=1, template="clean",
        tasks=("boolq", "piqa"), data_dir=str(data), eval_template="clean",
    )  # fmt: skip
    located = {str(model): locate(str(model))}
    found = rank_sweep.Workbench(config, rank_sweep.draw(config), rank_sweep.read_tasks(config)[0], located)
    found.open(str(model))
    return found


def test_methods_of_a_seed_share_init_and_order_and_seeds_do_not(bench) -> None:
    def begun(method: str, rank: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        design = bench.config.the_design()
        adapter, batches = bench.begin(rank_sweep.training_of(bench.config, design, method, rank, 1e-3, seed))
        return np.asarray(adapter.params["mlp.up_proj"]["lora_A"]), np.stack(
            [b.inputs for b in map(batches.__getitem__, range(3))]
        )

    first = begun("lora", 4, 0)
    for method in ("rora", "dora", "quarter", "dora-rora"):
        for ours, its in zip(first, begun(method, 4, 0), strict=True):
            np.testing.assert_array_equal(ours, its)
    np.testing.assert_array_equal(first[1], begun("lora", 2, 0)[1])
    drawn = [first, begun("lora", 4, 1), begun("lora", 4, 2)]
    for one, other in itertools.combinations(drawn, 2):
        assert not np.any(one[0] == other[0])
        assert not np.array_equal(one[1], other[1])
    assert len({np.unique(order.reshape(12, -1), axis=0).tobytes() for _, order in drawn}) == 1, "the same records"


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_what_is_scored_is_the_adapted_model(bench, kind, tmp_path, monkeypatch) -> None:
    """Whatever training left: an adapter that is merged, or runs beside the weights, is in every measurement."""
    settings, size = {"lora": (LoraConfig(rank=2, alpha=4.0), 1.0), "prefix": (PrefixConfig(3), 30.0)}[kind]
    fresh = init(jax.random.key(0), settings, bench._model.config, bench._model.params)
    adapter = adapter_replace(
        fresh, jax.tree.map(lambda a: a + size * jax.random.normal(jax.random.key(1), a.shape), fresh.params)
    )
    monkeypatch.setattr(bench, "_finetune", lambda training, path: rank_sweep.Trained({"steps": 1}, adapter))
    seen = []

    def score(params, config, tokenizer, items, scoring, **options):
        assert scoring == bench.config.scoring()
        seen.append((params, options["adapter"]))
        return commonsense_score(params, config, tokenizer, items, scoring, **options)

    monkeypatch.setattr(rank_sweep, "score", score)
    (cell,) = cells(dataclasses.replace(bench.config, methods=(kind,), ranks=(2,), seeds=(0,)))
    result = bench.run(cell, tmp_path)
    base = bench._model.params
    for params, beside in seen:
        assert beside is (adapter if kind == "prefix" else None)
        if kind == "lora":
            jax.tree.map(np.testing.assert_array_equal, params, merge(adapter, base))
    assert len(seen) == 2, "tasks"
    losses = record_losses(base, bench._model.config, bench._held_out, adapter=adapter)
    expected, _ = mean_per_token([one.loss for one in losses], [one.tokens for one in losses])
    assert result["validation_loss"] == pytest.approx(expected, rel=1e-4)
    plain = record_losses(base, bench._model.config, bench._held_out)
    assert abs(sum(one.loss for one in plain) / sum(one.loss for one in losses) - 1) > 1e-3


def test_the_schedule_ends_at_the_last_step(swept) -> None:
    """Three steps of nine, one of them warm-up: the rate is 0, the peak, half of it, and the peak is the cell's own."""
    for row in rows_of(swept):
        if row["method"] != "base":
            events = map(json.loads, (swept / "cells" / row["key"] / "metrics.jsonl").read_text().splitlines())
            peak = float(row["learning_rate"])
            assert [event["learning_rate"] for event in events] == pytest.approx([0, peak, peak / 2], rel=1e-6), row


def test_rules_of_a_rank_share_a_compiled_step(swept) -> None:
    results = [json.loads(file.read_text()) for file in sorted(swept.glob("cells/*/result.json"))]
    configs = [json.loads(file.read_text()) for file in sorted(swept.glob("cells/*/cell.json"))]
    compiled = {
        (config["method"], config["rank"]): result["compilations"]
        for config, result in zip(configs, results, strict=True)
        if config["training"]
    }
    for rank in (2, 4):
        assert compiled["lora", rank] == 1
        assert compiled["rora", rank] == compiled["quarter", rank] == 0


def test_the_same_command_does_nothing_and_a_larger_one_the_rest(swept, model, data, capsys) -> None:
    before = {path: path.stat().st_mtime_ns for path in swept.glob("cells/*/result.json")}
    more = ["--methods", "base", "lora", "--ranks", "2", "4", "--seeds", "0", "1"]
    rank_sweep.main(command(model, data, swept, *more, "--save-adapters", "True"))
    shown = capsys.readouterr().out
    assert "5 of 5 cells done" in shown
    assert shown.count(", answers") == 2, "the second seed's"
    assert {path: path.stat().st_mtime_ns for path in before} == before
    losses = {row["validation_loss"] for row in rows_of(swept) if (row["method"], row["rank"]) == ("lora", "2")}
    assert len(losses) == 2, "seeds differ"


def test_a_scored_cell_is_not_trained_again_without_accuracy(swept, model, data, capsys) -> None:
    before = sorted(swept.glob("cells/*"))
    more = ["--methods", "base", "lora", "--ranks", "2", "--seeds", "0", "--save-adapters", "True"]
    rank_sweep.main([*command(model, data, swept, *more), "--accuracy", "False"])
    assert "2 of 2 cells done" in capsys.readouterr().out
    assert sorted(swept.glob("cells/*")) == before


def test_a_folder_holds_one_way_of_training_and_one_model(swept, model, data, capsys, tmp_path) -> None:
    """Other settings, or another model at the same place, are refused."""
    for change in (["--warmup", "2"], ["--dropout", "0.1"], ["--cutoff", "300"]):
        with pytest.raises(SystemExit):
            rank_sweep.main([*command(model, data, swept, "--ranks", "2"), *change])
        assert "another identity (settings there" in capsys.readouterr().err
    other, out = tmp_path / "model", tmp_path / "m"
    shutil.copytree(model, other)
    rank_sweep.main(command(other, data, out, "--methods", "base"))
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    with pytest.raises(SystemExit):
        rank_sweep.main(command(other, data, out, "--methods", "base"))
    assert "another identity (model_sha256 there" in capsys.readouterr().err


def test_a_file_changed_by_hand_is_drawn_by_no_figure(swept, tmp_path, capsys) -> None:
    """The table's, and a cell's own."""
    out = tmp_path / "m"
    shutil.copytree(swept, out)
    [row, *_] = [row for row in rows_of(out) if row["method"] == "rora"]
    for path, draw in (
        (out / "results.csv", lambda: accuracy_vs_rank.draw(accuracy_vs_rank.Config(out))),
        (out / "results.csv", lambda: matrix_rates.read(out)),
        (out / "cells" / row["key"] / "metrics.jsonl", lambda: loss_curves.draw(loss_curves.Config((out,), rank=2))),
        (out / "cells" / row["key"] / "losses.csv", lambda: matrix_rates.read(out)),
    ):
        whole = path.read_text()
        path.write_text(whole.replace("1", "2", 1))
        with pytest.raises((SystemExit, InputError)) as refused:
            draw()
        said = capsys.readouterr().err + str(refused.value)
        assert f"{path}: was changed since the run wrote it" in said
        path.write_text(whole)
    matrix_rates.read(out)


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


def test_a_tuned_design_goes_on_at_the_best_rate(model, data, tmp_path, capsys) -> None:
    out = tmp_path / "m"
    rates = ("1e-4", "3e-2")
    more = ["--design", "tuned_rate", "--methods", "lora", "--ranks", "2", "--rates", *rates, "--seeds", "0", "1"]
    rank_sweep.main(command(model, data, out, *more))
    rows = rows_of(out)
    first = {row["learning_rate"]: float(row["validation_loss"]) for row in rows if row["seed"] == "0"}
    assert set(first) == {"0.0001", "0.03"}
    [second] = [row for row in rows if row["seed"] == "1"]
    best = min(first, key=lambda rate: first[rate])
    assert second["learning_rate"] == best
    assert second["protocol"] == "label", "the others are scored"
    assert [row["best_rate"] for row in rows] == ["edge" if row["learning_rate"] == best else "" for row in rows]
    assert f"lora r=2: learning rate {float(best):g}" in capsys.readouterr().out


def words_of(path) -> str:
    """What a figure says, whatever its lines; text drawn as paths is in comments."""
    return " ".join(re.sub(r"<!--|-->|<[^>]*>", " ", path.read_text()).split())


def test_figures_and_tables(swept, tmp_path, capsys) -> None:
    """Drawn from the folder alone; the tables hold every row of ours and of the paper's."""
    accuracy_vs_rank.draw(accuracy_vs_rank.Config(swept, out=tmp_path))
    loss_vs_rate.draw(loss_vs_rate.Config(swept, rank=2, out=tmp_path))
    loss_curves.draw(loss_curves.Config((swept,), rank=2, out=tmp_path))
    scaling_diagram.draw(scaling_diagram.Config(out=tmp_path))
    for name in ("accuracy_vs_rank", "loss_vs_rate", "loss_curves", "scaling_diagram"):
        for ending in ("png", "svg"):
            assert (tmp_path / f"{name}.{ending}").stat().st_size > 1000
    drawn = (tmp_path / "accuracy_vs_rank.svg").read_text()
    assert "nats" in drawn
    assert "average accuracy, label" in drawn
    drawn = words_of(tmp_path / "loss_vs_rate.svg")
    assert all(name in drawn for name in ("LoRA", "RoRA", "DoRA", "prefix tuning", "series adapter", "no adapter"))
    assert "r = 2, " in drawn
    assert "(above)" not in drawn
    loss_vs_rate.draw(loss_vs_rate.Config(swept, rank=2, top=0.5, out=tmp_path))  # below every loss
    assert "(above)" in (tmp_path / "loss_vs_rate.svg").read_text()
    with pytest.raises(SystemExit):
        loss_vs_rate.draw(loss_vs_rate.Config(swept, out=tmp_path))
    assert "has the ranks 2, 4; accepted is --rank with one of them" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"--top is .*; accepted is a finite number above 0"):
        loss_vs_rate.draw(loss_vs_rate.Config(swept, rank=2, top=0.0, out=tmp_path))
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
    with pytest.raises(SystemExit) as caught:
        style.main(accuracy_vs_rank.draw, accuracy_vs_rank.Config(tmp_path))
    assert caught.value.code == 2
    assert "is not a run folder" in capsys.readouterr().err


def test_figures_show_what_diverged_and_refuse_a_mixture(tmp_path, capsys) -> None:
    """A run of three cells by hand: what is drawn, not what was tried, is what the title says."""
    columns = dict.fromkeys(rank_results.COLUMNS, "")
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
    manifest = {"experiment": "rank_sweep", "config": config, "runs": [{"design": "table1"}]}

    def write() -> None:
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        lines = [list(row.values()) for row in rows]
        (tmp_path / "results.csv").write_text(rank_results.as_csv(rank_results.COLUMNS, lines))

    write()
    accuracy_vs_rank.draw(accuracy_vs_rank.Config(tmp_path))
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
    assert "rora r=64 has alpha 64, 128; accepted is --alpha with one of them" in capsys.readouterr().err
    rows = [row | {"method": "prefix", "rank": "", "alpha": ""} for row in rows]
    write()
    with pytest.raises(SystemExit):
        style.main(accuracy_vs_rank.draw, accuracy_vs_rank.Config(tmp_path))
    assert "has no cell of lora, " in capsys.readouterr().err


def cells(config: rank_sweep.Config) -> list[rank_sweep.Cell]:
    return rank_sweep.cells_of(config, config.the_design(), data={}, evaluation={"protocol": "label"}, stage=0)


def test_designs() -> None:
    """Alpha, rule and rate vary apart; the paper's designs have the paper's cells."""
    fixed = [cell for cell in cells(rank_sweep.Config(design="fixed_alpha")) if cell.rank]
    assert {cell.alpha for cell in fixed} == {64.0}
    assert {cell.gamma for cell in fixed if cell.method == "lora"} == {16.0, 8.0, 4.0, 2.0, 1.0, 0.5}
    doubled = [cell for cell in cells(rank_sweep.Config(design="alpha_2r")) if cell.rank]
    assert {cell.gamma for cell in doubled if cell.method == "lora"} == {2.0}
    assert {cell.gamma for cell in doubled if cell.method == "rora" and cell.rank == 64} == {16.0}
    tuned = cells(rank_sweep.Config(design="tuned_rate", methods=("prefix", "rora"), ranks=(8,)))
    assert [cell.learning_rate for cell in tuned if cell.rank] == list(rank_sweep.RATE_GRID)
    assert [cell.learning_rate for cell in tuned if not cell.rank] == list(rank_sweep.RATE_GRIDS["prefix"])
    assert {cell.evaluation for cell in tuned} == {None}, "scored at the chosen rate alone"
    table = cells(rank_sweep.Config(design="table1"))
    llama = [(c.method, c.rank, c.learning_rate) for c in table if c.model == "yahma/llama-7b-hf" and c.rank != 128]
    assert llama == [
        ("base", None, None),
        ("prefix", None, 3e-2),
        ("series", None, 3e-4),
        ("parallel", None, 3e-4),
        ("lora", 32, 3e-4),
        ("dora", 32, 2e-4),
        ("rora", 32, 3e-4),
    ]
    assert {c.learning_rate for c in table if c.method == "dora" and "Llama-3" in c.model} == {1e-4}
    assert {(c.dtype, c.training.dropout) for c in table if c.method in ("lora", "dora", "rora")} == {
        ("bfloat16", 0.05)
    }
    assert {c.training.dropout for c in table if c.method in ("series", "parallel")} == {0.0}
    assert rank_sweep.Config(design="table1").scoring().protocol == "generate"
    assert rank_sweep.Config(design="fixed_alpha").scoring().protocol == "label"
    assert len({matrix.key_of(cell) for cell in table}) == len(table) == 4 * 10
    assert {cell.rank for cell in cells(rank_sweep.Config(design="fig1"))} == {None, 4, 8, 16, 32, 64, 128, 256}
    assert {cell.rank for cell in cells(rank_sweep.Config(design="table2"))} == {None, 8, 16, 32, 64, 128}


def test_held_out_records_are_in_no_training_set(data) -> None:
    files = tuple(str(data / name / "train.json") for name in ("one", "two"))
    sample = rank_sweep.draw(rank_sweep.Config(data=files, held_out=10, train_records=20))
    held_out = {record.instruction for _, _, record in sample.held_out}
    assert len(held_out) == 10
    assert not held_out & {record.instruction for record in sample.train}
    assert [sum(text.startswith("two ") for text in held_out), len(sample.train)] == [5, 20]
    again = rank_sweep.draw(rank_sweep.Config(data=files, held_out=10, train_records=20))
    assert again.summary == sample.summary
    other = rank_sweep.draw(rank_sweep.Config(data=files, held_out=10, train_records=20, data_seed=1))
    assert other.summary["held_out_sha256"] != sample.summary["held_out_sha256"]


def test_a_repeated_record_is_on_one_side_alone(tmp_path) -> None:
    """Every instruction twice in one file and once in another: held out once, and nowhere trained on."""
    rows = [{"instruction": f"say {i}", "output": "a"} for i in range(12)]
    for name, held in (
        ("one", rows * 2),
        ("two", rows[:6] + [{"instruction": f"tell {i}", "output": "a"} for i in range(9)]),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.json").write_text(json.dumps(held))
    files = tuple(str(tmp_path / name / "train.json") for name in ("one", "two"))
    sample = rank_sweep.draw(rank_sweep.Config(data=files, held_out=8))
    held_out = [record.instruction for _, _, record in sample.held_out]
    assert len(held_out) == len(set(held_out)) == 8
    trained = {record.instruction for record in sample.train}
    assert not trained & set(held_out)
    assert len(trained) == 21 - 8, "everything else is"


def test_shares_of_the_files() -> None:
    assert rank_sweep.share(10, [90, 10, 50], "equal") == [4, 3, 3]
    assert rank_sweep.share(10, [90, 10, 50], "proportional") == [6, 1, 3]


def test_stages_of_a_tuned_design() -> None:
    """The first seed at every rate, unscored; the others at the chosen one, scored; the base once."""
    config = rank_sweep.Config(
        design="tuned_rate", methods=("base", "lora"), ranks=(4, 8), rates=(1e-3, 1e-2), seeds=(3, 4, 5)
    )
    make = partial(rank_sweep.cells_of, config, config.the_design(), data={}, evaluation={"protocol": "label"})
    first = make(stage=0)
    assert [(c.rank, c.learning_rate, c.seed) for c in first] == [
        (None,) * 3,
        *[(r, rate, 3) for r in (4, 8) for rate in (1e-3, 1e-2)],
    ]
    assert [c.evaluation is None for c in first] == [False] + [True] * 4
    rest = make(stage=1, rates={("smollm2-135m", "lora", 4): 1e-2, ("smollm2-135m", "lora", 8): 1e-3})
    assert [(c.rank, c.learning_rate, c.seed) for c in rest] == [
        (r, rate, s) for s in (4, 5) for r, rate in ((4, 1e-2), (8, 1e-3))
    ]
    assert all(c.evaluation for c in rest)


def test_a_killed_cell_is_reported_and_done_again(model, data, tmp_path, capsys) -> None:
    """SIGKILL in the first cell, a second process beside it; then the rest in this one."""
    out = tmp_path / "m"
    more = ["--methods", "lora", "rora", "--ranks", "2", "--seeds", "0", "1"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    arguments = [sys.executable, "-m", "sims.rank_sweep", *command(model, data, out, *more)]
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(out.glob("cells/*/attempts.jsonl")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "results.csv").exists()
    rank_sweep.main(command(model, data, out, *more))
    shown = capsys.readouterr().out
    assert "attempt 1: its process was gone before it had a result; tried again" in shown
    rows = rows_of(out)
    assert len(rows) == 4
    assert {row["status"] for row in rows} == {"complete"}
    assert sorted(row["attempts"] for row in rows) == ["1", "1", "1", "2"]


def test_bad_input_is_one_line_before_anything_is_written(model, data, tmp_path, capsys) -> None:
    for more, message in {
        ("--methods", "qlora"): "method is 'qlora'; accepted are base, prefix",
        ("--ranks", "4", "4"): "--ranks repeats a value (4 4)",
        ("--ranks", "0"): "rank is 0",
        ("--ranks", "64"): "64",
        ("--rates", "-1"): "--rates is -1",
        ("--seeds", "-1"): "seeds is -1",
        ("--held-out", "100"): "records to hold out",
        ("--train-records", "100"): "train_records 100",
        ("--alpha", "0"): "alpha is 0",
        ("--tasks", "arc"): "arc",
        ("--data-dir", str(tmp_path / "none")): "none",
        ("--attempts", "0"): "attempts is 0",
    }.items():
        with pytest.raises(SystemExit) as caught:
            rank_sweep.main(command(model, data, tmp_path / "m", *more))
        stderr = capsys.readouterr().err
        assert caught.value.code == 2, more
        assert message in stderr, (more, stderr)
        assert stderr.count("\n") == 1, more
        assert not (tmp_path / "m").exists(), more
