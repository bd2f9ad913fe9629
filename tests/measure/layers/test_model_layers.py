"""Gradients and inputs of a LLaMA's modules against autodiff; the first real step against formula and law."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import tiny

from rora_theory import InputError
from rora_theory.advice.setting import Setting
from rora_theory.advice.transfer import transfer
from rora_theory.lab import llama
from rora_theory.lab.adapters import LoraConfig
from rora_theory.lab.data.batches import Batch
from rora_theory.lab.llama import MODULES
from rora_theory.measure.layers.model_layers import RealStep, Recording, real_tokens, record
from rora_theory.measure.regimes import terms

CONFIG, PARAMS = tiny.CONFIG, tiny.params()
LENGTHS = (9, 5, 12)
REAL = np.arange(12)[None] < np.array(LENGTHS)[:, None]
NAMES = ("self_attn.q_proj", "mlp.down_proj")


def batch(seed: int, *, answer_only: bool = False) -> Batch:
    """Return three rows padded on the right to 12; ``answer_only`` keeps the last two targets of each."""
    random = np.random.default_rng(seed)
    tokens = random.integers(1, 48, (3, 13)).astype(np.int32)
    inputs, targets = np.where(REAL, tokens[:, :-1], 0), tokens[:, 1:].copy()
    if not answer_only:
        return Batch(inputs, targets, REAL.astype(np.float32), None)
    positions = np.array([[length - 2, length - 1, 0] for length in LENGTHS], np.int32)
    weights = np.broadcast_to(np.array([1, 1, 0], np.float32), (3, 3))
    return Batch(inputs, np.take_along_axis(targets, positions, axis=1), weights, positions)


@pytest.mark.slow
@pytest.mark.parametrize("answer_only", [False, True])
def test_gradient_is_autodiff_s_in_the_weight(answer_only) -> None:
    """Every module of every layer agrees with the plain formula of the loss, in float32 sums of 26 tokens.

    Inputs are the model's own, without those of padding.
    """
    used = batch(1, answer_only=answer_only)
    recorded = record(PARAMS, CONFIG, used, MODULES)

    def loss(weights: dict) -> jax.Array:
        layers = {**PARAMS["layers"], **{name: {"weight": w} for name, w in weights.items()}}
        logits = llama.forward({**PARAMS, "layers": layers}, jnp.asarray(used.inputs), CONFIG)
        if used.positions is not None:
            logits = jnp.take_along_axis(logits, jnp.asarray(used.positions)[..., None], axis=1)
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(used.targets))
        return jnp.sum(losses * used.weights) / jnp.sum(used.weights)

    value, expected = jax.jit(jax.value_and_grad(loss))({name: PARAMS["layers"][name]["weight"] for name in MODULES})
    _, captured = llama.hidden_states(PARAMS, jnp.asarray(used.inputs), CONFIG, capture=MODULES)
    assert recorded.loss == pytest.approx(float(value), rel=1e-5)
    np.testing.assert_array_equal(real_tokens(used), REAL)
    for name in MODULES:
        inputs = np.asarray(captured[name])[:, REAL]
        np.testing.assert_allclose(recorded.inputs[name], inputs, rtol=1e-5, atol=1e-6)
        for layer in range(2):
            scale = float(jnp.max(jnp.abs(expected[name][layer])))
            grad = recorded.gradient(name, layer)
            np.testing.assert_allclose(grad, expected[name][layer], rtol=0, atol=2e-5 * scale)


@pytest.fixture(scope="module")
def recordings() -> tuple[Recording, Recording]:
    """Return the training batch with gradients, and the held-out batch without."""
    return record(PARAMS, CONFIG, batch(1), NAMES), record(PARAMS, CONFIG, batch(2), NAMES, gradients=False)


@pytest.fixture(scope="module")
def stepper() -> RealStep:
    return RealStep(PARAMS, CONFIG, batch(1), batch(2), ("q_proj", "down_proj"))


@pytest.mark.slow
def test_real_step_by_hand(stepper, recordings) -> None:
    """SGD's increment is -eta gamma^2 G A^T A x', from the recorded G and the adapter's A, and equals the model's."""
    setting = Setting(4, 8.0, 1e-3, "rora", "sgd")
    key = jax.random.key(5)
    change = stepper.change(setting, key)
    lora = LoraConfig(rank=4, alpha=8.0, rule="rora", target_modules=("q_proj", "down_proj"))
    adapter = lora.build(key, CONFIG, PARAMS)
    train, held_out = recordings
    assert not held_out.deltas
    stepped = {}
    for name in NAMES:
        lora_B = np.zeros((2, CONFIG.module_shape(name)[0], 4), np.float32)
        for layer in range(2):
            lora_A = np.asarray(adapter.params[name]["lora_A"][layer])
            lora_B[layer] = -1e-3 * setting.scaling * train.gradient(name, layer) @ lora_A.T
            w = setting.scaling * held_out.inputs[name][layer] @ lora_A.T @ lora_B[layer].T
            assert change.modules[name][layer] == pytest.approx(np.sqrt(np.mean(w**2)), rel=1e-4)
        stepped[name] = {**adapter.params[name], "lora_B": jnp.asarray(lora_B)}
    for function, value in ((llama.hidden_states, change.hidden), (llama.forward, change.logits)):
        run = jax.jit(partial(function, config=CONFIG))
        before, after = (
            np.asarray(run(PARAMS, jnp.asarray(batch(2).inputs), adapter=used))[REAL]
            for used in (None, adapter.replace(stepped))
        )
        # Differences of float32 states: 1e-7 of the state against a change of about 1e-3 of it.
        assert value == pytest.approx(np.sqrt(np.mean((after - before) ** 2)), rel=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "power"), [("momentum", 2), ("adamw", 1)])
def test_power_of_gamma(stepper, optimizer, power) -> None:
    """The real step for one A grows as gamma^2 under SGD and as gamma under Adam, and as the rate in both."""
    key = jax.random.key(0)
    setting = Setting(4, 4.0, 1e-4, "lora", optimizer)
    plain = stepper.change(setting, key).modules
    scaled = stepper.change(replace(setting, alpha=12.0, learning_rate=2e-4), key).modules
    for name, values in plain.items():
        # Adam's epsilon, 1e-8 against gradients of about 1e-4 and more, is the largest departure.
        np.testing.assert_allclose(scaled[name], 2 * 3**power * values, rtol=5e-3)


@pytest.mark.slow
def test_a_transfer_preserves_the_real_step(stepper, recordings) -> None:
    """From rank 2 to 8, over 40 draws, the measured linear terms preserve each module's rms; without them it grows
    by the law.
    """
    tuned = Setting(2, 8.0, 1e-4, "lora", "adamw")
    train, held_out = recordings
    linear_terms = {
        f"model.layers.{layer}.{name}": terms.compute_terms(
            train.gradient(name, layer), held_out.inputs[name][layer], optimizer="adam"
        )
        .crossing()
        .linear_term
        for name in NAMES
        for layer in range(2)
    }
    advice = transfer(tuned, 8, linear_terms)

    def size(setting: Setting, pattern: dict[str, float]) -> dict[str, np.ndarray]:
        draws = [stepper.change(setting, jax.random.key(seed), pattern).modules for seed in range(40)]
        return {name: np.sqrt(np.mean([draw[name] ** 2 for draw in draws], axis=0)) for name in NAMES}

    before = size(tuned, {})
    after = size(replace(advice.unchanged, alpha=advice.alpha), advice.alpha_pattern("module"))
    unchanged = size(advice.unchanged, {})
    for name in NAMES:
        # One draw's mean square has a relative deviation of about 0.8 at rank 2, 0.5 at rank 8: 0.08 of the ratio's rms
        # over 40 draws; four sigma.
        np.testing.assert_allclose(after[name] / before[name], 1, atol=0.32)
        ratios = [advice.step_ratios(advice.unchanged)[f"model.layers.{layer}.{name}"] for layer in range(2)]
        np.testing.assert_allclose(unchanged[name] / before[name] / ratios, 1, atol=0.32)


@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_named(stepper) -> None:
    broken = {**PARAMS, "norm": PARAMS["norm"] * jnp.float32(np.nan)}
    with pytest.raises(InputError, match=r"loss .* nan"):
        record(broken, CONFIG, batch(1), ("mlp.up_proj",))
    with pytest.raises(InputError, match=r"capture .*'q_proj'"):
        record(PARAMS, CONFIG, batch(1), ("q_proj",), gradients=False)
    with pytest.raises(InputError, match=r"alpha_pattern .*'k_proj'"):
        stepper.change(Setting(2, 8.0, 1e-4), jax.random.key(0), {"k_proj": 3.0})
