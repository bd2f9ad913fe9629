"""`python -m sims.finetune` on a tiny checkpoint: killed and resumed, merged, read back, and bad input in one line."""

import csv
import dataclasses
import fcntl
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from support import checkpoint
from support.event_files import logged

from figures import loss_curves, style
from rora_theory.adapters import init, load_peft, merge, share
from rora_theory.data import records
from rora_theory.finetune import (
    Batches,
    FinetuneConfig,
    prepare,
    read_records,
    sharding,
    split_records,
    tokenize,
)
from rora_theory.finetune import step as steps
from rora_theory.finetune.checkpoints import Checkpoints
from rora_theory.finetune.held_out import record_losses
from rora_theory.llama import LlamaConfig, load, model_digest
from rora_theory.llama.quantised import dense_params
from rora_theory.stats.paired import mean_per_token
from sims import finetune
from sims.common import cli


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return checkpoint.model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return checkpoint.records(tmp_path_factory.mktemp("data") / "train.json", 60)


def arguments(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    plain = "--rank 2 --alpha 4 --targets q_proj down_proj --batch-size 4 --epochs 6 --warmup 4 --lr 0.02"
    every = "--held-out 8 --evaluate-every 20 --checkpoint-every 3 --template clean --widths 1 --cutoff 400"
    return ["--model", str(model), "--data", str(data), "--out", str(out), *plain.split(), *every.split(), *more]


def on_one_device(words: list[str]) -> tuple[int, str, str]:
    """The command in the tests' own process, where it takes one of the eight host devices: a process of its own has
    one, and computes the same bits. Returns exit status, output and errors."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["finetune", *words])
        patch.setattr(sharding, "layout_over_all_devices", lambda *_, **__: (None, None))
        try:
            cli.run(finetune.main)
        except SystemExit as stop:
            return int(stop.code or 0), out.getvalue(), err.getvalue()
    return 0, out.getvalue(), err.getvalue()


def fails(words: list[str]) -> str:
    """The command's one line of error; its exit status is 2."""
    status, _, stderr = on_one_device(words)
    assert status == 2, stderr
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1, stderr
    return stderr


def losses(run: Path) -> list[tuple]:
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(event["event"], event["step"], event["loss"]) for event in events]


@pytest.fixture(scope="module")
def whole(model, data, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    status, stdout, stderr = on_one_device(arguments(model, data, out, "--merge"))
    assert (status, stderr) == (0, "")
    (out / "stdout").write_text(stdout)
    return out


@pytest.mark.slow
def test_a_run_leaves_its_metrics_its_adapter_and_a_merged_model(whole, model):
    found = losses(whole)
    assert [step for kind, step, _ in found if kind == "step"] == list(range(1, 79))
    assert [step for kind, step, _ in found if kind == "validation"] == [20, 40, 60, 78]
    steps = [loss for kind, _, loss in found if kind == "step"]
    assert np.mean(steps[-10:]) < 0.9 * np.mean(steps[:10])
    with (whole / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["event"], int(row["step"]), float(row["loss"])) for row in rows] == found
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["status"] == "complete"
    assert manifest["data"] | {"padding": 0} == {
        "records": 60, "trained_on": 52, "validated_on": 8, "truncated": 0, "skipped": 0, "steps_per_epoch": 13,
        "widths": manifest["data"]["widths"], "padding": 0,
    }  # fmt: skip
    assert manifest["best_loss"] == min(loss for kind, _, loss in found if kind == "validation")
    # 2 layers: q_proj is 16 x 16, down_proj 16 x 24, each with rank 2.
    assert manifest["trainable_parameters"] == 2 * 2 * ((16 + 16) + (16 + 24))
    base, merged = load(str(model)), load(str(whole / "merged"))
    adapter = load_peft(whole / "adapter", base.config, base.params)
    expected = merge(adapter, base.params)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), merged.params, expected)
    assert not np.array_equal(*(m["layers"]["mlp.down_proj"]["weight"] for m in (merged.params, base.params)))
    assert merged.tokenizer.encode("fox</s>") == base.tokenizer.encode("fox</s>")


