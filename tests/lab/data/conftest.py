"""Fixtures of the data tests."""

import pytest

from rora_theory.lab.data import limited_process


@pytest.fixture
def no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the work of a limited child process in this process; `test_limits` tests the child itself."""
    monkeypatch.setattr(limited_process, "run", lambda function, *arguments, **_: list(function(*arguments)))
