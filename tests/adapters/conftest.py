"""The golden script's tiny model, whose weights come from a seed, and its cases."""

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import make_adapters
import pytest

from rora_theory.adapters import LoraAdapter, LoraConfig, init
from rora_theory.llama import LlamaConfig, forward


@pytest.fixture(scope="session")
def golden() -> ModuleType:
    """The script that made tests/golden/adapters; its module level needs no torch."""
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
    """``run(params, tokens, adapter=None, key=None)``: logits, compiled once a kind of adapter."""

    @jax.jit
    def logits(params, tokens, adapter=None, key=None):
        return forward(params, tokens, config, adapter, key=key)

    return logits


@pytest.fixture(scope="session")
def perturbed(config: LlamaConfig, params: dict[str, Any]):
    """``perturbed(settings...)``: an adapter whose trained numbers are random and non-zero, padding apart."""

    def make(seed: int = 0, **settings: Any) -> LoraAdapter:
        adapter = init(jax.random.key(seed), LoraConfig(**settings), config, params)
        changed = {}
        for target in adapter.targets:
            ranks = jnp.asarray(target.ranks)
            rows = jnp.arange(target.width)[None, :] < ranks[:, None]
            own = dict(adapter.params[target.module])
            key = jax.random.fold_in(jax.random.key(seed + 100), len(changed))
            b = own["lora_B"]
            own["lora_B"] = jnp.where(rows[:, None, :], 0.3 * jax.random.normal(key, b.shape), jnp.zeros(()))
            if "lora_magnitude_vector" in own:
                noise = jax.random.uniform(key, own["lora_magnitude_vector"].shape, minval=0.7, maxval=1.4)
                own["lora_magnitude_vector"] = own["lora_magnitude_vector"] * noise
            changed[target.module] = own
        return adapter.replace(changed)

    return make
