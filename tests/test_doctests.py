"""Examples in docstrings give the stated results, in every module of every package."""

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
from support import checkpoint

import figures
import rora_theory
import sims

PACKAGES = (rora_theory, sims, figures)
MODULES = sorted(
    module.name for package in PACKAGES for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    if name.startswith("rora_theory.measure."):
        for package in ("torch", "transformers", "peft"):
            pytest.importorskip(package, reason="the bridge to PyTorch: the extra torch")
    module = importlib.import_module(name)
    written = sum(line.lstrip().startswith(">>> ") for line in inspect.getsource(module).splitlines())
    tests = doctest.DocTestFinder().find(module)
    # A wrapper that hides a function from doctest must not hide its example.
    assert sum(len(test.examples) for test in tests) == written
    runner = doctest.DocTestRunner()
    for test in tests:
        runner.run(test)
    assert not runner.failures


def test_examples_stand_in_sections_that_the_site_renders_as_code() -> None:
    """Google's section is ``Examples:``. The site renders any other as a quotation, and lists in it as links."""
    sources = [path for package in PACKAGES for path in Path(package.__path__[0]).rglob("*.py")]
    assert len(sources) >= len(MODULES)
    for path in sources:
        source = path.read_text()
        assert not re.findall(r"^\s*Example:.*", source, flags=re.M), path
        assert "Examples:\n" in source or ">>> " not in source, path


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")  # as a user has it, who passes a wrong name
@pytest.mark.filterwarnings("ignore::rora_theory.measure.regimes.thin.ThinWarning")  # its measurements are tiny
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of PEFT, which reads deprecated attributes of transformers
def test_the_page_of_examples(tmp_path: Path) -> None:
    for package in ("torch", "transformers", "peft"):
        pytest.importorskip(package, reason="the measurement: the extra torch")
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


def test_the_lines_of_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)
    assert blocks
    for block in blocks:
        exec(block, {})
    assert "lora_alpha=32" in capsys.readouterr().out
