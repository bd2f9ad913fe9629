"""A tiny random checkpoint in Hugging Face layout and invented records, for tests of the commands."""

import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import tokenizers

from rora_theory.lab.data.tasks import TASKS, render_instruction
from rora_theory.lab.llama import LlamaConfig, init_params
from rora_theory.lab.llama.weights import save_hf

CONFIG = LlamaConfig(300, 16, 24, 2, 2, 1, 8, max_position_embeddings=512, bos_token_id=0, eos_token_id=1)
WORDS = [chr(97 + i) * (1 + i % 7) for i in range(16)]


TEMPLATE = [
    "Below is an instruction that describes a task.",
    "Write a response that appropriately completes the request.",
    "### Instruction:",
    "### Response:",
    " " * 16,
]
"""Texts in every record, one token each; as single bytes they would be most of the tokens of a test."""


def model(folder: Path, words: Sequence[str] = TEMPLATE) -> Path:
    """Write a model with a tokenizer of bytes and these words, with weights large enough that every layer matters."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_tokens(list(words))
    backend.add_special_tokens(["<s>", "</s>"])
    (folder / "tokenizer").mkdir(parents=True)
    backend.save(str(folder / "tokenizer" / "tokenizer.json"))
    (folder / "tokenizer" / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    params = jax.tree.map(lambda leaf: 10 * leaf if leaf.ndim > 1 else leaf, init_params(jax.random.key(0), CONFIG))
    save_hf(folder / "hf", params, CONFIG, tokenizer_from=folder / "tokenizer")
    return folder / "hf"


def records(path: Path, count: int = 20) -> Path:
    """Write invented records."""
    random = np.random.default_rng(0)
    rows = [
        {"instruction": " ".join(random.choice(WORDS, random.integers(1, 12))), "output": f"answer{i % 3}"}
        for i in range(count)
    ]
    path.write_text(json.dumps(rows))
    return path


def two_files(folder: Path) -> Path:
    """Write thirty records to one/train.json and thirty others to two/train.json."""
    for name in ("one", "two"):
        (folder / name).mkdir()
        records(folder / name / "train.json", 30)
    rows = json.loads((folder / "two" / "train.json").read_text())
    for row in rows:
        row["instruction"] = "two " + row["instruction"]
    (folder / "two" / "train.json").write_text(json.dumps(rows))
    return folder


def questions(folder: Path, task: str, labels: tuple[str, ...], count: int = 4) -> Path:
    """Write questions of a task, whose answer is the first label."""
    answer = {"input": "", "answer": labels[0], "output": f"the correct answer is {labels[0]}"}
    texts = [f"is it {WORDS[i % len(WORDS)]}{' again' * (i // len(WORDS))}" for i in range(count)]
    items = [{"instruction": render_instruction(TASKS[task], question, labels)} | answer for question in texts]
    (folder / task).mkdir()
    (folder / task / "test.json").write_text(json.dumps(items))
    return folder / task / "test.json"
