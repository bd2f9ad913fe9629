"""The seeds that are told apart, and those of streams by name."""

import hashlib
import numbers

from rora_theory.errors import InputError

COUNT = 2**32
"""How many: `jax.random.key` takes 32 bits of a seed, so that 2^32 is 0 and -1 is 2^32 - 1."""


def check_seed(value: int, name: str = "seed") -> None:
    """Raise `InputError` unless ``value`` is an integer from 0 to 2^32 - 1."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not 0 <= value < COUNT:
        raise InputError(f"{name} is {value!r}; accepted is an integer from 0 to 2^32 - 1")


def of_name(name: str) -> int:
    """The seed of the stream of draws with this name: the first four bytes of its SHA-256, from 0 to 2^32 - 1.

    Examples:
      >>> of_name("layer 0") == of_name("layer 0") != of_name("layer 1")
      True
    """
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
