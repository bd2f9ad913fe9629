"""`python -m sims.finetune` on a tiny checkpoint: killed and resumed, merged, read back."""

import importlib.util
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from support import checkpoint, commands, drawings, tiny
from support.event_files import logged

from figures import loss_curves
from rora_theory.lab.adapters import load_peft, share
from rora_theory.lab.finetune import (
    FinetuneConfig,
    Metrics,
    read_records,
    run_report,
    split_records,
    tokenize,
)
from rora_theory.lab.finetune import step as steps
from rora_theory.lab.finetune.held_out import record_losses
from rora_theory.lab.finetune.loop import resumption
from rora_theory.lab.llama import load, model_digest
from rora_theory.lab.llama.quantised import dense_params
from rora_theory.stats.paired import mean_per_token
from sims import finetune

same_weights = partial(jax.tree.map, partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return checkpoint.records(tmp_path_factory.mktemp("data") / "train.json", 60)


def arguments(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    plain = "--rank 2 --alpha 4 --targets q_proj down_proj --batch-size 4 --epochs 6 --warmup 4 --lr 0.02"
    every = "--held-out 8 --evaluate-every 20 --checkpoint-every 7 --template clean --widths 1 --cutoff 400"
    return ["--model", str(model), "--data", str(data), "--out", str(out), *plain.split(), *every.split(), *more]


def train(words: list[str]) -> str:
    """Fine-tune as in a separate process with one device; return what is printed."""
    return commands.output(commands.run_on_one_device(finetune.main, *words))


def train_on_eight(words: list[str]) -> str:
    """Fine-tune on the eight host devices, which share a batch."""
    return commands.output(commands.run_command(finetune.main, *words, "--batch-size", "8", "--dropout", "0"))


def refused(words: list[str]) -> str:
    return commands.refusal(commands.run_on_one_device(finetune.main, *words))


def events(run: Path, kind: str | None = None) -> list[dict]:
    """Return the run's events of one kind, or of both."""
    recorded = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [event for event in recorded if kind in (None, event["event"])]


def losses(run: Path) -> list[tuple]:
    return [(event["event"], event["step"], event["loss"]) for event in events(run)]


def manifest_of(run: Path) -> dict:
    return json.loads((run / "manifest.json").read_text())


@pytest.fixture(scope="module")
def complete(model, data, tmp_path_factory) -> Path:
    """Return the folder of an uninterrupted run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    (out.parent / "printed").write_text(train(arguments(model, data, out, "--merge")))
    return out


@pytest.mark.slow
def test_a_run_writes_metrics_adapter_and_merged_model(complete, model):
    recorded = losses(complete)
    assert [step for kind, step, _ in recorded if kind == "step"] == list(range(1, 79))
    assert [step for kind, step, _ in recorded if kind == "validation"] == [20, 40, 60, 78]
    steps = [loss for kind, _, loss in recorded if kind == "step"]
    assert np.mean(steps[-10:]) < 0.9 * np.mean(steps[:10])
    rows = commands.rows(complete / "results.csv")
    assert [(row["event"], int(row["step"]), float(row["loss"])) for row in rows] == recorded
    manifest = manifest_of(complete)
    assert manifest["status"] == "complete"
    assert manifest["data"] | {"padding": 0} == {
        "records": 60, "trained_on": 52, "validated_on": 8, "truncated": 0, "skipped": 0, "steps_per_epoch": 13,
        "widths": manifest["data"]["widths"], "padding": 0,
    }  # fmt: skip
    assert manifest["best_loss"] == min(loss for kind, _, loss in recorded if kind == "validation")
    # 2 layers: q_proj is 16 x 16, down_proj 16 x 24, each with rank 2.
    assert manifest["trainable_parameters"] == 2 * 2 * ((16 + 16) + (16 + 24))
    base, merged = load(str(model)), load(str(complete / "merged"))
    same_weights(merged.params, load_peft(complete / "adapter", base.config).merge(base.params))
    assert not np.array_equal(*(m["layers"]["mlp.down_proj"]["weight"] for m in (merged.params, base.params)))
    assert merged.tokenizer.encode("fox</s>") == base.tokenizer.encode("fox</s>")


@pytest.mark.slow
def test_the_table_is_printed_before_training(complete):
    lines = (complete.parent / "printed").read_text().splitlines()
    down = next(i for i, line in enumerate(lines) if "mlp.down_proj" in line)
    assert down < next(i for i, line in enumerate(lines) if "validation loss" in line)
    # rora: 4 / sqrt(2)
    assert lines[down].split() == ["mlp.down_proj", "0-1", "rora", "2", "4", "2.82843"]


@pytest.mark.slow
def test_an_adapter_on_a_quantised_base_is_trained_and_merged(model, data, tmp_path, monkeypatch):
    """The folder merged/ has the dense base with the adapter."""
    monkeypatch.setattr(checkpoint, "CONFIG", tiny.WIDE)
    wide = checkpoint.model(tmp_path / "wide")
    more = ["--steps", "4", "--warmup", "2", "--held-out", "0", "--quantization", "q4_0"]
    train(arguments(wide, data, tmp_path / "whole", *more, "--merge"))
    manifest = manifest_of(tmp_path / "whole")
    assert manifest["config"]["quantization"] == "q4_0"
    base, merged = load(wide, quantization="q4_0"), load(tmp_path / "whole" / "merged")
    adapter = load_peft(tmp_path / "whole" / "adapter", base.config)
    expected = adapter.merge(dense_params(base.params))
    same_weights(merged.params, expected)
    assert manifest["trainable_share"] == share(adapter, expected)
    other = refused(arguments(wide, data, tmp_path / "whole", *more[:-1], "q8_0"))
    assert "quantization there 'q4_0', here 'q8_0'" in other
    assert "quantization" in refused(arguments(wide, data, tmp_path / "none", *more[:-1], "int4"))
    narrow = refused(arguments(model, data, tmp_path / "none", *more))
    assert re.search(r"quantization .* self_attn\.q_proj.* 16 inputs .* got 'q4_0'", narrow)


@pytest.mark.slow
def test_the_best_or_the_last_adapter_is_written(model, data, tmp_path, monkeypatch):
    """The validation losses are made to grow after step 2."""
    factors, eval_step = iter((9.0, 1.0, 2.0, 3.0, 4.0, 5.0)), steps.eval_step
    mean_losses = {}

    def growing(*arguments, **options):
        evaluate = eval_step(*arguments, **options)
        return lambda *batch: (lambda total, count: (total * next(factors), count))(*evaluate(*batch))

    monkeypatch.setattr(steps, "eval_step", growing)
    out, base = tmp_path / "run", load(str(model))
    options = "--steps 6 --warmup 1 --evaluate-every 1 --dropout 0"
    command = arguments(model, data, out, *options.split())
    held_out = split_records(read_records([str(data)]), 8, 42)[1]
    apart = tokenize(held_out, base.tokenizer, cutoff=400, template="clean", answer_only=True)
    for keep, step, factor in (("best", 2, 1.0), ("last", 6, 5.0)):
        train_on_eight([*command, "--keep", keep])
        recorded = {event["step"]: event["loss"] for event in events(out, "validation")}
        assert manifest_of(out)["best_step"] == 2
        adapter = load_peft(out / "adapter", base.config)
        losses = record_losses(base.params, base.config, apart, adapter=adapter)
        mean = mean_per_token([item.loss for item in losses], [item.tokens for item in losses]).value
        assert mean == pytest.approx(recorded[step] / factor, rel=1e-4)
        mean_losses[keep] = mean
    assert mean_losses["last"] < 0.99 * mean_losses["best"], "the adapters differ"


@pytest.fixture(scope="module")
def brief(model, data, tmp_path_factory) -> tuple[list[str], Path, str]:
    """Return the command, folder and output of a run of three steps, each with a validation loss."""
    out = tmp_path_factory.mktemp("brief") / "run"
    more = "--steps 3 --warmup 1 --evaluate-every 1 --merge --serve-as portable"
    if importlib.util.find_spec("tensorboardX"):
        more += " --log-to tensorboard"
    command = arguments(model, data, out, *more.split())
    return command, out, train_on_eight(command)


@pytest.mark.slow
def test_the_curves_in_tensorboard_are_those_of_the_run(brief):
    pytest.importorskip("tensorboardX", reason="the extra logging")
    _, out, _ = brief
    names = {"step": "train/loss", "validation": "validation/loss"}
    expected = {(names[event["event"]], event["step"]): event["loss"] for event in events(out)}
    recorded = logged(out / "tensorboard")
    assert {key: recorded[key] for key in expected} == pytest.approx(expected, rel=1e-6)
    assert manifest_of(out)["config"].get("log_to") is None


@pytest.mark.slow
def test_a_run_ends_with_a_table_of_its_key_figures(brief):
    """The JSON has the same figures, which are those of the run's own files."""
    command, out, printed = brief
    expected = {
        values[0]: values for values in (tuple(row.values()) for row in run_report.summary_rows(events(out), 288))
    }
    _, best_step, best_loss = expected["validation loss, best"]
    assert best_loss == min(event["loss"] for event in events(out, "validation"))
    lines = printed.splitlines()
    table = "\n".join(lines[lines.index("Key figures; losses in nats per token") :])
    assert re.search(rf"validation loss, best +{best_step} +{best_loss:.4f}\b", table)
    assert re.search(rf"tokens/s, median +{expected['tokens/s, median'][2]:,.0f}\n", table.replace(" \n", "\n"))
    assert re.search(r"trainable parameters +288\b", table)
    assert lines[-1].startswith("files in ") or table.index("files in ") > table.index("288")
    answered = json.loads(train_on_eight([*command, "--json"]))
    assert [tuple(row.values()) for row in answered["tables"][-1]["rows"]] == list(expected.values())


@pytest.mark.slow
def test_the_seed_determines_the_initial_adapter(model, data, tmp_path):
    """At a learning rate of 1e-30 one step leaves the initial adapter."""
    config = FinetuneConfig(rank=2, alpha=4.0, targets=("q_proj", "down_proj"))
    one_step = ["--steps", "1", "--warmup", "0", "--lr", "1e-30", "--held-out", "0", "--seed", "7"]
    train_on_eight(arguments(model, data, tmp_path / "run", *one_step))
    base = load(str(model))
    saved = load_peft(tmp_path / "run" / "adapter", base.config)
    expected = config.adapter().build(jax.random.key(7), base.config, base.params)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-20), saved.params, expected.params)