@pytest.mark.slow
def test_a_base_in_blocks_is_trained_stopped_gone_on_with_and_merged(model, data, tmp_path, monkeypatch):
    """The numbers of a run that was not stopped; merged/ is its dense base with the adapter."""
    monkeypatch.setattr(checkpoint, "CONFIG", LlamaConfig(300, 32, 64, 2, 4, 2, 8, max_position_embeddings=512))
    wide = checkpoint.model(tmp_path / "wide")
    made, real, taken = [], steps.train_step, []

    def train_step(*given, **options):
        made.append(made[0] if made else real(*given, **options))

        def step(*state):
            taken.append(len(made))
            if taken[4:] == [2, 2, 2]:  # the second run's third step
                raise KeyboardInterrupt
            return made[0](*state)

        return step

    monkeypatch.setattr(steps, "train_step", train_step)
    close, closed = Checkpoints.close, []
    monkeypatch.setattr(Checkpoints, "close", lambda self: (closed.append(self.latest), close(self)))
    more = ["--steps", "4", "--checkpoint-every", "2", "--held-out", "0", "--quantization", "q4_0"]
    for name, expected in (("whole", 0), ("stopped", 130), ("stopped", 0)):
        words = arguments(wide, data, tmp_path / name, *more, *(["--merge"] if name == "whole" else []))
        status, _, stderr = on_one_device(words)
        assert status == expected, stderr
    assert closed == [4, 2, 4], "the checkpoint that was being written is there when the interrupted run has ended"
    assert taken == [1] * 4 + [2] * 3 + [3] * 2
    runs = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "stopped")]
    jax.tree.map(np.testing.assert_array_equal, *runs)
    manifest = json.loads((tmp_path / "whole" / "manifest.json").read_text())
    assert manifest["config"]["quantization"] == "q4_0"
    card = (tmp_path / "whole" / "adapter" / "README.md").read_text()
    assert "| quantization | the base's linear weights in q4_0 blocks, multiplied in float32 |" in card
    base, merged = load(wide, quantization="q4_0"), load(tmp_path / "whole" / "merged")
    adapter = load_peft(tmp_path / "whole" / "adapter", base.config, base.params)
    expected = merge(adapter, dense_params(base.params))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), merged.params, expected)
    assert manifest["trainable_share"] == share(adapter, expected)
    other = fails(arguments(wide, data, tmp_path / "whole", *more[:-1], "q8_0"))
    assert "quantization there 'q4_0', here 'q8_0'" in other
    assert "quantization" in fails(arguments(wide, data, tmp_path / "none", *more[:-1], "int4"))
    narrow = fails(arguments(model, data, tmp_path / "none", *more))
    assert re.search(r"quantization must be .* self_attn\.q_proj.* 16 inputs .* got 'q4_0'", narrow)


def in_this_process(monkeypatch, command: list[str]) -> None:
    """Eight host devices share a batch in the tests' own process."""
    monkeypatch.setattr(sys, "argv", ["finetune", *command, "--batch-size", "8", "--dropout", "0"])
    cli.run(finetune.main)


@pytest.mark.slow
def test_what_is_written_is_the_best_or_the_last(model, data, tmp_path, monkeypatch):
    """With validation losses that are made to grow after step 2, on top of what they are; and the schedule ends where
    the run does, at step 6 of 42."""
    factors, real = iter((9.0, 1.0, 2.0, 3.0, 4.0, 5.0)), steps.eval_step
    made = {}

    def growing(*arguments, **options):
        evaluate = real(*arguments, **options)
        return lambda *batch: (lambda total, count: (total * next(factors), count))(*evaluate(*batch))

    monkeypatch.setattr(steps, "eval_step", growing)
    out, base = tmp_path / "run", load(str(model))
    command = arguments(model, data, out, "--steps", "6", "--warmup", "1", "--evaluate-every", "1")
    held_out = split_records(read_records([str(data)]), 8, 42)[1]
    apart = tokenize(held_out, base.tokenizer, cutoff=400, template="clean", answer_only=True)
    for keep, step, factor in (("best", 2, 1.0), ("last", 6, 5.0)):
        in_this_process(monkeypatch, [*command, "--keep", keep])
        events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        found = {event["step"]: event["loss"] for event in events if event["event"] == "validation"}
        assert json.loads((out / "manifest.json").read_text())["best_step"] == 2
        adapter = load_peft(out / "adapter", base.config, base.params)
        losses = record_losses(base.params, base.config, apart, adapter=adapter)
        mean = mean_per_token([one.loss for one in losses], [one.tokens for one in losses]).value
        assert mean == pytest.approx(found[step] / factor, rel=1e-4)
        made[keep] = mean
    assert made["last"] < 0.99 * made["best"], "the adapters differ"
    rates = [event["learning_rate"] for event in events if event["event"] == "step"]
    assert rates == pytest.approx([0, 0.02, 0.016, 0.012, 0.008, 0.004], rel=1e-5)


