"""The tests' own run-time checks: a wrong type or shape is detected in arguments and results."""

import jaxtyping
import numpy as np
import pytest
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import Float
from support.checker import checker, jaxtyped

from rora_theory import optimizers
from rora_theory.laws.sampling import StreamMoments
from rora_theory.paper import equations


@jaxtyped(typechecker=checker)
def times(value: float, factor: complex = 0.5) -> float:
    return value * factor


@jaxtyped(typechecker=checker)
def first(values: Float[np.ndarray, "n m"], other: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    return values[:, 0] if len(other) > 1 else other.astype(int)


def test_types_are_checked_without_array_annotations() -> None:
    assert times(3) == 1.5
    for wrong in (lambda: times("3"), lambda: times(np.ones(2))):
        with pytest.raises(BeartypeCallHintViolation):
            wrong()
    with pytest.raises(BeartypeCallHintViolation):
        times(2.0, 1j)  # what is returned


def test_shapes_are_checked_across_arguments_and_the_result() -> None:
    assert first(np.ones((2, 3)), np.ones(2)).shape == (2,)
    for wrong in ((np.ones((2, 3)), np.ones(3)), (np.ones(2), np.ones(2)), (np.ones((1, 3)), np.ones(1))):
        with pytest.raises(jaxtyping.TypeCheckError):
            first(*wrong)


def test_the_package_is_checked() -> None:
    """The checks cover functions, methods, class methods and the fields of a dataclass."""
    with pytest.raises(jaxtyping.TypeCheckError):
        equations.eq10_norm(np.ones(4), np.eye(2, 3), np.ones(2), np.ones(3), 1.0, 0.5)
    for wrong in (
        lambda: optimizers.schedule_factor("constant", 1, steps="4"),
        lambda: StreamMoments.from_json([1]),
        lambda: StreamMoments(1, 2),
    ):
        with pytest.raises(BeartypeCallHintViolation):
            wrong()


@pytest.mark.usefixtures("unchecked")
def test_checks_are_off_for_users() -> None:
    assert times("ab", 2) == "abab"
