"""Golden items and tokenizer of lm-evaluation-harness, and log-likelihoods without packing."""

import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import tokenizers
import transformers

from rora_theory.lab.data.tasks import TASKS, TaskRecord, render_instruction
from rora_theory.lab.evaluate.choices import EncodedChoice
from rora_theory.lab.llama.config import LlamaConfig
from rora_theory.lab.llama.model import Adapter, forward
from rora_theory.lab.llama.tokenizer import Tokenizer

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "harness.json").read_text())
_BACKEND = tokenizers.Tokenizer.from_str(json.dumps(GOLDEN["tokenizer"]))
TOKENIZER = Tokenizer(
    transformers.PreTrainedTokenizerFast(tokenizer_object=_BACKEND, bos_token="<s>", eos_token="</s>"), eos_ids=(1,)
)


def records(key: str) -> list[TaskRecord]:
    """Return the golden items of a task."""
    task = TASKS[key]
    return [
        TaskRecord(key, index, render_instruction(task, question, choices), question, tuple(choices), labels, gold)
        for index, (question, choices, gold) in enumerate(GOLDEN["items"][key])
        for labels in [task.labels[: len(choices)]]
    ]


def plain_log_likelihoods(
    params: dict, config: LlamaConfig, choices: Sequence[EncodedChoice], *, length: int, adapter: Adapter | None = None
) -> list[float]:
    """Score each choice in a row of its own, padded to a length, by a log-softmax over every position."""
    tokens = np.zeros((len(choices), length), np.int32)
    for row, choice in zip(tokens, choices, strict=True):
        row[: len(choice.tokens)] = choice.tokens
    logits = jax.jit(forward, static_argnums=2)(params, tokens, config, adapter)
    log_probabilities = np.asarray(jax.nn.log_softmax(logits, axis=-1), np.float64)
    return [
        sum(
            log_probabilities[row, place - 1, choice.tokens[place]]
            for place in range(len(choice.tokens) - choice.count, len(choice.tokens))
        )
        for row, choice in enumerate(choices)
    ]
