"""Tiny random models, drawn as the golden script draws them."""

import json
from pathlib import Path

import jax.numpy as jnp
import make_llama
import numpy as np
import pytest

from rora_theory.llama import LlamaConfig
from rora_theory.llama.weights import build_params, expected_shapes

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="session")
def draw_params():
    """``draw_params(config, dtype=float32, seed=0)``: the tree of random weights."""

    def make(config: LlamaConfig, dtype=jnp.float32, seed: int = 0):
        def read(names: list[str], out: np.ndarray) -> None:
            for i, name in enumerate(names):
                out[i] = make_llama.draw(name, out[i].shape, seed)

        return build_params(config, dtype, read)

    return make


@pytest.fixture(scope="session")
def draw_tensors():
    """``draw_tensors(config, seed=0)``: the same weights as a checkpoint has them, by Hugging Face's names."""
    return lambda config, seed=0: {
        name: make_llama.draw(name, shape, seed) for name, shape in expected_shapes(config).items()
    }


@pytest.fixture(scope="session")
def tiny() -> LlamaConfig:
    """Grouped queries, untied; every size its own, so that no transposed axis passes, and an epsilon that shows."""
    return LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=8,
        rms_norm_eps=0.01,
        max_position_embeddings=256,
    )


@pytest.fixture(scope="session")
def golden_configs() -> dict[str, dict]:
    return json.loads((GOLDEN / "llama.json").read_text())["configs"]
