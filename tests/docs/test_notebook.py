"""The notebook's cells run in order on a tiny random model, and its saved outputs belong to the current cells."""

import base64
import json
import re
from pathlib import Path
from typing import Any

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

from rora_theory.advice.best_rate import Run  # noqa: E402
from rora_theory.measure.tuning.prior import rate_prior  # noqa: E402

PATH = Path(__file__).parents[2] / "docs" / "notebooks" / "tune.ipynb"
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
    tuned = names["tuned"]
    assert tuned.config.r == 64
    assert tuned.low < tuned.learning_rate < tuned.high
    assert names["optimizer"].state_dict()["state"][0]["step"] == names["STEPS"] == 64
    wordings = [{chat["messages"][1]["content"] for chat in names[name]} for name in ("train", "held_out", "test")]
    assert [len(messages) for messages in wordings] == [320, 16, 24]
    assert not set.intersection(*wordings)
    # The run on SmolLM2 has outputs of the same kinds.
    for before, now in zip(saved, execute_notebook.code_cells(notebook), strict=True):
        assert [output["output_type"] for output in before] == [output["output_type"] for output in now["outputs"]]


def test_its_saved_outputs_are_those_of_the_present_advice_and_prior(notebook) -> None:
    """What does not need the model's weights is computed again: the advice, and the rate before the probe."""
    cells = list(execute_notebook.code_cells(notebook))
    texts = ["".join("".join(output.get("text", ())) for output in cell["outputs"]) for cell in cells]
    advice_cell, tuned_cell = (
        next(i for i, cell in enumerate(cells) if call in "".join(cell["source"])) for call in (" transfer(", " tune(")
    )
    names: dict[str, Any] = {}
    exec("".join(cells[advice_cell]["source"]), names)
    assert texts[advice_cell] == names["advice"].answer() + "\n"
    planned = Run(64, 32.0, names["STEPS"], "cosine", names["BATCH_SIZE"])
    parameters = int(re.search(r"([\d,]+) parameters", texts[0])[1].replace(",", "")) / 1e9
    low, best, high = rate_prior(planned, parameters=parameters).rates
    assert f"Before the probe the rate was {best:.3g} (90% range {low:.2g} to {high:.2g})" in texts[tuned_cell]


def test_it_ends_on_a_better_accuracy(notebook) -> None:
    """The saved run of the model answers more messages right after training than before."""
    (*_, last) = execute_notebook.code_cells(notebook)
    text = "".join(last["outputs"][0]["text"])
    before, after = map(int, re.search(r"before training: (\d+)%, after: (\d+)%", text).groups())
    assert after >= before + 25


def test_it_is_short_and_has_the_outputs_of_a_run(notebook) -> None:
    assert len(notebook["cells"]) <= MAX_CELLS
    assert PATH.stat().st_size < MAX_BYTES
    cells = list(execute_notebook.code_cells(notebook))
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert all(cell["outputs"] for cell in cells)


def test_its_page_has_prose_code_and_outputs(notebook) -> None:
    page, images = hooks.notebook_page(notebook, "tune")
    figures = [
        output for cell in execute_notebook.code_cells(notebook) for output in cell["outputs"] if "data" in output
    ]
    assert len(images) == len(figures) == 1
    for name, content in images.items():
        assert f"]({name})" in page
        assert content.startswith(b"\x89PNG")
    assert images["tune-1.png"] == base64.b64decode(figures[0]["data"]["image/png"])
    for cell in notebook["cells"]:
        assert "".join(cell["source"]).strip() in page
        for output in cell.get("outputs", ()):
            assert "".join(output.get("text", ())).strip() in page
