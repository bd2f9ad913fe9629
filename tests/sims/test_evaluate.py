"""`python -m sims.evaluate` on a tiny checkpoint and a few invented records: results, resuming, bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from rora_theory.adapters import LoraConfig, init, replace, save_peft, trainable
from rora_theory.data import sources
from rora_theory.data.tasks import TASKS, render_instruction
from rora_theory.errors import InputError
from rora_theory.evaluate import Samples, samples
from rora_theory.llama import LlamaConfig, init_params, load, locate
from rora_theory.llama.weights import save_hf
from sims import evaluate

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "harness.json").read_text())
KEYS = ("boolq", "piqa", "ARC-Easy")
CONFIG = LlamaConfig(340, 16, 24, 2, 4, 2, 4, max_position_embeddings=1024, bos_token_id=0, eos_token_id=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint in Hugging Face layout."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps(GOLDEN["tokenizer"]))
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(special))
    params = jax.tree.map(lambda leaf: 10 * leaf if leaf.ndim > 1 else leaf, init_params(jax.random.key(0), CONFIG))
    save_hf(folder / "hf", params, CONFIG, tokenizer_from=folder / "tokenizer")
    return folder / "hf"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty records of each of three tasks."""
    folder = tmp_path_factory.mktemp("data")
    for key in KEYS:
        question, choices, _ = GOLDEN["items"][key][0]
        task = TASKS[key]
        rows = []
        for number in range(30):
            answer = task.labels[number % len(choices)]
            instruction = render_instruction(task, f"{question} {'x' * (number % 5)}{number}", choices)
            row = {"instruction": instruction, "input": "", "answer": answer}
            rows.append(row | {"output": f"the correct answer is {answer}"})
        (folder / key).mkdir()
        (folder / key / "test.json").write_text(json.dumps(rows))
    return folder


