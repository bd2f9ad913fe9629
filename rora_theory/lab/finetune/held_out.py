"""Losses of individual held-out records, and perplexity of plain text.

With a loss per record, two runs can be compared record by record: the spread of a paired difference is far below that
of either loss.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rora_theory.defaults import SMALL_BATCH_SIZE, TRAIN_BATCH_SIZE
from rora_theory.errors import InputError
from rora_theory.lab import llama
from rora_theory.lab.data.batches import Examples, choose_widths, plan_epoch
from rora_theory.lab.finetune.loss import cross_entropy
from rora_theory.lab.llama import LlamaConfig, shared_prompt
from rora_theory.lab.llama.attention import causal_mask


@dataclass(frozen=True)
class RecordLoss:
    """Summed cross-entropy of one record, in nats.

    Attributes:
      tokens: Number of predicted tokens, all but the first.
      loss: Loss summed over the predicted tokens.
      answer_tokens: Number of predicted tokens in the answer.
      answer_loss: Loss summed over the answer's tokens.
    """

    tokens: int
    loss: float
    answer_tokens: int
    answer_loss: float


def record_losses(
    params: Any,
    llama_config: LlamaConfig,
    examples: Examples,
    *,
    adapter: llama.Adapter | None = None,
    batch_size: int = TRAIN_BATCH_SIZE,
    widths: int = 6,
) -> list[RecordLoss]:
    """Compute the loss of every record, in the order of ``examples``.

    Args:
      examples: Examples from `tokenize` with ``answer_only``, which marks the answers.
      adapter: Adapter applied to the model, without dropout. A mergeable adapter is faster if merged beforehand.
      batch_size: Number of records processed together; it affects rounding only.
      widths: Maximum number of padded lengths, each compiled once.

    Raises:
      InputError: If a record is longer than the model's context.
    """
    sizes, answers = examples.input_lengths, examples.target_counts
    context = llama_config.max_position_embeddings
    if len(examples) and int(sizes.max()) > context:
        raise InputError(f"a record must have at most {context + 1} tokens, got {int(sizes.max()) + 1}")
    # Process the prefix that all prompts share once. Its last token stays in the rows, because it predicts the first
    # token that differs.
    prompts = [examples[i][: int(examples.first_targets[i]) - 1].tolist() for i in range(len(examples))]
    shared = shared_prompt.shared_length(prompts, spare=1) if prompts else 0
    prefix_loss, row_adapter, start = 0.0, adapter, None
    if shared:
        prefix = np.asarray(examples[0][: shared + 1][None], np.int32)
        lengths, unmarked = np.array([shared], np.int32), np.zeros((1, shared), np.int32)
        loss = _losses(
            params, adapter, prefix[:, :-1], prefix[:, 1:], lengths, unmarked, None, llama_config=llama_config
        )
        prefix_loss = float(loss[0, 0])
        # The rows attend to the cached keys and values of the shared prefix.
        row_adapter = shared_prompt.read_prompt(params, prefix[0, :-1].tolist(), llama_config, adapter)
        start = np.int32(shared)
    # Group the remainders of the records into batches of similar length.
    remaining = sizes - shared
    plan = plan_epoch(remaining, choose_widths(remaining, widths), batch_size, seed=None, epoch=0)
    sums = []
    for rows, width in zip(plan.rows, np.minimum(plan.widths, context - shared).tolist(), strict=True):
        # Pad the rows on the right; a negative index is an empty row.
        inputs, targets, answer = (np.zeros((batch_size, width), np.int32) for _ in range(3))
        for row, index in enumerate(rows.tolist()):
            if index >= 0:
                tokens, learned = examples[index][shared:], examples.target_mask(index)[shared:]
                inputs[row, : len(tokens) - 1], targets[row, : len(tokens) - 1] = tokens[:-1], tokens[1:]
                answer[row, : len(tokens) - 1] = learned[1:]
        lengths = np.where(rows < 0, 0, remaining[rows]).astype(np.int32)
        sums.append(_losses(params, row_adapter, inputs, targets, lengths, answer, start, llama_config=llama_config))
    # Fetch all sums at once, and restore the order of the examples.
    losses: dict[int, RecordLoss] = {}
    for rows, pairs in zip(plan.rows, jax.device_get(sums), strict=True):
        for index, (loss, answer_loss) in zip(rows.tolist(), pairs.tolist(), strict=True):
            if index >= 0:
                losses[index] = RecordLoss(int(sizes[index]), prefix_loss + loss, int(answers[index]), answer_loss)
    return [losses[index] for index in range(len(examples))]


@partial(jax.jit, static_argnames="llama_config")
def _losses(
    params: Any,
    adapter: llama.Adapter | None,
    inputs: Int[Array, "B S"],
    targets: Int[Array, "B S"],
    lengths: Int[Array, " B"],
    answer: Int[Array, "B S"],
    start: Int[Array, ""] | None,
    *,
    llama_config: LlamaConfig,
) -> Float[Array, "B 2"]:
    """Sum the loss over each row's first ``lengths`` targets, and over those of them that ``answer`` marks.

    Rows begin at position ``start``; None means 0.
    """
    width, positions, visible = inputs.shape[1], None, None
    # After a shared prefix, positions continue from its end, and rows see it through the adapter's prefix.
    if start is not None:
        positions = jnp.broadcast_to(start + jnp.arange(width, dtype=jnp.int32), inputs.shape)
        visible = jnp.broadcast_to(causal_mask(width, width), (*inputs.shape, width))
    hidden = llama.hidden_states(params, inputs, llama_config, adapter, positions=positions, visible=visible)

    def row_losses(row: tuple[Array, Array, Array, Array]) -> Array:
        row_hidden, target, length, in_answer = row
        # Only the target's logit and the normaliser of each position are needed.
        logits = llama.unembed(params, row_hidden, llama_config)
        gold = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        # Mask the padding.
        is_target = (jnp.arange(len(target)) < length).astype(jnp.float32)
        loss = is_target * (jax.nn.logsumexp(logits, axis=-1) - gold)
        return jnp.stack([jnp.sum(loss), jnp.sum(loss * in_answer.astype(jnp.float32))])

    # Row by row, because the logits are the largest array.
    return jax.lax.map(row_losses, (hidden, targets, lengths, answer))


def perplexity(
    params: Any, llama_config: LlamaConfig, windows: Int[np.ndarray, "n s"], *, batch_size: int = SMALL_BATCH_SIZE
) -> float:
    """Compute the exponential of the mean next-token loss over all windows, or infinity on overflow."""

    @jax.jit
    def loss(params: Any, rows: Int[Array, "b s"]) -> Float[Array, ""]:
        hidden = llama.hidden_states(params, rows[:, :-1], llama_config)
        head = llama.output_matrix(params, llama_config)
        return cross_entropy(hidden, head, rows[:, 1:], jnp.ones(rows[:, 1:].shape, jnp.float32))

    parts = np.split(windows, range(batch_size, len(windows), batch_size))
    mean = math.fsum(float(loss(params, rows)) for rows in parts) / (windows.shape[0] * (windows.shape[1] - 1))
    return math.exp(mean) if mean < 700 else math.inf
