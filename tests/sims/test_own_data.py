"""A user's own data: chats through the model's template, with only the assistant's tokens in the loss."""

import json
import re
import shutil
from pathlib import Path

import pytest
from support import chat_templates, checkpoint, commands

from rora_theory.lab import llama
from rora_theory.lab.data.formats import Chat
from rora_theory.lab.finetune import tokenize
from rora_theory.lab.finetune.held_out import record_losses
from rora_theory.lab.llama import load
from sims import coordinate_check, finetune, regime

CHATS = [
    [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": word}] * (1 + i % 2)
    for i, word in enumerate(checkpoint.WORDS[:6])
]
SMALL = "--held-out 0 --batch-size 6 --steps 1 --warmup 0 --rank 2 --targets q_proj --cutoff 400 --widths 1"
OTHER_TEMPLATE = "holds a run with other arguments (chat_template_sha256"


@pytest.fixture(scope="module")
def chat_model(model, tmp_path_factory) -> Path:
    """Return the tiny model with a chat template added."""
    folder = Path(shutil.copytree(model, tmp_path_factory.mktemp("model") / "hf"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = chat_templates.LLAMA3
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    return path


def fine_tune(model: Path, data: Path, *words: object) -> commands.Ended:
    return commands.run_on_one_device(finetune.main, "--model", model, "--data", data, SMALL, *words)


def shown_prompts(printed: str) -> list[str]:
    """Return the prompts that a command has printed; what it printed after them belongs to the last."""
    return re.split(r"prompt \d+ of \d+: .*\n", printed)[1:]


@pytest.mark.slow
def test_fine_tuning_on_chats(chat_model, chats, tmp_path) -> None:
    """The first step's loss is the mean over exactly the assistant's turns."""
    ended = fine_tune(chat_model, chats, "--out", tmp_path, "--loss-on", "answer", "--show", "2")
    printed = commands.output(ended)
    summary = "records: 6 as messages (detected from the first record's keys; format selects another); template chat"
    assert summary in " ".join(printed.split())

    base = load(str(chat_model))
    examples = tokenize([Chat(tuple(chat)) for chat in CHATS], base.tokenizer, cutoff=400, answer_only=True)
    losses = record_losses(base.params, base.config, examples)
    (step,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    targets = sum(record.answer_tokens for record in losses)
    assert step["loss"] == pytest.approx(sum(record.answer_loss for record in losses) / targets, rel=1e-5)
    assert step["targets"] == targets
    assert targets == sum(len(f"{message['content']}<|eot_id|>") for chat in CHATS for message in chat[1::2])

    learned = [int(examples.target_mask(index).sum()) for index in range(2)]
    for index in range(2):
        head = f"prompt {index + 1} of 6: {examples.lengths[index]} tokens, {learned[index]} in the loss"
        assert printed.count(head) == 1
    _, prompt = shown_prompts(printed)
    assert prompt.count("⟦") == prompt.count(f"⟦{CHATS[1][1]['content']}<|eot_id|>⟧") == 2
    config = json.loads((tmp_path / "manifest.json").read_text())["config"]
    assert config["template"] == "chat"
    assert "chat_template_sha256" in config


@pytest.mark.slow
def test_the_template_is_part_of_the_run(model, chats, tmp_path) -> None:
    """A model without a template is refused with the choices; another template is another run."""
    out = ("--out", tmp_path / "run")
    refusal = commands.refusal(fine_tune(model, chats, *out))
    assert "the model has no chat template. Pass --chat-template FILE (a Jinja file)" in refusal
    assert not (tmp_path / "run").exists()
    refusal = commands.refusal(fine_tune(model, chats, *out, "--template", "clean"))
    assert re.search(r"chats\.jsonl: record 2: turns .* got user, assistant, user", refusal)
    commands.output(fine_tune(model, chats, *out, "--chat-template", "chatml"))
    (tmp_path / "other.jinja").write_text(chat_templates.GEMMA)
    other = fine_tune(model, chats, *out, "--chat-template", tmp_path / "other.jinja")
    assert OTHER_TEMPLATE in commands.refusal(other)


def test_a_chat_that_its_template_refuses_is_named(model, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(llama, "load", lambda *_, **__: pytest.fail("weights are read before the records"))
    template, data = tmp_path / "gemma.jinja", tmp_path / "x.json"
    template.write_text(chat_templates.GEMMA)
    rows = [{"messages": CHATS[0]}, {"messages": [{"role": "system", "content": "Be brief."}, *CHATS[0]]}]
    data.write_text(json.dumps(rows))
    refusal = commands.refusal(fine_tune(model, data, "--chat-template", template))
    assert refusal.startswith(f"error: {data}: record 2: {template}: the chat template rejects the chat")
    assert "no system role" in refusal


COMMANDS = {
    regime: "--layers 0 --rows 0 --no-mask --loss-on answer",
    coordinate_check: "--ranks 2 4 --seeds 0 1 --steps 1 --no-controls --rules rora --optimizers sgd --cutoff 400 "
    "--reference-rank 2",
}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.NAME)
def test_measurements_on_chats(command, chat_model, model, chats, tmp_path) -> None:
    """Chats need the model's template; another template is another run."""
    small = f"{COMMANDS[command]} --batch-size 2 --held-out 2 --targets q_proj --show 1"
    words = [small, "--data", chats, "--out", tmp_path / "run"]
    ended = commands.run_command(command.main, *words, "--model", model)
    assert "the model has no chat template. Pass" in commands.refusal(ended)
    printed = commands.output(commands.run_command(command.main, *words, "--model", chat_model))
    assert "6 as messages" in " ".join(printed.split())
    assert "template chat" in " ".join(printed.split())
    (prompt,) = shown_prompts(printed)
    turns = prompt.count("<|start_header_id|>assistant")
    assert turns >= 1
    assert prompt.count("⟦") == (turns if command is regime else 1), "the answers alone, or all"
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["config"]["template"] == "chat"
    other = commands.run_command(command.main, *words, "--model", chat_model, "--chat-template", "chatml")
    assert OTHER_TEMPLATE in commands.refusal(other)
