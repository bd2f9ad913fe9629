"""Validate seeds, and derive the seeds of named streams."""

import hashlib
from typing import Any

from rora_theory.scaling import check_integer

SEED_COUNT = 2**32
"""Number of distinct seeds. `jax.random.key` uses 32 bits of a seed: 2^32 equals 0, and -1 equals 2^32 - 1."""


def check_seed(name: str, value: Any) -> None:
    """Raise `InputError` unless a value is an integer from 0 to 2^32 - 1."""
    check_integer(name, value, minimum=0, maximum=SEED_COUNT - 1)


def seed_from_name(name: str) -> int:
    """Return the seed of a named stream: the first four bytes of the name's SHA-256, from 0 to 2^32 - 1.

    Examples:
      >>> seed_from_name("layer 0") == seed_from_name("layer 0") != seed_from_name("layer 1")
      True
    """
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
