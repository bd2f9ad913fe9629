"""The schedules of learning rates: those of transformers, on the host and in a compiled step."""

import jax
import numpy as np
import pytest

from rora_theory.errors import InputError
from rora_theory.optimizers import SCHEDULES, schedule_factor


@pytest.mark.usefixtures("unchecked")
def test_schedules_are_those_of_transformers() -> None:
    assert schedule_factor("linear", np.arange(6), steps=6, warmup=2) == pytest.approx([0, 0.5, 1, 0.75, 0.5, 0.25])
    assert schedule_factor("constant", np.arange(4), steps=4, warmup=1).tolist() == [0, 1, 1, 1]
    cosine = schedule_factor("cosine", np.arange(10), steps=10, warmup=2)
    expected = [0.0, 0.5, *((1 + np.cos(np.pi * share)) / 2 for share in np.arange(8) / 8)]
    np.testing.assert_allclose(cosine, expected, rtol=1e-12)
    assert schedule_factor("linear", 7, steps=6) == 0, "after the last step"
    with pytest.raises(InputError, match=r"schedule .*exponential"):
        schedule_factor("exponential", 1, steps=6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_compiled_step_has_the_same_rate(schedule) -> None:
    compiled = jax.jit(lambda step: schedule_factor(schedule, step, steps=10, warmup=3))
    host = schedule_factor(schedule, np.arange(10), steps=10, warmup=3)
    np.testing.assert_allclose([float(compiled(step)) for step in range(10)], host, atol=1e-6)
