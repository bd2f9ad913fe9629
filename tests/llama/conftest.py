"""Tiny random models, drawn as the golden script draws them."""

import jax.numpy as jnp
import make_llama
import numpy as np
import pytest

from rora_theory.llama import LlamaConfig
from rora_theory.llama.weights import build_params, expected_shapes


@pytest.fixture(scope="session")
def draw_params():
    """``draw_params(config, dtype=float32)``: the tree of random weights."""

    def make(config: LlamaConfig, dtype=jnp.float32):
        def read(names: list[str], out: np.ndarray) -> None:
            for i, name in enumerate(names):
                out[i] = make_llama.draw(name, out[i].shape)

        return build_params(config, dtype, read)

    return make


@pytest.fixture(scope="session")
def draw_tensors():
    """``draw_tensors(config)``: the same weights by Hugging Face's names, as in a checkpoint."""
    return lambda config: {name: make_llama.draw(name, shape) for name, shape in expected_shapes(config).items()}


@pytest.fixture(scope="session")
def tiny() -> LlamaConfig:
    """Grouped queries, untied; no two sizes alike, so that no transposed axis passes, and an epsilon that shows."""
    return LlamaConfig(48, 32, 40, 2, 6, 3, 8, rms_norm_eps=0.01, max_position_embeddings=256)