@pytest.mark.slow
def test_the_curves_in_tensorboard_are_those_of_the_run(model, data, tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX", reason="the extra logging")
    in_this_process(monkeypatch, arguments(model, data, tmp_path / "run", "--steps", "2", "--log-to", "tensorboard"))
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    expected = {("train" if one["event"] == "step" else one["event"], one["step"]): one["loss"] for one in events}
    found = logged(tmp_path / "run" / "tensorboard")
    assert {(name, step): found[f"{name}/loss", step] for name, step in expected} == pytest.approx(expected, rel=1e-6)
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["config"].get("log_to") is None


@pytest.mark.slow
def test_the_seed_decides_the_start_and_the_order(model, data, tmp_path, monkeypatch):
    """The first update's rate is 0: what one step leaves is the initial adapter."""
    settings = {
        "rank": 2,
        "alpha": 4.0,
        "targets": ("q_proj", "down_proj"),
        "template": "clean",
        "widths": 1,
        "cutoff": 400,
    }
    config = FinetuneConfig(**settings, batch_size=8, epochs=6, seed=7)
    command = arguments(model, data, tmp_path / "run", "--steps", "1", "--held-out", "0", "--seed", "7")
    in_this_process(monkeypatch, command)
    base = load(str(model))
    saved = load_peft(tmp_path / "run" / "adapter", base.config, base.params)
    expected = init(jax.random.key(7), config.lora(), base.config, base.params)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), saved.params, expected.params)
    records = read_records([str(data)])
    config = dataclasses.replace(config, held_out=8)
    prepared = prepare(records, base.tokenizer, config)
    examples = tokenize(split_records(records, 8, 7)[0], base.tokenizer, cutoff=400, template="clean")
    own = Batches(examples, prepared.summary["widths"], batch_size=8, epochs=6, seed=7)
    for step in (0, 9):
        np.testing.assert_array_equal(prepared.train[step].inputs, own[step].inputs)
    assert len(prepared.train) == len(own)
    assert len(prepared.validation) == 1


@pytest.mark.slow
def test_manifest_and_adapter_say_which_weights_were_used(whole, model):
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["config"]["model_sha256"] == model_digest(model)
    entries = json.loads((whole / "adapter" / "adapter_config.json").read_text())
    assert (entries["base_model_name_or_path"], entries["revision"]) == (str(model), None)
    with safe_open(whole / "adapter" / "adapter_model.safetensors", "numpy") as file:
        assert file.metadata()["base_model_sha256"] == model_digest(model)


@pytest.mark.slow
def test_the_adapter_has_a_model_card(whole, model, data):
    """What was trained on what, how long and to which losses: all as the run's own files have it."""
    text = (whole / "adapter" / "README.md").read_text()
    said = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", text, re.MULTILINE))
    found = losses(whole)
    steps = [loss for kind, _, loss in found if kind == "step"]
    tested = {step: loss for kind, step, loss in found if kind == "validation"}
    best = min(tested, key=tested.__getitem__)
    assert said["training loss"] == (
        f"{steps[0]:.4f} nats per token on the batch of step 1, before any update; {np.mean(steps[-10:]):.4f}, "
        "the mean of the last 10 steps"
    )
    assert said["validation loss"] == (
        f"{tested[20]:.4f} at step 20 (first), {tested[best]:.4f} at step {best} (best), {tested[78]:.4f} at step 78 "
        "(last); nats per token over 8 held-out records"
    )
    assert said["records"] == f"60, SHA-256 `{records.records_digest(read_records([str(data)]))}`"
    assert (said["data"], said["trained on"]) == ("`train.json`", "52; held out for the validation loss: 8")
    assert said["horizon"] == f"78 steps of 4 records; adapter of step {best}"
    assert said["learning rate"] == "0.02 after 4 steps of warm-up, then linear decay to 0 after the last step"
    assert said["base model SHA-256"] == f"`{model_digest(model)}`"
    assert said["scaling gamma"] == "alpha / sqrt(r) = 2.82843 (`use_rslora` is true)"
    assert "adapter/README.md" not in json.loads((whole / "manifest.json").read_text())["files"], "free to be edited"


