"""The notebook's cells run in order on a tiny random model, and its saved outputs belong to the current cells."""

import base64
import json
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

PATH = Path(__file__).parents[2] / "docs" / "notebooks" / "tune.ipynb"
MAX_CELLS = 12
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
    assert tuned.config.r == 128
    assert tuned.low < tuned.learning_rate < tuned.high
    assert names["optimizer"].state_dict()["state"][0]["step"] == names["STEPS"] == 256
    # The run on SmolLM2 has outputs of the same kinds.
    for before, now in zip(saved, execute_notebook.code_cells(notebook), strict=True):
        assert [output["output_type"] for output in before] == [output["output_type"] for output in now["outputs"]]


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
    assert len(images) == len(figures) == 2
    for name, content in images.items():
        assert f"]({name})" in page
        assert content.startswith(b"\x89PNG")
    assert images["tune-1.png"] == base64.b64decode(figures[0]["data"]["image/png"])
    for cell in notebook["cells"]:
        assert "".join(cell["source"]).strip() in page
        for output in cell.get("outputs", ()):
            assert "".join(output.get("text", ())).strip() in page
