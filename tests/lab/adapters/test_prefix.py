"""Prefix tuning against peft (`tests/golden/make_prefix.py`): training, padding, generation, files, initial values."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.peft_files import read_config, read_tensors
from support.peft_training import train_as_peft

from rora_theory.lab.adapters import PrefixConfig, load_peft, save_peft
from rora_theory.lab.llama import forward, generate

FOLDER = Path(__file__).parents[2] / "golden" / "prefix"


@pytest.fixture(scope="module")
def expected():
    return np.load(FOLDER / "golden.npz")


@pytest.fixture(scope="module")
def adapter(config):
    return load_peft(FOLDER, config)


@pytest.mark.slow
def test_agrees_with_peft(golden, config, params, tokens, adapter, expected) -> None:
    """Logits agree to 1e-5, the gradient and 20 AdamW losses to a relative 1e-4: float32 sums in another order."""
    logits, gradient, losses, _ = train_as_peft(adapter, params, tokens, config, steps=golden.STEPS, rate=golden.RATE)
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-5)
    # PEFT's layout has the tokens first, and keys and values of a layer next to each other.
    pair = np.stack([gradient["key"], gradient["value"]])
    ours, theirs = np.moveaxis(pair, (2, 1, 0), (0, 1, 2)).reshape(len(expected["gradient"]), -1), expected["gradient"]
    assert np.abs(theirs.reshape(len(theirs), 3, 2, -1)).max(axis=(0, 3)).min() > 1e-6, "in every layer"
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())
    np.testing.assert_allclose(losses, expected["losses"], rtol=1e-4)


@pytest.mark.slow
def test_padding_on_the_left_changes_nothing(config, params, tokens, adapter, expected) -> None:
    mask = np.ones(tokens.shape, np.int32)
    mask[0, :4] = 0
    padded = jax.jit(lambda mask: forward(params, tokens, config, adapter, attention_mask=mask))
    logits = np.asarray(padded(jnp.asarray(mask)))
    np.testing.assert_allclose(logits[mask == 1], expected["padded"][mask == 1], rtol=0, atol=1e-5)
    assert np.abs(logits - expected["logits"])[0].max() > 0.01, "the mask affects the logits"


@pytest.mark.slow
def test_generation_reads_the_prefix(config, params, tokens, adapter, expected, run) -> None:
    """Greedy tokens equal peft's. The best of 4 beams is at least as likely under the model without a cache."""
    prompts = [np.asarray(tokens)[0, 4:].tolist(), np.asarray(tokens)[1].tolist()]
    settings = {"max_new_tokens": expected["generated"].shape[1], "eos_ids": ()}
    greedy = generate.beam_search(params, config, prompts, num_beams=1, adapter=adapter, **settings)
    assert greedy == expected["generated"].tolist()
    base = generate.beam_search(params, config, prompts, num_beams=1, **settings)
    assert greedy != base, "the prefix changes the tokens"
    beams = generate.beam_search(params, config, prompts[1:], adapter=adapter, **settings)
    scores = []
    for new in (beams[0], greedy[1]):
        log_probabilities = jax.nn.log_softmax(run(params, jnp.asarray([prompts[1] + new]), adapter))[0]
        positions = len(prompts[1]) - 1 + np.arange(len(new))
        scores.append(float(log_probabilities[positions, np.asarray(new)].sum()))
    assert scores[0] >= scores[1] - 1e-4


def test_fresh_prefixes_follow_peft_s_law(config, params) -> None:
    drawn = PrefixConfig(50).build(jax.random.key(0), config, params).params
    values = np.concatenate([np.ravel(drawn[name]) for name in ("key", "value")])  # 2400 of N(0, 1)
    assert abs(values.mean()) < 5 / np.sqrt(values.size)
    assert abs(values.var() - 1) < 5 * np.sqrt(2 / values.size)
    assert abs(np.corrcoef(np.ravel(drawn["key"]), np.ravel(drawn["value"]))[0, 1]) < 5 / np.sqrt(values.size / 2)


def test_counts_and_table(expected, adapter) -> None:
    assert adapter.count() == int(expected["count"]) == 5 * 3 * 2 * 2 * 4
    assert [tuple(row) for row in adapter.config.table(adapter.llama_config)] == [
        ("self_attn", "0-2", 5, None, "prefix", None)
    ]


def test_writes_what_peft_wrote(adapter, tmp_path) -> None:
    save_peft(tmp_path, adapter)
    ours, theirs = read_tensors(tmp_path), read_tensors(FOLDER)
    assert set(ours) == set(theirs) == {"prompt_embeddings"}
    np.testing.assert_array_equal(ours["prompt_embeddings"], theirs["prompt_embeddings"], strict=True)
    written, original = read_config(tmp_path), read_config(FOLDER)
    assert {key: original[key] for key in written} == written
    assert set(original) - set(written) == {"auto_mapping", "modules_to_save", "peft_version", "revision"}
