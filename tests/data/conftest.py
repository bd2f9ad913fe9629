"""Shared by the tests of data."""

import pytest

from rora_theory.data import limited_process


@pytest.fixture
def no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do in this process what a child process with limits does: `test_limits` tests that the child does the same."""
    monkeypatch.setattr(limited_process, "run", lambda function, *arguments, **_: list(function(*arguments)))
