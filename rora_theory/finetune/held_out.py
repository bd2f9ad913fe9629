r"""Losses of single held-out records, over all their tokens and over the answer alone; and perplexity of plain text.

One number a record makes two runs comparable record by record: the spread of a paired difference is far below that
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

from rora_theory import llama
from rora_theory.data.batches import Examples, choose_widths, plan_epoch
from rora_theory.errors import InputError
from rora_theory.finetune.loss import cross_entropy
from rora_theory.llama import LlamaConfig, shared_prompt
from rora_theory.llama.attention import causal


@dataclass(frozen=True)
class RecordLoss:
    """Cross-entropy of one record, summed, in nats.

    Attributes:
      tokens, loss: of every token but the first, which nothing predicts.
      answer_tokens, answer_loss: of those that belong to the answer.
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
    batch_size: int = 16,
    widths: int = 6,
) -> list[RecordLoss]:
    """The loss of every record, in the order of ``examples``.

    Args:
      params, llama_config: the model.
      adapter: run beside the weights, dropout off; one that can be merged is faster merged.
      examples: from `tokenize` with ``answer_only``, which marks the answers.
      batch_size: records worked on together; it changes rounding alone.
      widths: most padded lengths, each compiled once.

    Raises:
      InputError: a record longer than the model reads.
    """
    sizes, answers = examples.sizes, examples.targets
    longest = llama_config.max_position_embeddings
    if len(examples) and int(sizes.max()) > longest:
        raise InputError(f"a record has {int(sizes.max()) + 1} tokens; accepted are at most {longest + 1}")
    # What all records begin with is read once; the last of it is left to the rows, for it predicts what differs.
    prompts = [examples[i][: int(examples.starts[i]) - 1].tolist() for i in range(len(examples))]
    shared = shared_prompt.shared_length(prompts, spare=1) if prompts else 0
    first, follower, start = 0.0, adapter, None
    if shared:
        tokens = np.asarray(examples[0][: shared + 1][None], np.int32)
        whole = (tokens[:, :-1], tokens[:, 1:], np.array([shared], np.int32), np.zeros((1, shared), np.int32), None)
        first = float(_losses(params, adapter, *whole, llama_config=llama_config)[0, 0])
        follower, start = (
            shared_prompt.read_prompt(params, tokens[0, :-1].tolist(), llama_config, adapter),
            np.int32(shared),
        )
    rest = sizes - shared
    plan = plan_epoch(rest, choose_widths(rest, widths), batch_size, seed=None, epoch=0)
    sums = []
    for rows, width in zip(plan.rows, np.minimum(plan.widths, longest - shared).tolist(), strict=True):
        inputs, targets, answer = (np.zeros((batch_size, width), np.int32) for _ in range(3))
        for row, index in enumerate(rows.tolist()):
            if index >= 0:
                tokens, learned = examples[index][shared:], examples.learned_of(index)[shared:]
                inputs[row, : len(tokens) - 1], targets[row, : len(tokens) - 1] = tokens[:-1], tokens[1:]
                answer[row, : len(tokens) - 1] = learned[1:]
        lengths = np.where(rows < 0, 0, rest[rows]).astype(np.int32)
        sums.append(_losses(params, follower, inputs, targets, lengths, answer, start, llama_config=llama_config))
    found: dict[int, RecordLoss] = {}
    for rows, pair in zip(plan.rows, jax.device_get(sums), strict=True):
        for index, (loss, answer_loss) in zip(rows.tolist(), pair.tolist(), strict=True):
            if index >= 0:
                found[index] = RecordLoss(int(sizes[index]), first + loss, int(answers[index]), answer_loss)
    return [found[index] for index in range(len(examples))]


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
    """Summed loss of each row's first ``lengths`` targets, and of those of them marked ``answer``; rows begin at
    position ``start``, None being 0."""
    width, positions, seen = inputs.shape[1], None, None
    if start is not None:
        positions = jnp.broadcast_to(start + jnp.arange(width, dtype=jnp.int32), inputs.shape)
        seen = jnp.broadcast_to(causal(width, width), (*inputs.shape, width))
    hidden = llama.hidden_states(params, inputs, llama_config, adapter, positions=positions, visible=seen)

    def one(row: tuple[Array, Array, Array, Array]) -> Array:  # a row at a time: logits are the largest array
        h, target, length, marked = row
        logits = llama.unembed(params, h, llama_config)
        gold = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        real = (jnp.arange(len(target)) < length).astype(jnp.float32)
        loss = real * (jax.nn.logsumexp(logits, axis=-1) - gold)
        return jnp.stack([jnp.sum(loss), jnp.sum(loss * marked.astype(jnp.float32))])

    return jax.lax.map(one, (hidden, targets, lengths, answer))


def perplexity(
    params: Any, llama_config: LlamaConfig, windows: Int[np.ndarray, "n s"], *, batch_size: int = 4
) -> float:
    """exp of the mean next-token loss over all windows; infinite where float64 does not hold it."""

    @jax.jit
    def loss(params: Any, rows: Int[Array, "b s"]) -> Float[Array, ""]:
        hidden = llama.hidden_states(params, rows[:, :-1], llama_config)
        head = llama.output_matrix(params, llama_config)
        return cross_entropy(hidden, head, rows[:, 1:], jnp.ones(rows[:, 1:].shape, jnp.float32))

    parts = np.split(windows, range(batch_size, len(windows), batch_size))
    mean = math.fsum(float(loss(params, rows)) for rows in parts) / (windows.shape[0] * (windows.shape[1] - 1))
    return math.exp(mean) if mean < 700 else math.inf
