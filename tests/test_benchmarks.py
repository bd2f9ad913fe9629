"""Every benchmark runs as a script, ``python benchmarks/NAME.py``."""

import runpy
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[1] / "benchmarks").glob("*.py"))
MODULES = {"hardware", "law_regrets", "lm_eval_peer", "realistic_faults", "sweep_folders"}
"""Imported by the scripts."""

WORKERS = {"finetune_peer", "gpu_ours", "gpu_peer"}
"""Started by the scripts, with a JSON object as their argument."""

PEERS = {"peft", "torch", "transformers"}


@pytest.mark.parametrize("path", [path for path in SCRIPTS if path.stem not in MODULES | WORKERS], ids=lambda p: p.stem)
def test_a_benchmark_runs_as_a_script(path: Path, monkeypatch, capsys) -> None:
    """It prints its help with only its own folder on the path, without the repository's."""
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])
    monkeypatch.setitem(sys.modules, "benchmarks", None)
    try:
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(path), run_name="__main__")
    except ModuleNotFoundError as error:
        if error.name not in PEERS:
            raise
        pytest.skip(f"needs {error.name}: the extra torch")
    assert not stop.value.code
    assert capsys.readouterr().out.startswith("usage: ")


def test_the_files_that_are_mutated_and_their_tests_exist() -> None:
    """A module that is renamed would otherwise be left out of the count until somebody runs it."""
    root = Path(__file__).parents[1]
    modules = runpy.run_path(str(root / "benchmarks" / "mutation.py"))["MODULES"]
    files = [name for path, tests in modules.values() for name in (path, *tests.split())]
    assert [name for name in files if not (root / name).is_file()] == []
