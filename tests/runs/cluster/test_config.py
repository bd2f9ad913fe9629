"""Options that are refused before any work starts, with and without Ray."""

import sys
from pathlib import Path

import pytest
from support import squares

from rora_theory.errors import InputError
from rora_theory.runs.cells import in_process
from rora_theory.runs.cluster import ClusterConfig, leave


def test_a_single_process_does_not_need_ray(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert ClusterConfig().runner() is in_process
    for options in ({"workers": 2}, {"address": "127.0.0.1:1"}):
        with pytest.raises(InputError, match=r"--workers and --address .* pip install 'rora-theory\[cluster\]'"):
            ClusterConfig(**options).runner()
    leave()  # nothing to leave


def test_no_cluster_at_the_address(tmp_path, capsys) -> None:
    """The command prints one line before the run folder is made."""
    pytest.importorskip("ray", reason="the extra cluster (Ray) is not installed")
    with pytest.raises(SystemExit) as stop:
        squares.main(str(tmp_path / "out"), str(tmp_path), "--address", "127.0.0.1:1")
    assert stop.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: --address 127.0.0.1:1: nothing answers there (Connection refused). Pass HOST:PORT")
    assert errors.count("\n") == 1
    assert not Path(tmp_path / "out").exists()
