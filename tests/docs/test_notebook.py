"""The notebook's cells run in order on a tiny random model, and its saved outputs belong to the current cells."""

import base64
import json
import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the bridge: the extra torch")
pytest.importorskip("peft", reason="the bridge: the extra torch")
pytest.importorskip("transformers", reason="the bridge: the extra torch")
pytest.importorskip("tokenizers", reason="the extra finetune")
for package in ("mkdocs", "mathjax"):
    pytest.importorskip(package, reason="the extra docs")

import execute_notebook  # noqa: E402
import hooks  # noqa: E402
from support import torch_chats, torch_models  # noqa: E402

from rora_theory import Setting, transfer  # noqa: E402
from rora_theory.advice.best_rate import Run  # noqa: E402
from rora_theory.evidence.rate_prior import expected_rate  # noqa: E402

PATH = Path(__file__).parents[2] / "docs" / "notebooks" / "three-rates.ipynb"
MAX_CELLS = 14
MAX_BYTES = 400_000


@pytest.fixture
def notebook():
    return json.loads(PATH.read_text())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of transformers and peft
def test_all_cells_run(notebook, tmp_path, monkeypatch) -> None:
    torch_chats.tokenizer("~").save_pretrained(tmp_path)
    torch_models.model("llama").save_pretrained(tmp_path)
    monkeypatch.setenv("RORA_NOTEBOOK_MODEL", str(tmp_path))
    saved = [cell["outputs"] for cell in execute_notebook.code_cells(notebook)]
    names = execute_notebook.execute(notebook)
    tuned, losses = names["tuned"], names["losses"]
    assert tuple(losses) == tuned.belief.three_rates
    assert len(set(losses.values())) == 3
    assert losses[names["best_rate"]] == min(losses.values())
    assert names["advice"].setting.rank == 128
    wordings = [{chat["messages"][1]["content"] for chat in names[name]} for name in ("train", "held_out", "test")]
    assert [len(messages) for messages in wordings] == [320, 24, 24]
    assert not set.intersection(*wordings)
    # The run on SmolLM2 has outputs of the same kinds.
    for before, now in zip(saved, execute_notebook.code_cells(notebook), strict=True):
        assert [output["output_type"] for output in before] == [output["output_type"] for output in now["outputs"]]


def outputs(notebook) -> list[str]:
    """Return what each code cell printed when the notebook was run."""
    cells = execute_notebook.code_cells(notebook)
    return ["".join("".join(output.get("text", ())) for output in cell["outputs"]) for cell in cells]


def test_its_saved_outputs_are_those_of_the_present_advice_and_prior(notebook) -> None:
    """What does not need the model's weights is computed again: the rate for nothing, and the advice for the best."""
    loaded, _, rate, trained, kept, advised = outputs(notebook)
    parameters = int(re.search(r"([\d,]+) parameters", loaded)[1].replace(",", "")) / 1e9
    expected = expected_rate(Run(16, 32.0, 32, "cosine", 4), config=None, parameters=parameters)
    assert rate == expected.sentence() + "\n"
    losses = dict(re.findall(r"learning rate (\S+): held-out loss (\S+)", trained))
    by_rate = dict(zip(losses, expected.belief.three_rates, strict=True))
    assert list(losses) == [f"{rate:.3g}" for rate in by_rate.values()]
    best = min(losses, key=lambda rate: float(losses[rate]))
    assert kept.startswith(f"Kept: learning rate {best}.")
    advice = transfer(Setting(rank=16, alpha=32, learning_rate=by_rate[best]), rank=128)
    assert advised.startswith(advice.answer() + "\n")


def test_it_ends_on_a_better_accuracy(notebook) -> None:
    """The saved run of the model answers more messages right after training than before."""
    kept = outputs(notebook)[-2]
    before, after = map(int, re.search(r"before training: (\d+)%, after: (\d+)%", kept).groups())
    assert after >= before + 25


def test_it_is_short_and_has_the_outputs_of_a_run(notebook) -> None:
    assert len(notebook["cells"]) <= MAX_CELLS
    assert PATH.stat().st_size < MAX_BYTES
    cells = list(execute_notebook.code_cells(notebook))
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert all(cell["outputs"] for cell in cells)


def test_its_page_has_prose_code_and_outputs(notebook) -> None:
    page, images = hooks.notebook_page(notebook, "three-rates")
    figures = [
        output for cell in execute_notebook.code_cells(notebook) for output in cell["outputs"] if "data" in output
    ]
    assert len(images) == len(figures) == 1
    for name, content in images.items():
        assert f"]({name})" in page
        assert content.startswith(b"\x89PNG")
    assert images["three-rates-1.png"] == base64.b64decode(figures[0]["data"]["image/png"])
    for cell in notebook["cells"]:
        assert "".join(cell["source"]).strip() in page
        for output in cell.get("outputs", ()):
            assert "".join(output.get("text", ())).strip() in page
