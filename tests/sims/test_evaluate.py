"""`python -m sims.evaluate` on a tiny checkpoint and a few invented records: results, resuming, damaged samples."""

import json
from pathlib import Path
from typing import Any

import jax
import pytest
from support import checkpoint, commands

from rora_theory.errors import InputError
from rora_theory.lab.adapters import LoraConfig, save_peft
from rora_theory.lab.data import sources
from rora_theory.lab.evaluate import Samples, samples
from rora_theory.lab.llama import load, locate
from rora_theory.runs import frames
from sims import evaluate

TASKS = {"boolq": ("true", "false"), "piqa": ("solution1", "solution2")}
COUNT = 30
PROTOCOLS = {"label": "--batch-size 1", "harness": "--limit 3", "generate": "--limit 3 --max-new-tokens 4"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Write thirty records of each of two tasks."""
    folder = tmp_path_factory.mktemp("data")
    for task, labels in TASKS.items():
        checkpoint.questions(folder, task, labels, COUNT)
    return folder


def arguments(model: Path, data: Path, out: Path, protocol: str) -> list[object]:
    words = ["--model", model, "--data-dir", data, "--tasks", *TASKS, "--out", out, "--protocol", protocol]
    return [*words, PROTOCOLS[protocol]]


def run_evaluate(*words: object) -> str:
    """Run the command to its end, and return what it prints."""
    return commands.output(commands.run_command(evaluate.main, *words))


@pytest.fixture(scope="module")
def finished(model, data, tmp_path_factory) -> Path:
    """Return a folder with a run of each protocol, and what it printed."""
    folder = tmp_path_factory.mktemp("runs")
    for protocol in PROTOCOLS:
        printed = run_evaluate(*arguments(model, data, folder / protocol, protocol))
        (folder / f"{protocol}.txt").write_text(printed)
    return folder


def scored(folder: Path) -> list[dict]:
    """Return the samples of a run."""
    return [json.loads(line) for line in (folder / samples.FILE).read_text().splitlines()]


def tables(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in (samples.FILE, "results.csv")]


@pytest.mark.slow
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_run_writes_samples_and_results(protocol: str, finished: Path) -> None:
    folder, count = finished / protocol, COUNT if protocol == "label" else 3
    scores = scored(folder)
    assert [(s["task"], s["index"]) for s in scores] == [(task, n) for task in TASKS for n in range(count)]
    assert {s["protocol"] for s in scores} == {protocol}
    levels = frames.rows(frames.read_csv(folder / "results.csv"))
    assert {level["protocol"] for level in levels} == {protocol}
    assert [level["task"] for level in levels] == [*TASKS, "average"]
    for level in levels[:-1]:
        right = [s["correct"] for s in scores if s["task"] == level["task"]]
        assert level["accuracy"] == sum(right) / count
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["status"], manifest["protocol"]) == ("complete", protocol)
    printed = (finished / f"{protocol}.txt").read_text()
    assert all(word in printed for word in (protocol, "BoolQ", "PIQA", "average", "chance", "majority", "unparsed"))
    assert ("BoolQ records of this data set have no passage" in printed) == (protocol == "harness")


@pytest.mark.slow
def test_an_interruption_loses_no_sample(model: Path, data: Path, finished: Path, tmp_path: Path, monkeypatch) -> None:
    """Each sample is written before the next is scored, so that a kill loses none.

    A resumed run ends with the files of an uninterrupted one. `test_finetune` kills a process.
    """
    words, path, add = arguments(model, data, tmp_path / "run", "label"), tmp_path / "run" / samples.FILE, Samples.add

    def stop_at_the_ninth(self: Samples, sample: Any) -> None:
        add(self, sample)
        assert path.read_bytes().count(b"\n") == len(self.scored)
        if len(self.scored) == 9:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Samples, "add", stop_at_the_ninth)
        assert commands.run_command(evaluate.main, *words).status == 130
    lines = path.read_bytes()
    path.write_bytes(lines[: lines.rfind(b"\n", 0, -1) + 20])  # its last line half written
    run_evaluate(*words)
    assert tables(tmp_path / "run") == tables(finished / "label")


@pytest.mark.slow
def test_samples_of_other_records_or_another_protocol_and_damaged_ones_are_refused(
    finished: Path, data: Path, tmp_path: Path
) -> None:
    path = finished / "harness" / samples.FILE
    tasks, _ = sources.read_tasks(str(data), tuple(TASKS), 3)
    records = [record for items in tasks.values() for record in items]
    with pytest.raises(InputError, match=r"line 1 is of harness \('boolq', 0\), which this run does not score"):
        Samples(path, records[1:], "harness")
    with pytest.raises(InputError, match=r"line 1 is of harness"):
        Samples(path, records, "label")
    copy = tmp_path / samples.FILE
    copy.write_text(path.read_text().replace("boolq", "piqa", 1))
    with pytest.raises(InputError, match=r"line [\d]+ is of harness \('piqa', 0\)"):
        Samples(copy, records, "harness")
    copy.write_text(path.read_text().replace('"boolq"', '"boolq', 1))
    with pytest.raises(InputError, match="line 1 is damaged"):
        Samples(copy, records, "harness")


@pytest.mark.slow
def test_a_task_has_the_same_scores_alone_and_with_others(
    model: Path, data: Path, finished: Path, tmp_path: Path
) -> None:
    run_evaluate(*arguments(model, data, tmp_path / "run", "label"), "--tasks piqa")
    assert scored(tmp_path / "run") == scored(finished / "label")[COUNT:]


def test_weights_are_loaded_in_the_requested_dtype(model: Path) -> None:
    loaded, _ = evaluate.load_scored_model(evaluate.EvaluateOptions(model=str(model), dtype="bfloat16"), locate(model))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(loaded.params)} == {"bfloat16"}


@pytest.mark.slow
def test_an_adapter_changes_the_scores_equally_merged_or_not(model, data, finished: Path, tmp_path: Path) -> None:
    base = load(model)
    settings = LoraConfig(rank=2, alpha=4.0, target_modules=("self_attn.q_proj", "mlp.down_proj"))
    adapter = settings.build(jax.random.key(1), base.config, base.params)
    keys = iter(jax.random.split(jax.random.key(2), len(jax.tree.leaves(adapter.params))))
    adapter = adapter.replace(jax.tree.map(lambda leaf: jax.random.normal(next(keys), leaf.shape), adapter.params))
    save_peft(tmp_path / "adapter", adapter)
    for name in ("merge", "no-merge"):
        more = ("--limit 2 --adapter", tmp_path / "adapter", f"--{name}")
        run_evaluate(*arguments(model, data, tmp_path / name, "label"), *more)
    none, merged, unmerged = (
        [value for sample in scored(path) if sample["index"] < 2 for _, value in sample["log_likelihoods"]]
        for path in (finished / "label", tmp_path / "merge", tmp_path / "no-merge")
    )
    # Merging rounds the weights once more: float32 log-likelihoods of order 10, to about 1e-5 of their size.
    assert merged == pytest.approx(unmerged, abs=1e-3)
    assert merged != pytest.approx(none, abs=0.1)


def test_no_data_folder_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RORA_COMMONSENSE_DIR", raising=False)
    ended = commands.run_command(evaluate.main, "--model", model, "--protocol label")
    assert "RORA_COMMONSENSE_DIR is not set" in commands.refusal(ended)
