"""The example of the first page runs as printed, from the question to a trained adapter, on a tiny model and chats."""

import ast
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from sims import __main__ as main
from sims.common import cli

PAGE = (Path(__file__).parents[2] / "docs" / "index.md").read_text()
SHELL, PYTHON = (re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)[0] for kind in ("bash", "python"))


def test_it_is_ten_lines() -> None:
    imports = [node for node in ast.parse(PYTHON).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    lines = [line for line in PYTHON.splitlines() if line]
    assert len(lines) - len(imports) == 10
    assert len(SHELL.splitlines()) == 2


def test_the_first_answer(monkeypatch, capsys) -> None:
    words = shlex.split(SHELL.splitlines()[1])
    monkeypatch.setattr(cli, "PROGRAM", None)
    for options, answer in (
        ([], "keep lora_alpha=32 without use_rslora and the learning rate 0.0002"),
        (["--rule", "rslora"], "the same adapter as lora_alpha=11.3137 with use_rslora"),
    ):
        monkeypatch.setattr(sys, "argv", [*words, *options])
        monkeypatch.delitem(sys.modules, "sims.transfer", raising=False)
        main.main()
        assert answer in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of transformers and peft
def test_measured_checked_and_trained(tmp_path, monkeypatch, capsys) -> None:
    """The model learns to stop without a padding token; the collator's tests have other tokenizers."""
    for package in ("torch", "peft", "transformers", "accelerate"):
        pytest.importorskip(package, reason="the bridge: the extra torch")
    from support import torch_chats, torch_models

    tokenizer = torch_chats.tokenizer(None)
    tokenizer.save_pretrained(tmp_path / "base")
    torch_models.model("qwen2").save_pretrained(tmp_path / "base")
    lines = []
    for i in range(48):
        question, reply = f"{'abcdefghij'[i % 10]} words", "do" * (1 + i % 3)
        chat = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        lines.append(json.dumps({"messages": chat}) + "\n")
    (tmp_path / "chats.jsonl").write_text("".join(lines))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    assert "2000" in PYTHON
    exec(PYTHON.replace("2000", "240"), names)  # the shortest run with a probe
    printed = capsys.readouterr()
    # The trainer and libraries print lines of their own.
    lines = printed.out.splitlines()
    starts = ("In the first step", "The first steps of the whole model", "Train 240 steps at learning rate")
    measured, checked, _ = (next(line for line in lines if line.startswith(start)) for start in starts)
    assert "the signal term dominates above rank" in measured
    assert "(Adam, kaiming_uniform, held-out tokens" in measured
    assert "14 modules" in measured
    assert "ranks 16 to 128, steps up to 2, 3 draws)" in checked
    assert "at ranks 16, 32 and 128" in names["check"].scope
    assert "AdamW at 0.0002," in names["check"].scope
    assert "not accepted" not in printed.out + printed.err
    assert "Measuring 14 modules (two forward passes" in printed.err
    trained = json.loads(next((tmp_path / "tuned").glob("checkpoint-*/adapter_config.json")).read_text())
    assert (trained["r"], trained["use_rslora"], trained["lora_alpha"]) == (128, False, pytest.approx(32))
    assert next((tmp_path / "tuned").glob("checkpoint-*/adapter_model.safetensors")).stat().st_size > 0
    assert names["tuned"].config.lora_alpha == pytest.approx(32)
    labels = names["collate"](names["chats"][:8])["labels"]
    end = tokenizer.convert_tokens_to_ids("</s>")
    assert (labels == end).sum(1).tolist() == [1] * 8
    assert (labels != -100).sum(1).tolist() == [3 + 2 * (i % 3) for i in range(8)]
