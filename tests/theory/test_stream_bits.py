"""Batches, devices and interruptions change no bit of a sampler's stream, in programs that are optimised."""

import jax
import numpy as np
import pytest
from support.streams import take

from rora_theory.theory import sampling
from rora_theory.theory.laws import Optimizer
from rora_theory.theory.sampling import RandomStep

pytestmark = pytest.mark.usefixtures("optimised")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampler", "optimizer"),
    [("direct", "sgd"), ("direct", "adam"), ("pairs", "sgd"), ("pairs", "adam"), ("chi_square", "sgd")],
)
def test_batch_devices_and_start_change_no_bit(sampler: sampling.Sampler, optimizer: Optimizer) -> None:
    """One block after the other on the first device, against two at once on another, and from the third block on.

    That several devices take turns is `test_sampling`'s, and the command's with --devices 2.
    """
    setting = RandomStep(rank=100, p_in=64, p_out=3, overlap=0.2, optimizer=optimizer)
    size = sampling.block_draws(setting, sampler)
    one = take(setting, sampler, 6 * size)
    np.testing.assert_array_equal(one, take(setting, sampler, 6 * size, batch=2, devices=jax.devices()[1:2]))
    np.testing.assert_array_equal(one[:, 2 * size :], take(setting, sampler, 4 * size, first_block=2))