@pytest.mark.slow
def test_the_manifest_and_the_adapter_name_the_weights(complete, model):
    manifest, digest = manifest_of(complete), model_digest(model)
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= set(manifest["outputs"])
    assert manifest["config"]["model_sha256"] == digest
    entries = json.loads((complete / "adapter" / "adapter_config.json").read_text())
    assert (entries["base_model_name_or_path"], entries["revision"]) == (str(model), None)
    with safe_open(complete / "adapter" / "adapter_model.safetensors", "numpy") as file:
        assert file.metadata()["base_model_sha256"] == digest


@pytest.mark.slow
def test_serve_as_decides_which_entries_the_adapter_has(brief):
    """A finished run writes the adapter again in the format that the command asks for; clients read fewer entries."""
    command, out, _ = brief

    def entries(serve_as: str) -> dict[str, object]:
        train_on_eight([serve_as if word == "portable" else word for word in command])
        return json.loads((out / "adapter" / "adapter_config.json").read_text())

    portable, peft = entries("portable"), entries("peft")
    assert portable.keys() < peft.keys()
    assert (portable["use_rslora"], peft["use_rslora"]) == (False, True)
    assert {"rank_pattern", "alpha_pattern", "layers_to_transform"} <= peft.keys() - portable.keys()


@pytest.mark.slow
def test_killed_and_interrupted_it_ends_with_the_same_bits(complete, model, data, tmp_path, monkeypatch):
    """The run is killed by SIGKILL after some steps, resumed, interrupted at step 50, and resumed again."""
    out, metrics = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    command = [sys.executable, "-m", "sims.finetune", *arguments(model, data, out)]
    process = subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.DEVNULL)
    while process.poll() is None and (not metrics.exists() or metrics.read_text().count("\n") < 15):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "killed in the middle"
    assert not (out / "adapter").exists()
    add = Metrics.add

    def stop_at_50(self, event):
        if event.step == 50:
            raise KeyboardInterrupt
        add(self, event)

    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "add", stop_at_50)
        assert commands.run_on_one_device(finetune.main, *arguments(model, data, out)).status == 130
    printed = train(arguments(model, data, out))
    (step,) = re.findall(r"(?m)^resumes after step (\d+) ", printed)
    assert int(step) % 7 == 0, "the step of a checkpoint"
    assert losses(out) == losses(complete)
    adapters = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (out, complete)]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(array.tobytes() == adapters[1][name].tobytes() for name, array in adapters[0].items())


