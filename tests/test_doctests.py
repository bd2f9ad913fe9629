"""Examples in docstrings are true, in every module of every package."""

import doctest
import importlib
import importlib.util
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
from support import checkpoint

import figures
import rora_theory
import sims

MODULES = sorted(
    module.name
    for package in (rora_theory, sims, figures)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    if name.startswith("rora_theory.measure.torch."):
        for package in ("torch", "transformers", "peft"):
            pytest.importorskip(package, reason="the bridge to PyTorch: the extra torch")
    module = importlib.import_module(name)
    written = sum(line.lstrip().startswith(">>> ") for line in inspect.getsource(module).splitlines())
    found = sum(len(test.examples) for test in doctest.DocTestFinder().find(module))
    assert found == written  # a wrapper that hides a function from doctest does not hide its example
    failed, _ = doctest.testmod(module)
    assert not failed


@pytest.mark.parametrize("name", MODULES)
def test_examples_stand_in_sections_that_the_site_renders_as_code(name: str) -> None:
    """Google's section is ``Examples:``. The site makes a quotation of any other and links of the lists in it."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).read_text()
    assert not re.findall(r"^\s*Example:.*", source, flags=re.M)
    assert "Examples:\n" in source or ">>> " not in source


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")  # as a user has it, who passes a wrong name
@pytest.mark.filterwarnings("ignore::rora_theory.measure.regimes.thin.ThinWarning")  # its measurements are tiny
def test_the_page_of_examples(tmp_path: Path) -> None:
    page = Path(__file__).parents[1] / "docs" / "examples.md"
    checkpoint.questions(tmp_path, "boolq", ("true", "false"))
    names = {
        "MODEL": str(checkpoint.model(tmp_path / "model")),
        "RECORDS": str(checkpoint.records(tmp_path / "records.json", 40)),
        "QUESTIONS": str(tmp_path),
        "OUT": str(tmp_path),
    }
    failed, tried = doctest.testfile(str(page), module_relative=False, globs=names)
    assert tried > 10
    assert not failed


@pytest.mark.parametrize("page", ["README.md"])
def test_the_lines_that_a_newcomer_copies(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[1] / page).read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)
    assert blocks
    for block in blocks:
        exec(block, {})
    assert "keep lora_alpha=32 and the learning rate 0.0002" in capsys.readouterr().out
