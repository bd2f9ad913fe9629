"""Outputs of a run: which are written, in which format, and again after another choice."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rora_theory.lab.finetune import outputs
from rora_theory.lab.finetune.outputs import ADAPTER, MERGED, OutputConfig, write_outputs
from rora_theory.runs.folder import RunFolder


@pytest.mark.usefixtures("unchecked")
def test_the_format_and_the_merged_model_are_those_of_the_options(tmp_path, monkeypatch) -> None:
    written: list[tuple[str, Any]] = []

    def save(path: Path, kind: Any) -> None:
        written.append((path.name, kind))
        path.mkdir()
        (path / "weights").write_text(str(kind))

    monkeypatch.setattr(outputs.adapters, "save_peft", lambda path, *_, portable, **__: save(path, portable))
    monkeypatch.setattr(outputs.adapters, "save_merged", lambda path, *_, **__: save(path, "merged"))
    folder = RunFolder.open("finetune", {"rank": 2}, out=tmp_path / "run")
    adapter = SimpleNamespace(config=SimpleNamespace(replaces_weights=False))

    def write(**options: Any) -> list[tuple[str, Any]]:
        written.clear()
        write_outputs(folder, OutputConfig(**options), adapter, SimpleNamespace(origin=None), SimpleNamespace())
        return list(written)

    assert write() == [(ADAPTER, False)]
    assert write() == [], "they exist"
    assert write(merge=True) == [(MERGED, "merged")]
    assert write(serve_as="portable") == [(ADAPTER, True)]
    assert not (folder.path / MERGED).exists()
    assert write(serve_as="portable", keep="last", merge=True) == [(ADAPTER, True), (MERGED, "merged")]
    assert write(keep="last") == [(ADAPTER, False)]
