"""The tiny model of the golden script, with weights from a seed, and its cases."""

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import make_adapters
import pytest

from rora_theory.lab.adapters import LoraAdapter, LoraConfig
from rora_theory.lab.llama import LlamaConfig, forward


@pytest.fixture(scope="session")
def golden() -> ModuleType:
    """Return the script that made tests/golden/adapters; importing it needs no torch."""
    return make_adapters


@pytest.fixture(scope="session")
def config(golden: ModuleType) -> LlamaConfig:
    return LlamaConfig(**golden.SHAPE)


@pytest.fixture(scope="session")
def params(golden: ModuleType) -> dict[str, Any]:
    return golden.base_params()


@pytest.fixture(scope="session")
def tokens(golden: ModuleType) -> jax.Array:
    return jnp.asarray(golden.TOKENS, jnp.int32)


@pytest.fixture(scope="session")
def run(config: LlamaConfig):
    """Return ``run(params, tokens, adapter=None, key=None)``: logits, compiled once for each kind of adapter."""

    @jax.jit
    def logits(params, tokens, adapter=None, key=None):
        return forward(params, tokens, config, adapter, key=key)

    return logits


@pytest.fixture(scope="session")
def perturbed(config: LlamaConfig, params: dict[str, Any]):
    """Return ``perturbed(settings...)``: an adapter with random non-zero parameters, except the padding."""

    def make(seed: int = 0, **settings: Any) -> LoraAdapter:
        adapter = LoraConfig(**settings).build(jax.random.key(seed), config, params)
        keys = jax.random.split(jax.random.key(seed + 100), len(adapter.targets))
        changed = {}
        for target, key in zip(adapter.targets, keys, strict=True):
            tensors = dict(adapter.params[target.module])
            columns = jnp.arange(target.width)[None, :] < jnp.asarray(target.ranks)[:, None]
            noise = 0.3 * jax.random.normal(key, tensors["lora_B"].shape)
            tensors["lora_B"] = jnp.where(columns[:, None, :], noise, jnp.zeros(()))
            if "lora_magnitude_vector" in tensors:
                magnitude = tensors["lora_magnitude_vector"]
                factor = jax.random.uniform(key, magnitude.shape, minval=0.7, maxval=1.4)
                tensors["lora_magnitude_vector"] = magnitude * factor
            changed[target.module] = tensors
        return adapter.replace(changed)

    return make
