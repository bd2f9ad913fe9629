"""Batches, devices and interruptions change no bit of a sampler's stream, and its estimates are the law's.

In programs that are optimised: as users' are, and because many draws are taken.
"""

import json

import jax
import numpy as np
import pytest
from support.streams import take

from rora_theory import laws
from rora_theory.laws import sampling
from rora_theory.laws.sampling import RandomStep
from rora_theory.optimizers import Optimizer
from rora_theory.stats.moments import threshold

pytestmark = pytest.mark.usefixtures("optimised")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampler", "optimizer"),
    [("direct", "adam"), ("pairs", "sgd"), ("chi_square", "sgd")],
)
def test_batch_devices_and_start_change_no_bit(sampler: sampling.Sampler, optimizer: Optimizer) -> None:
    """One block at a time on the first device gives the same as two at once on another, and as a later start.

    That several devices take turns is `test_sampling`'s, and the command's with --devices 2.
    """
    setting = RandomStep(rank=20, p_in=64, p_out=3, overlap=0.2, optimizer=optimizer)
    size = sampling.block_draws(setting, sampler)
    expected = take(setting, sampler, 4 * size)
    np.testing.assert_array_equal(expected, take(setting, sampler, 4 * size, batch=2, devices=jax.devices()[1:2]))
    np.testing.assert_array_equal(expected[:, 2 * size :], take(setting, sampler, 2 * size, first_block=2))
    assert not np.any(expected[0, :size] == expected[0, size : 2 * size]), "blocks differ"


@pytest.mark.slow
def test_no_pair_is_drawn_twice() -> None:
    """Independent inputs have E[w^4] = (3 + 6 / r) E[w^2]^2; repeating eight pairs would give (3 + 6 / 8).

    |x| and |x'| of a layer this wide are constants; false alarm 1e-6.
    """
    rank = 96
    draws = take(RandomStep(rank=rank, p_in=10**6), "pairs", 100_000)[0]
    blocks = (draws / draws.std()).reshape(100, -1) ** 4
    kurtosis, error = blocks.mean(), blocks.mean(axis=1).std(ddof=1) / 10
    assert abs(kurtosis - (3 + 6 / rank)) < threshold(1e-6) * error < 0.4


@pytest.mark.slow
def test_draws_until_the_error_is_reached() -> None:
    setting = RandomStep(rank=4, p_in=256, overlap=0.3)
    for target in (0.03, 0.008):
        sums = sampling.estimate_moments(setting, "chi_square", jax.random.key(2), relative_error=target)
        second = sums.first.second_moment
        assert second.error <= target * second.value
        law = laws.random_input_moments(rank=4, p_in=256, overlap=0.3, scaling=1.0).second_moment[0]
        assert abs(second.value - law) <= threshold(1e-6, 2) * second.error
    assert sampling.StreamMoments.from_json(json.loads(json.dumps(sums.to_json()))) == sums, "stored without loss"
    assert sampling.estimate_moments(setting, "chi_square", jax.random.key(2), draws=777).count == 777