@pytest.mark.slow
def test_another_licence_is_written_to_the_cards_of_a_run_that_has_ended(model, data, tmp_path, monkeypatch):
    """Of the adapter and of the merged model; what its owner wrote into a card stays where no licence is given."""
    out = tmp_path / "run"
    command = [*arguments(model, data, out, "--merge", "--serve-as", "portable"), "--steps", "2", "--warmup", "1"]
    cards = [out / name / "README.md" for name in ("adapter", "merged")]
    in_this_process(monkeypatch, [*command, "--license", "mit"])
    texts = [card.read_text() for card in cards]
    assert all("\nlicense: mit\n" in text for text in texts)
    assert all("| training loss | " in text and "| rank r | 2 |" in text for text in texts)
    weights = (out / "merged" / "model.safetensors").stat().st_mtime_ns
    in_this_process(monkeypatch, [*command, "--license", "apache-2.0"])
    assert [card.read_text() for card in cards] == [
        text.replace("license: mit", "license: apache-2.0") for text in texts
    ]
    cards[0].write_text("my own words")
    for more in ([], ["--license", "apache-2.0"]):
        in_this_process(monkeypatch, [*command, *more])
        assert cards[0].read_text() == "my own words"
    assert (out / "merged" / "model.safetensors").stat().st_mtime_ns == weights


@pytest.mark.slow
def test_a_run_ends_with_its_figures_in_a_table(model, data, tmp_path, monkeypatch, capsys):
    """And as JSON, those of the run's own files."""
    out = tmp_path / "run"
    command = [*arguments(model, data, out), "--steps", "3", "--warmup", "1", "--evaluate-every", "1"]
    in_this_process(monkeypatch, command)
    lines = capsys.readouterr().out.splitlines()
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps, tested = ([one for one in events if one["event"] == kind] for kind in ("step", "validation"))
    best = min(tested, key=lambda one: one["loss"])
    speed = sorted(one["targets"] / one["seconds"] for one in steps)[1]
    expected = [
        ("training loss, first", 1, steps[0]["loss"]),
        ("training loss, mean of the last 3", 3, pytest.approx(np.mean([one["loss"] for one in steps]))),
        ("validation loss, first", 1, tested[0]["loss"]),
        ("validation loss, best", best["step"], best["loss"]),
        ("validation loss, last", 3, tested[2]["loss"]),
        ("tokens/s, median", None, speed),
        ("trainable parameters", None, 288),
    ]
    table = "\n".join(lines[lines.index("Key figures; losses in nats per token") :])
    assert re.search(rf"validation loss, best +{best['step']} +{best['loss']:.4f}\b", table)
    assert re.search(rf"tokens/s, median +{speed:,.0f}\n", table.replace(" \n", "\n"))
    assert re.search(r"trainable parameters +288\b", table)
    assert lines[-1].startswith("files in ") or table.index("files in ") > table.index("288")
    in_this_process(monkeypatch, [*command, "--json"])
    told = json.loads(capsys.readouterr().out)
    assert [tuple(row.values()) for row in told["tables"][-1]["rows"]] == expected


@pytest.mark.slow
def test_the_table_comes_before_the_training(whole):
    lines = (whole / "stdout").read_text().splitlines()
    down = next(i for i, line in enumerate(lines) if "mlp.down_proj" in line)
    first = next(i for i, line in enumerate(lines) if "validation loss" in line)
    assert down < first
    # rora: 4 / sqrt(2)
    assert lines[down].split() == ["mlp.down_proj", "0-1", "rora", "2", "4", "2.82843"]


@pytest.mark.slow
def test_killed_twice_it_ends_with_the_same_bits(whole, model, data, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "sims.finetune", *arguments(model, data, out)]
    for lines in (15, 50):
        process = subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.DEVNULL)
        while process.poll() is None and (not (out / "metrics.jsonl").exists() or len(losses_so_far(out)) < lines):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "killed in the middle"
        assert not (out / "adapter").exists()
    missing = tmp_path / "missing"
    shutil.copytree(out, missing)
    (missing / "metrics.jsonl").unlink()
    assert "missing/metrics.jsonl: has 0 of " in fails(arguments(model, data, missing))
    status, stdout, stderr = on_one_device(arguments(model, data, out))
    assert status == 0, stderr
    said = [line for line in stdout.splitlines() if line.startswith("resumes after step ")]
    assert len(said) == 1
    assert int(said[0].split()[3]) % 3 == 0, "a checkpoint's"
    assert losses(out) == losses(whole)
    adapters = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (out, whole)]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(array.tobytes() == adapters[1][name].tobytes() for name, array in adapters[0].items())


def losses_so_far(out: Path) -> list[str]:
    return (out / "metrics.jsonl").read_text().splitlines()


@pytest.mark.parametrize(
    ("step", "resumed", "said"),
    [
        (0, False, "starts at step 1"),
        (0, True, "no checkpoint yet: starts at step 1"),
        (6, True, "resumes after step 6 of 9, its last checkpoint"),
        (9, True, "all 9 steps are already done"),
    ],
)
def test_it_says_where_it_goes_on(step, resumed, said):
    assert finetune.resumption(step, 9, resumed=resumed) == said


