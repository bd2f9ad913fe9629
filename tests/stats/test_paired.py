"""Means with errors over shared records, against a jackknife, manual arithmetic and sampling."""

import math

import numpy as np
import pytest

from rora_theory.errors import InputError
from rora_theory.stats.estimate import Estimate
from rora_theory.stats.paired import mean_of_groups, mean_per_token, mean_per_token_over_seeds


def test_the_mean_s_error_is_the_jackknife_s() -> None:
    """The first-order error of a ratio differs from the jackknife's by a part in the record count."""
    random = np.random.default_rng(0)
    tokens = random.integers(20, 60, 400)
    losses = tokens * random.normal(1.0, 0.1, 400)
    estimate = mean_per_token(losses.tolist(), tokens.tolist())
    left = (losses.sum() - losses) / (tokens.sum() - tokens)
    assert estimate.value == pytest.approx(losses.sum() / tokens.sum(), rel=1e-12)
    assert estimate.error == pytest.approx(np.sqrt(399 * left.var()), rel=5e-3)
    assert (estimate.n, estimate.over) == (400, "records")


def test_one_record_has_no_error() -> None:
    estimate = mean_per_token([3.0], [2])
    assert (estimate.value, estimate.n, estimate.over, estimate.has_error) == (1.5, 1, "", False)
    assert math.isnan(estimate.error)
    assert mean_per_token([1.0, 3.0], [1, 1]) == Estimate(2.0, 1.0, 2, "records")


def test_seeds_are_averaged_before_the_error_over_records() -> None:
    """Values of -1 and +1 on one record have no error over records; over seeds it is the deviation of -1/60 and 1/60
    by sqrt 2.
    """
    losses = np.array([[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    by_record, by_seed = mean_per_token_over_seeds(losses, [10, 20, 30])
    assert by_record == Estimate(0.0, 0.0, 3, "records")
    assert (by_seed.value, by_seed.error, by_seed.n) == (0.0, pytest.approx(1 / 60, rel=1e-12), 2)
    by_record, by_seed = mean_per_token_over_seeds(losses[:1], [10, 20, 30])
    assert by_record == mean_per_token([-1.0, 0.0, 0.0], [10, 20, 30])
    assert not by_seed.has_error


def test_groups_have_equal_weight_whatever_their_size() -> None:
    """Means are 0 and -1/2, variances 2/3 of four items and 1/2 of two; a second seed halves an item that differs."""
    groups = [np.array([[0, 1, 0, -1]]), np.array([[-1, 0]])]
    estimate = mean_of_groups(groups)
    assert (estimate.value, estimate.n, estimate.over) == (-0.25, 6, "items")
    assert estimate.error == pytest.approx(math.sqrt((2 / 3) / 4 + (1 / 2) / 2) / 2, rel=1e-12)
    estimate = mean_of_groups([np.array([[2, 0, 4], [0, 0, 0]])])
    assert (estimate.value, estimate.n) == (1.0, 3)
    assert estimate.error == pytest.approx(np.std([1, 0, 2], ddof=1) / math.sqrt(3), rel=1e-12)


def test_a_group_of_one_item_has_no_error() -> None:
    estimate = mean_of_groups([np.array([[0, 1]]), np.array([[1]])])
    assert (estimate.value, estimate.n, estimate.over, estimate.has_error) == (0.75, 3, "", False)
    assert math.isnan(estimate.error)


@pytest.mark.parametrize(
    ("losses", "tokens"), [([], []), ([1.0], [0]), ([1.0], []), ([1.0, 2.0], [3]), ([1.0, 2.0], [-3, 3])]
)
def test_a_mean_of_no_tokens_is_refused(losses, tokens) -> None:
    with pytest.raises(InputError, match=f"losses and tokens.* {len(losses)} losses and {len(tokens)} records"):
        mean_per_token(losses, tokens)
