"""The seeds that are told apart."""

import numbers

from rora_theory.errors import InputError

COUNT = 2**32
"""How many: `jax.random.key` takes 32 bits of a seed, so that 2^32 is 0 and -1 is 2^32 - 1."""


def check_seed(value: int, name: str = "seed") -> None:
    """Raise `InputError` unless ``value`` is an integer from 0 to 2^32 - 1."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not 0 <= value < COUNT:
        raise InputError(f"{name} is {value!r}; accepted is an integer from 0 to 2^32 - 1")
