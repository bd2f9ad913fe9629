"""The first page's way from the question to a trained adapter runs as it stands: ten lines, a tiny model and chats."""

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
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_it_is_ten_lines() -> None:
    imports = [each for each in ast.parse(PYTHON).body if isinstance(each, (ast.Import, ast.ImportFrom))]
    lines = [line for line in (SHELL + PYTHON).splitlines() if line]
    assert len(lines) - len(imports) == 10


def test_the_first_answer(monkeypatch, capsys) -> None:
    program, *words = shlex.split(SHELL.splitlines()[1])
    monkeypatch.setattr(cli, "PROGRAM", None)
    monkeypatch.setattr(sys, "argv", [program, *words])
    monkeypatch.delitem(sys.modules, "sims.transfer", raising=False)
    main.main()
    said = " ".join(capsys.readouterr().out.split())
    assert "keep alpha 32 under alpha / r, without use_rslora, and keep the learning rate 0.0002" in said
    monkeypatch.setattr(sys, "argv", [program, *words, "--rule", "rslora"])
    monkeypatch.delitem(sys.modules, "sims.transfer", raising=False)
    main.main()
    assert "the same adapter as alpha 11.3137 with use_rslora" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of transformers and peft
def test_measured_checked_and_trained(tmp_path, monkeypatch, capsys) -> None:
    transformers = pytest.importorskip("transformers", reason="the bridge: the extra torch")
    for package in ("torch", "peft", "accelerate"):
        pytest.importorskip(package, reason="the bridge: the extra torch")
    import tokenizers
    from support import torch_models

    vocabulary = {letter: i for i, letter in enumerate(["~", "</s>", "<user>", "<assistant>", *"abcdefghij wordsx?"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="x"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="~", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "my-model")
    torch_models.model("qwen2").save_pretrained(tmp_path / "my-model")
    rows = [
        [
            {"role": "user", "content": f"{'abcdefghij'[i % 10]} words"},
            {"role": "assistant", "content": "do" * (1 + i % 3)},
        ]
        for i in range(20)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(PYTHON, names)
    said = capsys.readouterr().out
    assert said.startswith("The signal leads above rank ")
    assert "(Adam, kaiming_uniform, held-out tokens): the median of 14 modules" in said
    assert "What a step changes of the whole model: " in said
    assert "at ranks 16, 32 and 128" in said
    trained = json.loads(next((tmp_path / "tuned").glob("checkpoint-*/adapter_config.json")).read_text())
    assert (trained["r"], trained["use_rslora"], trained["lora_alpha"]) == (128, False, pytest.approx(32))
    assert next((tmp_path / "tuned").glob("checkpoint-*/adapter_model.safetensors")).stat().st_size > 0
    assert names["to_rank"](128).learning_rate == 2e-4
