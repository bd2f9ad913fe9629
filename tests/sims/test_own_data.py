"""Data of a user's own: chats through the model's template, the assistant's tokens alone in the loss."""

import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from support import chat_templates, checkpoint

from rora_theory import llama
from rora_theory.data.formats import Chat
from rora_theory.finetune import sharding, tokenize
from rora_theory.finetune.held_out import record_losses
from rora_theory.llama import load
from rora_theory.measure.record_batches import PairConfig, make_batch_pair
from sims import coordinate_check, finetune, regime
from sims.common import cli

CHATS = [
    [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": word}] * (1 + i % 2)
    for i, word in enumerate(checkpoint.WORDS[:6])
]
SMALL = [
    "--held-out",
    "0",
    "--batch-size",
    "6",
    "--steps",
    "1",
    "--warmup",
    "0",
    "--rank",
    "2",
    "--targets",
    "q_proj",
    "--cutoff",
    "400",
    "--widths",
    "1",
]


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """A model without a chat template."""
    return checkpoint.model(tmp_path_factory.mktemp("bare"))


@pytest.fixture(scope="module")
def model(bare, tmp_path_factory) -> Path:
    """The same with one."""
    folder = tmp_path_factory.mktemp("model") / "hf"
    shutil.copytree(bare, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = chat_templates.LLAMA3
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    return path


def run(main: Callable[[], None], *words: object) -> tuple[int, str, str]:
    """Exit status, output and errors of a command on one device."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["command", *map(str, words)])
        patch.setattr(sharding, "layout_over_all_devices", lambda *_, **__: (None, None))
        try:
            cli.run(main)
        except SystemExit as stop:
            return int(stop.code or 0), out.getvalue(), err.getvalue()
    return 0, out.getvalue(), err.getvalue()


@pytest.mark.slow
def test_fine_tuning_on_chats(model, data, tmp_path) -> None:
    """The first step's loss is the mean over every turn of the assistant's and nothing else."""
    words = ["--model", model, "--data", data, *SMALL, "--out", tmp_path, "--loss-on", "answer", "--show", "2"]
    status, said, errors = run(finetune.main, *words)
    assert (status, errors) == (0, "")
    flat = " ".join(said.split())
    assert (
        "records: 6 as messages (detected from the first record's keys; --format selects another); template chat"
        in flat
    )
    assert said.count("prompt 1 of 6: ") == said.count("prompt 2 of 6: ") == 1

    base = load(str(model))
    examples = tokenize([Chat(tuple(chat)) for chat in CHATS], base.tokenizer, cutoff=400, answer_only=True)
    losses = record_losses(base.params, base.config, examples)
    mean = sum(one.answer_loss for one in losses) / sum(one.answer_tokens for one in losses)
    (step,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert step["loss"] == pytest.approx(mean, rel=1e-5)
    assert (
        step["targets"]
        == sum(one.answer_tokens for one in losses)
        == sum(len(f"{message['content']}<|eot_id|>") for chat in CHATS for message in chat[1::2])
    )

    kept = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert [len(one["tokens"]) for one in kept] == examples.lengths[:3].tolist()
    assert kept[0]["text"] in said
    assert kept[1]["text"].count("⟦") == 2
    assert kept[1]["text"].count(f"⟦{CHATS[1][1]['content']}<|eot_id|>⟧") == 2
    config = json.loads((tmp_path / "manifest.json").read_text())["config"]
    assert config["template"] == "chat"
    assert "chat_template_sha256" in config


@pytest.mark.slow
def test_the_template_is_part_of_the_run(bare, data, tmp_path) -> None:
    """A model without one is told what to choose; another template is another run."""
    words = ["--data", data, *SMALL, "--out", tmp_path / "run"]
    status, _, errors = run(finetune.main, "--model", bare, *words)
    assert status == 2
    assert errors.count("\n") == 1
    assert "the model has no chat template. Pass --chat-template FILE (a Jinja file)" in errors
    assert not (tmp_path / "run").exists()
    status, _, errors = run(finetune.main, "--model", bare, *words, "--template", "clean")
    assert (
        "chats.jsonl: line 2: turns must be user, assistant in every template but chat, got user, assistant, user"
        in errors
    )
    assert run(finetune.main, "--model", bare, *words, "--chat-template", "chatml")[0] == 0
    (tmp_path / "other.jinja").write_text(chat_templates.GEMMA)
    status, _, errors = run(finetune.main, "--model", bare, *words, "--chat-template", tmp_path / "other.jinja")
    assert status == 2
    assert "holds a run with other arguments (chat_template_sha256" in errors


def no_weights(*_: object, **__: object) -> None:
    raise AssertionError("weights are read before the records are known to be good")


def test_a_chat_that_its_template_refuses_is_named(bare, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(llama, "load", no_weights)
    (tmp_path / "gemma.jinja").write_text(chat_templates.GEMMA)
    rows = [{"messages": CHATS[0]}, {"messages": [{"role": "system", "content": "Be brief."}, *CHATS[0]]}]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    words = ["--model", bare, "--data", tmp_path / "x.json", *SMALL, "--chat-template", tmp_path / "gemma.jinja"]
    status, _, errors = run(finetune.main, *words)
    assert status == 2
    assert errors.startswith(
        f"error: {tmp_path}/x.json: record 1: {tmp_path}/gemma.jinja: the chat template rejects the chat"
    )
    assert "no system role" in errors
    assert errors.count("\n") == 1
    (tmp_path / "x.json").write_text(json.dumps([rows[1], rows[0], *[rows[1]] * 13]))
    words += ["--loss-on", "answer"]
    regime_main = lambda: regime.run(cli.parse(regime.Config, description=""))  # noqa: E731
    shared = ["--model", bare, "--data", tmp_path / "x.json", "--chat-template", tmp_path / "gemma.jinja"]
    commands = ((finetune.main, words, 15), (regime_main, [*shared, "--batch-size", "14", "--held-out", "1"], 14))
    for main, given, total in commands:
        status, _, errors = run(main, *given)
        assert (status, errors.count("\n")) == (2, 1)
        bad = int(re.search(rf"error: (\d+) of {total} records", errors)[1])
        assert total - bad in (0, 1)
        assert [f"({number}) {tmp_path}/x.json: record " in errors for number in (1, 10, 11)] == [True, True, False]


@pytest.mark.slow
def test_the_regime_of_chats(model, data, tmp_path) -> None:
    """It is read on the chats as the model reads them; another template is another run."""
    words = ["--data", data, "--batch-size", "2", "--held-out", "2", "--layers", "0", "--targets", "q_proj"]
    words += ["--rows", "0", "--loss-on", "answer", "--model", model, "--no-mask"]
    main = lambda: regime.run(cli.parse(regime.Config, description=""))  # noqa: E731
    status, said, errors = run(main, *words, "--out", tmp_path / "run", "--show", "1")
    assert (status, errors) == (0, "")
    assert "6 as messages" in " ".join(said.split())
    assert said.count("⟦") == said.count("⟧") >= 2
    base = load(str(model))
    expected = make_batch_pair(
        PairConfig(2, 2, loss_on="answer"), [Chat(tuple(chat)) for chat in CHATS], base.tokenizer, seed=0
    )
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    counts = (expected.examples.target_counts, expected.examples.lengths)
    kept = [json.loads(line) for line in (tmp_path / "run" / "prompts.jsonl").read_text().splitlines()]
    assert [[sum(one["in_loss"]) for one in kept], [len(one["tokens"]) for one in kept]] == [c.tolist() for c in counts]
    losses = record_losses(base.params, base.config, expected.examples)
    mean = sum(one.answer_loss for one in losses) / sum(one.answer_tokens for one in losses)
    assert manifest["training_loss"] == pytest.approx(mean, rel=1e-5)
    assert manifest["config"]["template"] == "chat"
    status, _, errors = run(main, *words, "--out", tmp_path / "run", "--chat-template", "chatml")
    assert status == 2
    assert "holds a run with other arguments (chat_template_sha256" in errors


@pytest.mark.slow
def test_the_coordinate_check_on_chats(model, bare, data, tmp_path) -> None:
    words = ["--data", data, "--batch-size", "2", "--held-out", "2", "--targets", "q_proj", "--ranks", "2", "4"]
    words += ["--seeds", "0", "1", "--steps", "1", "--no-controls", "--rules", "rora", "--optimizers", "sgd"]
    words += ["--cutoff", "400", "--show", "1", "--out", tmp_path / "run", "--reference-rank", "2"]
    status, _, errors = run(coordinate_check.main, *words, "--model", bare)
    assert status == 2
    assert "the model has no chat template. Pass" in errors
    status, said, errors = run(coordinate_check.main, *words, "--model", model)
    assert (status, errors) == (0, "")
    assert "template chat" in " ".join(said.split())
    assert said.count("<|start_header_id|>user") >= 1
    assert len((tmp_path / "run" / "prompts.jsonl").read_text().splitlines()) == 3
