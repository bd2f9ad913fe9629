"""The reference: ruff checks the docstrings of every module that it renders."""

import importlib
import inspect
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RENDERED = [
    name
    for page in sorted((ROOT / "docs" / "reference").glob("*.md"))
    for name in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE)
]


def test_every_argument_is_described_in_the_modules_of_the_reference():
    for package in ("torch", "transformers", "peft"):
        pytest.importorskip(package, reason="the modules of the measurement: the extra torch")
    ignores = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]["per-file-ignores"]
    (pattern,) = (pattern for pattern, rules in ignores.items() if rules == ["D417"])
    checked = set(pattern.removeprefix("!rora_theory/{").removesuffix("}.py").split(","))
    assert len(RENDERED) > 50
    assert {_module_of(name).removeprefix("rora_theory.").replace(".", "/") for name in RENDERED} <= checked


def _module_of(name: str) -> str:
    """Return the module that defines a name of the reference, which may be a module itself."""
    try:
        return importlib.import_module(name).__name__
    except ModuleNotFoundError:
        package, _, attribute = name.rpartition(".")
        return inspect.getmodule(getattr(importlib.import_module(package), attribute)).__name__
