"""The rank coordinate check on a tiny model: what it reads, that padding is exact, what is flat and what must fail."""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rora_theory.advice.setting import Setting
from rora_theory.data.batches import Batch
from rora_theory.errors import InputError
from rora_theory.finetune.step import batch_loss
from rora_theory.llama import LlamaConfig, forward, hidden_states, init_params
from rora_theory.measure.rank_check.coordinate_table import Coordinate, Table
from rora_theory.measure.rank_check.coordinates import Checker

CONFIG = LlamaConfig(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=32,
)
TARGETS = ("q_proj", "down_proj")
MODULES = ("self_attn.q_proj", "mlp.down_proj")
RANKS = (4, 12, 32)


def batch(seed):
    """Two rows of three random tokens; the second is short, its end is padding."""
    tokens = np.random.default_rng(seed).integers(0, 40, (2, 4)).astype(np.int32)
    weights = np.array([[1, 1, 1], [1, 0, 0]], np.float32)
    return Batch(jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:]), jnp.asarray(weights), None)


@pytest.fixture(scope="module")
def params():
    plain = init_params(jax.random.key(0), CONFIG)
    return jax.tree.map_with_path(lambda path, a: a if path[-1].key.endswith("norm") else 10.0 * a, plain)


@pytest.fixture(scope="module")
def checker(params):
    return Checker(params, CONFIG, width=max(RANKS), target_modules=TARGETS)


def run(checker, setting, steps=(1, 3), key=0):
    found = checker.run(setting, jax.random.key(key), lambda step: batch(step % 2), batch(9), steps=steps)
    return dict(found)


@pytest.mark.slow
def test_coordinates_are_what_they_say(params, checker):
    """Three steps of SGD written out, then everything read from the plain model's own inputs and logits."""
    setting = Setting(8, 4.0, 0.05, "rora", "sgd")
    found = run(checker, setting)
    adapter = checker.adapter(jax.random.key(0), setting)
    tensors, rate = adapter.params, jnp.float32(0.05)

    @jax.jit
    def gradient(values, used):
        return jax.grad(lambda v: batch_loss(params, used, CONFIG, adapter.replace(v)) / used.weights.sum())(values)

    for step in range(3):
        grads = gradient(tensors, batch(step % 2))
        tensors = jax.tree.map(lambda p, g: p - rate * g, tensors, grads)
    now, used = adapter.replace(tensors), batch(0)
    real = np.asarray(used.weights) > 0
    _, inputs = jax.jit(lambda tokens: hidden_states(params, tokens, CONFIG, now, capture=MODULES))(used.inputs)
    for module in MODULES:
        A, B = (np.asarray(tensors[module][f"lora_{name}"], np.float64) for name in "AB")
        x = np.asarray(inputs[module], np.float64)[:, real]
        gamma = 4 / np.sqrt(8)
        inner = np.einsum("lti,lri->ltr", x, A)
        expected = {
            "output": gamma * np.sqrt(np.mean(np.einsum("ltr,lor->lto", inner, B) ** 2)),
            "inner": np.sqrt(np.sum(inner**2) / inner[:, :, :8].size),
            "delta": gamma * np.sqrt(np.mean([np.sum((b @ a) ** 2) for a, b in zip(A, B, strict=True)])),
            "grad_A": np.linalg.norm(grads[module]["lora_A"]),
            "grad_B": np.linalg.norm(grads[module]["lora_B"]),
        }
        for quantity, value in expected.items():
            # Three float32 steps in another order of sums.
            assert found[Coordinate(quantity, "train", module, 3)] == pytest.approx(value, rel=1e-3), quantity

    @jax.jit
    def summed(used):
        return batch_loss(params, used, CONFIG, now)

    @partial(jax.jit, static_argnums=1)
    def apart(tokens, read):
        return read(params, tokens, CONFIG, now) - read(params, tokens, CONFIG)

    for part, split in ((used, "train"), (batch(9), "held_out")):
        keep = np.asarray(part.weights) > 0
        moved = np.asarray(apart(part.inputs, forward))[keep]
        assert found[Coordinate("logits", split, "model", 3)] == pytest.approx(np.sqrt(np.mean(moved**2)), rel=1e-3)
        hidden = np.asarray(apart(part.inputs, hidden_states))[keep]
        assert found[Coordinate("hidden", split, "model", 3)] == pytest.approx(np.sqrt(np.mean(hidden**2)), rel=1e-3)
        loss = float(summed(part)) / keep.sum()
        assert found[Coordinate("loss", split, "model", 3)] == pytest.approx(loss, rel=1e-5)