def _arguments(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    return ["--model", str(model), "--data-dir", str(data), "--tasks", *KEYS, "--out", str(out), *more]


def _files(folder: Path) -> dict[str, bytes]:
    names = (samples.FILE, evaluate.RESULTS, "results.csv")
    return {name: (folder / name).read_bytes() for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["label", "harness", "generate"])
def test_a_run_writes_samples_and_results(
    protocol: str, model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = KEYS[:2] if protocol == "generate" else KEYS  # each task's prompts compile once more
    more = ("--tasks", *keys, "--protocol", protocol, "--limit", "3", "--max-new-tokens", "4")
    evaluate.main(_arguments(model, data, tmp_path / "run", *more))
    scored = [json.loads(line) for line in (tmp_path / "run" / samples.FILE).read_text().splitlines()]
    assert [(s["task"], s["index"]) for s in scored] == [(key, n) for key in keys for n in range(3)]
    assert {s["protocol"] for s in scored} == {protocol}
    results = json.loads((tmp_path / "run" / evaluate.RESULTS).read_text())
    assert results["scoring"]["protocol"] == protocol
    assert [level["task"] for level in results["levels"]] == [*keys, "average"]
    for level in results["levels"][:-1]:
        right = [s["correct"] for s in scored if s["task"] == level["task"]]
        assert level["accuracy"] == sum(right) / 3
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert (manifest["status"], manifest["protocol"]) == ("complete", protocol)
    shown = capsys.readouterr().out
    assert f"{protocol}" in shown
    assert all(word in shown for word in ("BoolQ", "PIQA", "average", "chance", "majority", "unparsed"))
    assert ("BoolQ records of this data set have no passage" in shown) == (protocol == "harness")


@pytest.mark.slow
def test_a_kill_loses_nothing(model: Path, data: Path, tmp_path: Path) -> None:
    """Killed by SIGKILL at its first samples, the command goes on; every file is then the uninterrupted run's."""
    more = ("--protocol", "label", "--batch-size", "1")
    evaluate.main(_arguments(model, data, tmp_path / "whole", *more))
    command = [sys.executable, "-m", "sims.evaluate", *_arguments(model, data, tmp_path / "killed", *more)]
    path = tmp_path / "killed" / samples.FILE
    process = subprocess.Popen(command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (path.exists() and path.stat().st_size) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL, "it had ended before"
    kept = path.read_bytes()
    path.write_bytes(kept[: kept.rfind(b"\n", 0, -1) + 20])  # and its last line half written
    evaluate.main(_arguments(model, data, tmp_path / "killed", *more))
    assert _files(tmp_path / "killed") == _files(tmp_path / "whole")


@pytest.mark.slow
def test_half_a_line_is_cut_from_the_file_before_more_is_written(model: Path, data: Path, tmp_path: Path) -> None:
    evaluate.main(_arguments(model, data, tmp_path / "run", "--protocol", "label", "--limit", "2"))
    path = tmp_path / "run" / samples.FILE
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:30])
    tasks, _ = sources.read_tasks(str(data), KEYS, 2)
    records = [record for items in tasks.values() for record in items]
    identity = json.loads((tmp_path / "run" / "manifest.json").read_text())["run_id"]
    assert len(Samples(path, identity, records, "label").scored) == 6
    with pytest.raises(InputError, match=r"line 1 is of label \('boolq', 0\), which this run does not score"):
        Samples(path, identity, records[1:], "label")
    with pytest.raises(InputError, match=r"line 1 is of label"):
        Samples(path, identity, records, "harness")
    assert path.read_bytes() == whole


@pytest.mark.slow
def test_what_is_scored_is_not_scored_again(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("--protocol", "harness")
    evaluate.main(_arguments(model, data, tmp_path / "run", *more))
    before = _files(tmp_path / "run")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("scored again")

    monkeypatch.setattr(evaluate.samples, "score_tasks", refuse)
    evaluate.main(_arguments(model, data, tmp_path / "run", *more, "--batch-size", "2"))
    assert _files(tmp_path / "run") == before


@pytest.mark.slow
def test_a_task_scores_alike_alone_and_among_others(model: Path, data: Path, tmp_path: Path) -> None:
    evaluate.main(_arguments(model, data, tmp_path / "three", "--protocol", "label"))
    alone = ["--model", str(model), "--data-dir", str(data), "--tasks", "piqa", "--protocol", "label"]
    evaluate.main([*alone, "--out", str(tmp_path / "one")])
    three = (tmp_path / "three" / samples.FILE).read_text().splitlines()
    one = (tmp_path / "one" / samples.FILE).read_text().splitlines()
    assert [plain(line) for line in one] == [plain(line) for line in three[30:60]]


def plain(line: str) -> dict:
    """A sample without the digest of it and its run."""
    return {name: value for name, value in json.loads(line).items() if name != "digest"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_loaded_is_what_was_asked_for(model: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        evaluate, "load", lambda *arguments: asked.append(arguments) or load(arguments[0], arguments[1])
    )
    origin = locate(model)
    loaded, _ = evaluate.load_model(evaluate.Config(model=str(model), dtype=dtype), origin)
    assert asked == [(origin, dtype)]
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(loaded.params)} == {dtype}


@pytest.mark.slow
def test_an_adapter_changes_the_scores_alike_merged_or_beside(model: Path, data: Path, tmp_path: Path) -> None:
    base = load(model)
    adapter = init(
        jax.random.key(1),
        LoraConfig(rank=2, alpha=4.0, target_modules=("self_attn.q_proj", "mlp.down_proj")),
        base.config,
        base.params,
    )
    keys = iter(jax.random.split(jax.random.key(2), len(jax.tree.leaves(trainable(adapter)))))
    adapter = replace(adapter, jax.tree.map(lambda leaf: jax.random.normal(next(keys), leaf.shape), trainable(adapter)))
    save_peft(tmp_path / "adapter", adapter)
    scores = {}
    for name, more in {
        "none": (),
        "merged": ("--adapter", str(tmp_path / "adapter")),
        "beside": ("--adapter", str(tmp_path / "adapter"), "--no-merge"),
    }.items():
        arguments = _arguments(model, data, tmp_path / name, "--protocol", "label", "--limit", "2", *more)
        evaluate.main(arguments)
        lines = (tmp_path / name / samples.FILE).read_text().splitlines()
        scores[name] = [value for line in lines for _, value in json.loads(line)["log_likelihoods"]]
    # Merging rounds the weights once more: float32 log-likelihoods of order 10, to about 1e-5 of their size.
    assert scores["merged"] == pytest.approx(scores["beside"], abs=1e-3)
    assert scores["merged"] != pytest.approx(scores["none"], abs=0.1)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--tasks", "piqa", "arc"), "task must be one of boolq"),
        (("--tasks", "piqa", "piqa"), "tasks must be one or more different tasks, got 'piqa piqa'"),
        (("--limit", "0"), "limit must be an integer of 1 or more, got 0"),
        (("--batch-size", "0"), "--batch-size must be an integer of 1 or more, got 0"),
        (("--num-beams", "0"), "num_beams must be an integer of 1 or more, got 0"),
        (("--protocol", "harness", "--template", "clean"), "template must be none with protocol harness, got 'clean'"),
        (("--data-dir", "/nowhere"), "/nowhere/boolq/test.json: no such file"),
        (("--adapter", "/nowhere"), "--adapter must be the folder of an adapter in PEFT's format, got /nowhere"),
        (("--adapter", "/tmp"), "adapter_config.json"),
        (("--model", "/nowhere"), "/nowhere: no such path"),
        (("--protocol", "accuracy"), "accuracy"),
    ],
)
def test_bad_input_ends_in_one_line_and_status_2(
    more: tuple[str, ...],
    message: str,
    model: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        evaluate.main(_arguments(model, data, tmp_path / "run", *more))
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_no_data_folder_is_refused(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RORA_COMMONSENSE_DIR", raising=False)
    with pytest.raises(SystemExit):
        evaluate.main(["--model", str(model), "--protocol", "label"])
    assert "RORA_COMMONSENSE_DIR is not set" in capsys.readouterr().err


def test_bad_records_and_other_data_are_refused(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = json.loads((data / "piqa" / "test.json").read_text())
    (tmp_path / "data" / "piqa").mkdir(parents=True)
    copy = tmp_path / "data" / "piqa" / "test.json"
    copy.write_text(json.dumps(rows))
    arguments = ["--model", str(model), "--data-dir", str(tmp_path / "data"), "--tasks", "piqa"]
    arguments += ["--protocol", "label", "--out", str(tmp_path / "run")]
    evaluate.main(arguments)
    rows[3]["answer"] = "solution9"
    copy.write_text(json.dumps(rows))
    with pytest.raises(SystemExit):
        evaluate.main(arguments)
    error = capsys.readouterr().err
    assert f"{copy}: record 3: answer must be " in error
    assert "got 'solution9'" in error
    copy.write_text(json.dumps(rows[:3]))
    with pytest.raises(SystemExit):
        evaluate.main(arguments)
    assert "holds a run with other arguments" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: [lines[0], "{}", *lines[2:]], "samples.jsonl: line 2 is damaged or was changed"),
        (lambda lines: [*lines[:2], lines[2].replace("false", "true"), *lines[3:]], "line 3 is damaged or was changed"),
        (lambda lines: [*lines, lines[0]], "line 7 is damaged or was changed"),
        (lambda lines: [lines[0], *lines[2:]], "line 2 is damaged or was changed"),
    ],
)
def test_damaged_samples_are_named(
    damage, message: str, model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = _arguments(model, data, tmp_path / "run", "--protocol", "label", "--limit", "2")
    evaluate.main(arguments)
    path = tmp_path / "run" / samples.FILE
    path.write_text("\n".join(damage(path.read_text().splitlines())) + "\n")
    with pytest.raises(SystemExit):
        evaluate.main(arguments)
    assert message in capsys.readouterr().err