def test_the_resumed_step_is_printed():
    messages = {
        (0, False): "starts at step 1",
        (0, True): "no checkpoint yet: starts at step 1",
        (6, True): "resumes after step 6 of 9, its last checkpoint",
        (9, True): "all 9 steps are already done",
    }
    assert {(step, resumed): resumption(step, 9, resumed=resumed) for step, resumed in messages} == messages


@pytest.mark.slow
def test_a_full_disk_is_one_line(model, data, tmp_path, monkeypatch):
    """From the first checkpoint on, no file may have more than 8,000 bytes."""
    save, limits = ocp.CheckpointManager.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(*positional, **options):
        resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, limits[1]))
        return save(*positional, **options)

    monkeypatch.setattr(ocp.CheckpointManager, "save", limited)
    try:
        message = refused(arguments(model, data, tmp_path / "run", "--rank", "16"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "run/checkpoints: cannot write a checkpoint (File too large)" in message


@pytest.mark.slow
def test_loss_curves_are_drawn_from_a_run(complete):
    assert r"RoRA, $\alpha/\sqrt{r}$, r = 2, validation" in drawings.words(loss_curves, complete)["loss_curves"]
    steps, means = loss_curves.running_mean(np.arange(1.0, 6.0), np.array([1.0, 2.0, 3.0, 4.0, 10.0]), 3)
    assert steps.tolist() == pytest.approx([2, 3, 4])
    assert means.tolist() == pytest.approx([2, 3, 17 / 3])
