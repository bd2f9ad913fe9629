"""Examples in docstrings are true."""

import doctest

import pytest

from rora_theory import scaling, statistics
from rora_theory.commonsense import answers


@pytest.mark.parametrize("module", [scaling, statistics, answers])
def test_examples(module: object) -> None:
    failed, tried = doctest.testmod(module)  # type: ignore[arg-type]
    assert tried
    assert not failed
