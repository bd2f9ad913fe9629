"""Tiny random models, drawn as in the golden script."""

import jax.numpy as jnp
import make_llama
import numpy as np
import pytest

from rora_theory.lab.llama import LlamaConfig
from rora_theory.lab.llama.weights import build_params, expected_shapes


@pytest.fixture(scope="session")
def draw_params():
    """Return ``draw_params(config, dtype=float32)``, which draws the tree of random weights."""

    def make(config: LlamaConfig, dtype=jnp.float32):
        def read(names: list[str], out: np.ndarray) -> None:
            for i, name in enumerate(names):
                out[i] = make_llama.draw(name, out[i].shape)

        return build_params(config, dtype, read)

    return make


@pytest.fixture(scope="session")
def draw_tensors():
    """Return ``draw_tensors(config)``, which draws the same weights by Hugging Face's names, as in a checkpoint."""
    return lambda config: {name: make_llama.draw(name, shape) for name, shape in expected_shapes(config).items()}


@pytest.fixture(scope="session")
def tiny() -> LlamaConfig:
    """Return an untied configuration with grouped queries.

    All sizes differ, so that a transposed axis fails, and epsilon matters.
    """
    return LlamaConfig(48, 32, 40, 2, 6, 3, 8, rms_norm_eps=0.01, max_position_embeddings=256)
