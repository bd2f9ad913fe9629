"""The tiny model's weights."""

from typing import Any

import pytest
from support import tiny


@pytest.fixture(scope="session")
def params() -> Any:
    return tiny.params()
