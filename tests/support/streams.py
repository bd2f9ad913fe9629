"""The first draws of a sampler's stream."""

import jax
import numpy as np

from rora_theory.laws import sampling
from rora_theory.laws.sampling import RandomStep


def take(setting: RandomStep, sampler: sampling.Sampler, count: int, seed: int = 0, **options: object) -> np.ndarray:
    blocks, drawn_count = [], 0
    for block in sampling.stream(setting, sampler, jax.random.key(seed), **options):  # type: ignore[arg-type]
        blocks.append(block)
        drawn_count += block.shape[1]
        if drawn_count >= count:
            return np.concatenate(blocks, axis=1)[:, :count]
    raise AssertionError("a stream has no end")