@pytest.mark.slow
def test_padding_is_exact(params, checker):
    """A checker as wide as the rank gives the same coordinates: to 1e-3, Adam dividing by gradients near zero."""
    setting = Setting(4, 4.0, 1e-3)
    own = run(Checker(params, CONFIG, width=4, target_modules=TARGETS), setting)
    padded = run(checker, setting)
    assert own.keys() == padded.keys()
    for coordinate, value in own.items():
        assert padded[coordinate] == pytest.approx(value, rel=1e-3, abs=1e-8), coordinate


@pytest.mark.slow
def test_ranks_share_their_noise(checker):
    small, large = (checker.adapter(jax.random.key(1), Setting(r, 1.0, 1e-4)) for r in (4, 8))
    for module in MODULES:
        a, b = (np.asarray(adapter.params[module]["lora_A"]) for adapter in (small, large))
        np.testing.assert_array_equal(a[:, :4], b[:, :4])
        assert not a[:, 4:].any()
        assert b[:, 4:8].any()
        assert not np.array_equal(a[0, :4], a[1, :4])  # layers do not


def table(checker, rule, alpha, optimizer, rate, init="kaiming_uniform"):
    """Eight seeds of every rank; a seed's adapters share a key and its batches."""
    values = {}
    for seed, (column, rank) in product(range(8), enumerate(RANKS)):
        setting, key = Setting(rank, alpha, rate, rule, optimizer, init), jax.random.fold_in(jax.random.key(0), seed)
        run = checker.run(setting, key, lambda _, seed=seed: batch(seed), batch(50 + seed), steps=(1,))
        for coordinate, value in run:
            values.setdefault(coordinate, np.full((8, len(RANKS)), np.nan))[seed, column] = value
    return Table(RANKS, values)


@pytest.mark.slow
def test_flat_rules_pass_and_controls_fail(checker):
    """Four tokens, so r* is about 4 for SGD and 7 for Adam: the table's right column, in part.

    The rate is so small that the first step is the law's. Bands are the law's distance from its limit over these
    ranks, about 0.2, and seeds.
    """
    flat = {
        "sgd": table(checker, "rora", 8.0, "sgd", 1e-3),
        "adamw": table(checker, "lora", 16.0, "adamw", 1e-5),
    }
    for found in flat.values():
        for module in MODULES:
            found.assert_flat(split="train", step=1, module=module, band=0.35)
    unscaled = table(checker, 0.0, 1.0, "adamw", 1e-5)
    gaussian = table(checker, "lora", 16.0, "adamw", 1e-5, init="gaussian")
    sgd = table(checker, 0.0, 1.0, "sgd", 1e-3)
    for module in MODULES:
        with pytest.raises(AssertionError, match=f"output of {module} on train at step 1 is not flat but grows"):
            unscaled.assert_flat(split="train", step=1, module=module, band=0.35)
        with pytest.raises(AssertionError, match="shrinks"):
            gaussian.assert_flat(split="train", step=1, module=module, band=0.35)
        with pytest.raises(AssertionError, match="grows"):
            sgd.assert_flat(split="train", step=1, module=module, band=0.35)
        # One rule is the other times a power of the rank at the first step: gamma once under Adam.
        slopes = [
            found.slope("output", split="train", step=1, module=module).slope for found in (flat["adamw"], unscaled)
        ]
        assert slopes[1] - slopes[0] == pytest.approx(1, abs=0.02)


def test_refusals(checker):
    with pytest.raises(InputError, match=r"rank must be at most .* 32, got"):
        checker.adapter(jax.random.key(0), Setting(33, 1.0, 1e-4))
    with pytest.raises(InputError, match="learning_rate"):
        Setting(4, 1.0, 0.0)
    found = Table((2, 4), {Coordinate("output", "train", "model", 1): np.ones((2, 2))})
    with pytest.raises(InputError, match="the table has no Coordinate"):
        found.assert_flat("output", split="train", step=2)
