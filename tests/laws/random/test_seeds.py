"""Seeds are the integers that JAX's keys distinguish; `tests/test_bad_input.py` tests that commands refuse others."""

import jax
import numpy as np
import pytest

from rora_theory import InputError
from rora_theory.laws.random.seeds import SEED_COUNT, check_seed


def key_data(seed) -> list[int]:
    return jax.random.key_data(jax.random.key(seed)).tolist()


def test_accepted_seeds_give_different_keys() -> None:
    assert len({tuple(key_data(seed)) for seed in (0, 1, 2**32 - 2, 2**32 - 1)}) == 4
    assert SEED_COUNT == 2**32
    for seed in (0, 1, 2**32 - 1):
        check_seed("seed", seed)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("kind", [np.int64, np.uint64])
def test_a_seed_of_numpy_is_the_seed_of_its_value(kind) -> None:
    for seed in (0, 3, 2**32 - 1):
        check_seed("seed", kind(seed))
        assert key_data(seed) == key_data(kind(seed))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("seed", [True, 1.0, "1", None, -1, 2**32, np.uint64(2**32)])
def test_other_values_are_refused(seed) -> None:
    with pytest.raises(InputError, match=r"^seed .*got "):
        check_seed("seed", seed)