@pytest.mark.slow
def test_a_second_process_in_the_folder_is_refused(whole, model, data, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    with (out / ".lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        message = fails(arguments(model, data, out))
    assert re.search(r"run: is in use by process \d+ on ", message)
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before


@pytest.mark.slow
def test_other_arguments_do_not_go_on_in_the_same_folder(whole, model, data):
    message = fails(arguments(model, data, whole, "--seed", "7"))
    assert f"{whole}: holds a run with other arguments (seed there 42, here 7)" in message


@pytest.mark.slow
def test_a_full_disk_is_one_line(model, data, tmp_path, monkeypatch):
    """From the first checkpoint on, no file may have more than 8,000 bytes."""
    save, limits = ocp.CheckpointManager.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(*given, **options):
        resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, limits[1]))
        return save(*given, **options)

    monkeypatch.setattr(ocp.CheckpointManager, "save", limited)
    try:
        message = fails(arguments(model, data, tmp_path / "run", "--rank", "16"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "run/checkpoints: cannot write a checkpoint (File too large)" in message


def bad_input(model, data, tmp_path) -> dict[str, tuple[list[str], str]]:
    empty, bad = tmp_path / "empty.json", tmp_path / "bad.json"
    empty.write_text("[]")
    bad.write_text('[{"instruction": "a", "output": "b"}, {"instruction": "a"}]')
    truncated = tmp_path / "truncated"
    truncated.mkdir()
    for file in model.iterdir():
        content = file.read_bytes()
        (truncated / file.name).write_bytes(content[:-100] if file.suffix == ".safetensors" else content)
    out = tmp_path / "run"
    return {
        "no data": (arguments(model, empty, out), "empty.json: has no records"),
        "bad record": (arguments(model, bad, out), "bad.json: record 1 has no 'output'"),
        "missing data": (arguments(model, tmp_path / "none.json", out), "none.json: no such file"),
        "too few records": (
            arguments(model, data, out, "--held-out", "60"),
            "held_out must be less than the number of records, 60, got 60",
        ),
        "missing model": (arguments(tmp_path / "nowhere", data, out), "nowhere"),
        "truncated weights": (arguments(truncated, data, out), "truncated"),
        "rank above width": (arguments(model, data, out, "--rank", "17"), "rank must be at most 16 at model.layers.0"),
        "pattern of nothing": (arguments(model, data, out, "--rank-pattern", "x_proj", "2"), "matches no adapted"),
        "unknown module": (arguments(model, data, out, "--targets", "w_proj"), "'w_proj', which matches no module"),
        "rate of zero": (arguments(model, data, out, "--lr", "0"), "lr must be a finite number above 0, got 0.0"),
        "parts of a batch": (
            arguments(model, data, out, "--accumulation", "3"),
            "accumulation must divide batch",
        ),
    }


def test_bad_input_is_refused_before_anything_is_written(model, data, tmp_path, capsys, monkeypatch):
    for name, (command, message) in bad_input(model, data, tmp_path).items():
        # Eight host devices share a batch in the tests' own process.
        monkeypatch.setattr(sys, "argv", ["finetune", *command, "--batch-size", "8"])
        with pytest.raises(SystemExit) as caught:
            cli.run(finetune.main)
        stderr = capsys.readouterr().err
        assert caught.value.code == 2, name
        assert message in stderr, name
        assert stderr.startswith("error: "), name
        assert stderr.count("\n") == 1, name
        assert not (tmp_path / "run").exists(), name


@pytest.mark.slow
def test_loss_curves_are_drawn_from_runs(whole, tmp_path, capsys):
    style.main(loss_curves.draw, loss_curves.Config((whole, whole), out=tmp_path))
    assert capsys.readouterr().out.split() == [str(tmp_path / f"loss_curves.{kind}") for kind in ("png", "svg")]
    drawn = (tmp_path / "loss_curves.svg").read_text()
    assert r"RoRA, $\alpha/\sqrt{r}$, r = 2, validation" in drawn
    assert (tmp_path / "loss_curves.png").stat().st_size > 10_000
    steps, means = loss_curves.running_mean(np.arange(1.0, 6.0), np.array([1.0, 2.0, 3.0, 4.0, 10.0]), 3)
    assert steps.tolist() == pytest.approx([2, 3, 4])
    assert means.tolist() == pytest.approx([2, 3, 17 / 3])


def test_figures_refuse_what_is_no_run(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        loss_curves.draw(loss_curves.Config((tmp_path,)))
    assert caught.value.code == 2
    assert "is not a run folder" in capsys.readouterr().err
