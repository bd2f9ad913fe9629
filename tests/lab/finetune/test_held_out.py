"""Losses of single records against a plain forward pass of each."""

import functools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny import WIDE, WINDOWED

from rora_theory.errors import InputError
from rora_theory.lab.adapters import LoraConfig, PrefixConfig
from rora_theory.lab.data.batches import Examples
from rora_theory.lab.finetune.held_out import perplexity, record_losses
from rora_theory.lab.llama import LlamaConfig, forward
from rora_theory.lab.llama.model import init_params

PARAMS = init_params(jax.random.key(0), WIDE)


def examples(shared: int, count: int = 9) -> Examples:
    """Return records of 25 to 70 tokens that begin alike; the answers are their last 1 to 5."""
    random = np.random.default_rng(shared)
    beginning = random.integers(0, 700, shared)
    rows = [np.concatenate([beginning, random.integers(0, 700, n)]) for n in random.integers(25, 71 - shared, count)]
    learned = [np.arange(len(row)) >= len(row) - n for row, n in zip(rows, random.integers(1, 6, count), strict=True)]
    offsets = np.cumsum([0, *map(len, rows)])
    return Examples(np.concatenate(rows), offsets, np.concatenate(learned), 0, 0)


LORA = LoraConfig(rule="rora", rank=2, alpha=4.0)


@functools.partial(jax.jit, static_argnames="config")
def log_probabilities(tokens, adapter, config):
    return jax.nn.log_softmax(forward(PARAMS, tokens, config, adapter), axis=-1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shared", "config", "settings"),
    [
        *((shared, WIDE, LORA) for shared in (0, 16, 17, 40)),
        (17, WIDE, None),
        (40, WIDE, PrefixConfig(3)),
        (17, WINDOWED, PrefixConfig(3)),
        (40, WINDOWED, PrefixConfig(3)),
    ],
)
def test_equal_to_plain_forward_passes(shared: int, config: LlamaConfig, settings, prompts_read) -> None:
    """Of 17 shared tokens 16 are read once. Of 16 none are, because the last one is kept to predict the next token."""
    held_out = examples(shared)
    adapter = None if settings is None else settings.build(jax.random.key(1), config, PARAMS)
    losses = record_losses(PARAMS, config, held_out, adapter=adapter, batch_size=4, widths=2)
    assert prompts_read == {0: [], 16: [], 17: [16], 40: [32]}[shared]
    padded = np.zeros((len(held_out), 96), np.int32)
    for index, row in enumerate(padded):
        row[: held_out.lengths[index]] = held_out[index]
    logp = np.asarray(log_probabilities(padded, adapter, config), np.float64)
    for index, record in enumerate(losses):
        tokens = held_out[index]
        expected = -logp[index, np.arange(len(tokens) - 1), tokens[1:]]
        answer = expected[held_out.first_targets[index] - 1 :]
        assert (record.tokens, record.answer_tokens) == (len(expected), len(answer))
        # Sums of up to 70 float32 terms near 7.
        np.testing.assert_allclose((record.loss, record.answer_loss), (expected.sum(), answer.sum()), rtol=1e-6)


def test_a_record_that_the_model_can_t_read_is_refused() -> None:
    tokens = np.zeros(514, np.int64)
    with pytest.raises(InputError, match="at most 513 tokens, got 514"):
        record_losses(PARAMS, WIDE, Examples(tokens, np.array([0, 514]), np.arange(514) >= 500, 0, 0))


@pytest.mark.slow
def test_records_that_are_all_answer_have_one_loss() -> None:
    """Answer tokens are not part of the shared prefix, although the records begin alike."""
    random = np.random.default_rng(0)
    beginning = random.integers(0, 700, 40)
    tokens = np.concatenate([part for _ in range(3) for part in (beginning, random.integers(0, 700, 30))])
    held_out = Examples(tokens, np.arange(4) * 70, np.arange(3 * 70) % 70 > 0, 0, 0)
    config = replace(WIDE, max_position_embeddings=69)
    for record in record_losses(PARAMS, config, held_out, batch_size=4, widths=1):
        assert (record.tokens, record.loss) == (record.answer_tokens, pytest.approx(record.answer_loss, rel=1e-6))


def test_no_records_have_no_loss() -> None:
    none = np.zeros(0, np.int64)
    assert record_losses(PARAMS, WIDE, Examples(none, np.zeros(1, np.int64), none.astype(bool), 0, 0)) == []


@pytest.mark.slow
def test_perplexity_is_that_of_the_logits() -> None:
    windows = np.random.default_rng(0).integers(0, 700, (3, 12)).astype(np.int32)
    logits = np.asarray(jax.jit(forward, static_argnums=2)(PARAMS, jnp.asarray(windows[:, :-1]), WIDE))
    for scale, batch_size in ((1.0, 2), (1e3, 4), (1e4, 4)):  # losses of 7, 340 and 3400 nats
        chances = np.asarray(jax.nn.log_softmax(scale * logits), np.float64)
        mean = -np.take_along_axis(chances, windows[:, 1:, None], axis=-1).mean()
        value = perplexity(PARAMS | {"lm_head": scale * PARAMS["lm_head"]}, WIDE, windows, batch_size=batch_size)
        assert math.log(value) == pytest.approx(mean if mean < 700 else math.inf, rel=1e-5)
