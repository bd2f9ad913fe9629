"""Against transformers and peft: logits, the gradient of every adapter tensor, and a loss curve."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rora_theory.adapters import count, load_peft, merge, trainable
from rora_theory.llama import forward

CASES = ("lora", "rora", "dora", "lora_patterns", "dora_rora_patterns", "regex")


def folder(golden, name: str) -> Path:
    return golden.FOLDER / name


def test_every_case_is_tested(golden) -> None:
    assert set(CASES) == set(golden.CASES) == {path.name for path in golden.FOLDER.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_peft(name: str, golden, config, params, tokens) -> None:
    """Logits to 1e-5, gradients and 20 AdamW losses to 1e-4 relative: float32 sums in another order."""
    expected = np.load(folder(golden, name) / "golden.npz")
    adapter = load_peft(folder(golden, name), config, params)

    def loss(trained):
        logits = forward(params, tokens, config, adapter.replace(trained))
        picked = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
        return jnp.mean(picked), logits

    optimizer = optax.adamw(golden.RATE, eps=1e-8, weight_decay=0.01)  # torch.optim.AdamW's defaults

    @jax.jit
    def step(trained, state):
        (value, logits), gradient = jax.value_and_grad(loss, has_aux=True)(trained)
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer count
            updates, state = optimizer.update(gradient, state, trained)
        return optax.apply_updates(trained, updates), state, value, logits, gradient

    trained, state, losses = trainable(adapter), optimizer.init(trainable(adapter)), []
    for index in range(golden.STEPS):
        trained, state, value, logits, gradient = step(trained, state)
        losses.append(float(value))
        if index == 0:
            np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-5)
            compare_gradients(gradient, adapter, expected)
    np.testing.assert_allclose(losses, expected["losses"], rtol=1e-4)
    assert losses[-1] < losses[0] * 0.99
    for target in adapter.targets:  # 20 steps on, padding is still exactly zero
        for layer, rank in enumerate(target.ranks):
            assert not np.any(trained[target.module]["lora_A"][layer, rank:])
            assert not np.any(trained[target.module]["lora_B"][layer, :, rank:])


def compare_gradients(gradient, adapter, expected) -> None:
    """Every tensor peft trains, at its true rank, within 1e-4 of its largest entry; no other is non-zero."""
    seen = 0
    for target in adapter.targets:
        for layer, rank in enumerate(target.ranks):
            own = {kind: np.asarray(value[layer]) for kind, value in gradient[target.module].items()}
            if not rank:
                assert all(not value.any() for value in own.values())
                continue
            prefix = f"grad:base_model.model.model.layers.{layer}.{target.module}."
            pairs = [
                (own["lora_A"][:rank], expected[prefix + "lora_A.weight"]),
                (own["lora_B"][:, :rank], expected[prefix + "lora_B.weight"]),
            ]
            if "lora_magnitude_vector" in own:
                pairs.append((own["lora_magnitude_vector"], expected[prefix + "lora_magnitude_vector"]))
            for ours, theirs in pairs:
                assert np.abs(theirs).max() > 1e-6  # a vanishing gradient would agree with anything
                np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())
            assert not own["lora_A"][rank:].any()
            assert not own["lora_B"][:, rank:].any()
            seen += len(pairs)
    assert seen == sum(key.startswith("grad:") for key in expected.files)


@pytest.mark.parametrize("name", CASES)
def test_counts_what_peft_counts(name: str, golden, config) -> None:
    adapter = load_peft(folder(golden, name), config)
    assert count(adapter) == int(np.load(folder(golden, name) / "golden.npz")["count"])


@pytest.mark.parametrize("name", ["lora_patterns", "dora_rora_patterns"])
def test_merged_model_is_peft_s(name: str, golden, config, params, tokens, run) -> None:
    expected = np.load(folder(golden, name) / "golden.npz")["logits"]
    merged = merge(load_peft(folder(golden, name), config, params), params)
    # 2e-5: the merged weights are rounded to float32 once more than the adapter's branch is.
    np.testing.assert_allclose(run(merged, tokens), expected, rtol=0, atol=2e-5)
