"""Pretraining of a small LLaMA model on text: its vocabulary, windows of tokens, and the run's settings.

The run itself is `rora_theory.lab.finetune.Trainer` with `rora_theory.lab.adapters.WholeModel` as the trained part.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Int

from rora_theory.errors import InputError
from rora_theory.lab import llama
from rora_theory.lab.adapters import WholeModelConfig
from rora_theory.lab.data.batches import WIDTH_MULTIPLE, Batches, Examples
from rora_theory.lab.data.windows import sample_windows
from rora_theory.lab.finetune import FinetuneConfig, TrainingData
from rora_theory.lab.finetune.loop import Trainer
from rora_theory.lab.llama.tokenizer import Tokenizer, import_fast_tokenizer
from rora_theory.laws.random.seeds import check_seed
from rora_theory.optimizers import Schedule
from rora_theory.scaling import check_integer
from rora_theory.validation.ranges import AtLeastTwo, Count, NotNegative, Positive, check_ranges
from rora_theory.validation.rules import check_warmup

END = "<|endoftext|>"
"""Token between two documents."""
SMALLEST_VOCABULARY = 257
"""Number of bytes and the end of a text."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of the model. The defaults are about a million weights.

    Raises:
      InputError: If a size is out of range, or the heads do not divide the width.
    """

    layers: Count = 4
    """Number of layers"""
    hidden_size: Count = 128
    """Width of the residual stream"""
    intermediate_size: Count = 384
    """Number of feed-forward features"""
    heads: Count = 4
    """Number of attention heads, which divides the width into even parts"""
    context: AtLeastTwo = 128
    """Number of tokens that the model reads at most, a multiple of 8"""
    vocabulary: int = 1024
    """Number of tokens of the byte-level BPE vocabulary, which is trained on the text; 257 are the bytes and the end of
    a text"""

    def __post_init__(self) -> None:
        check_ranges(self)
        check_integer("vocabulary", self.vocabulary, minimum=SMALLEST_VOCABULARY)
        if self.hidden_size % (2 * self.heads):
            raise InputError(f"hidden_size must be a multiple of twice heads, {self.heads}, got {self.hidden_size}")
        if self.context % WIDTH_MULTIPLE:
            raise InputError(f"context must be a multiple of {WIDTH_MULTIPLE}, got {self.context}")

    def llama_config(self, tokenizer: Tokenizer) -> llama.LlamaConfig:
        """Return the configuration of the model with a tokenizer's vocabulary; input and output embeddings are tied."""
        return llama.LlamaConfig(
            vocab_size=len(tokenizer.backend),
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            head_dim=self.hidden_size // self.heads,
            max_position_embeddings=self.context,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_id,
        )


@dataclass(frozen=True)
class PretrainSettings:
    """Settings of a pretraining run: AdamW on all weights, with the gradient clipped at norm 1.

    Raises:
      InputError: If a value is out of range.
    """

    steps: Count = 4000
    """Number of optimizer steps"""
    batch_size: Count = 16
    """Number of windows per step"""
    accumulation: Count = 1
    """Number of microbatches that a batch is processed in, which fit a processor's cache where a batch does not"""
    lr: Positive = 3e-3
    """Peak learning rate"""
    warmup: int = 100
    """Number of steps of linear warm-up from 0"""
    schedule: Schedule = "cosine"
    """Learning rate after the warm-up: linear or cosine decay to 0 after the last step, or constant"""
    weight_decay: NotNegative = 0.01
    """Decoupled weight decay of AdamW"""
    held_out: Count = 256
    """Number of windows held out for the validation loss"""
    evaluate_every: Count = 500
    """Number of steps between two validations"""
    checkpoint_every: Count = 500
    """Number of steps between two checkpoints; every validation also saves one"""
    seed: int = 0
    """Seed of the initial weights, the held-out windows and the order of the others"""

    def __post_init__(self) -> None:
        check_ranges(self)
        check_seed("seed", self.seed)
        check_warmup(self.warmup, self.steps)
        self.training()

    def training(self) -> FinetuneConfig:
        """Return the settings of the training run."""
        names = ("steps", "batch_size", "accumulation", "lr", "warmup", "schedule", "weight_decay", "evaluate_every")
        settings = {name: getattr(self, name) for name in (*names, "checkpoint_every", "held_out", "seed")}
        return FinetuneConfig(method="full", betas=(0.9, 0.95), dropout=0.0, **settings)


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer, which encodes any text.

    Args:
      vocabulary: Largest number of tokens, at least `SMALLEST_VOCABULARY`. A short text may have fewer pairs to merge.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = import_fast_tokenizer()(tokenizer_object=backend, eos_token=END)
    return Tokenizer(tokenizer, eos_ids=(tokenizer.eos_token_id,), source="tokenizer of the pretraining text")


def prepare_windows(
    texts: Sequence[str], tokenizer: Tokenizer, shape: ModelShape, settings: PretrainSettings
) -> TrainingData:
    """Cut the text into windows, and batch them for training and validation.

    Returns:
      The batches. The summary has the numbers of windows, of their tokens and of the text's bytes, and the loss of the
      best guess that ignores the context: the cross-entropy of the held-out tokens under the frequencies of the
      training tokens, ``unigram_loss`` in nats per token.

    Raises:
      InputError: If the text has too few tokens for the held-out windows and a batch.
    """
    train, held_out = sample_windows(
        texts, tokenizer, seq=shape.context + 1, windows=None, held_out=settings.held_out, seed=settings.seed
    )
    if len(train) < settings.batch_size:
        raise InputError(
            f"text must have at least {settings.held_out + settings.batch_size} windows of {shape.context + 1} tokens, "
            f"got {settings.held_out + len(train)}"
        )
    size, widths = settings.batch_size, (shape.context,)
    batches = Batches(_examples(train), widths, batch_size=size, steps=settings.steps, seed=settings.seed)
    validation = Batches(_examples(held_out), widths, batch_size=size)
    summary = {
        "documents": len(texts),
        "bytes": sum(len(text.encode()) for text in texts),
        "trained_on": len(train),
        "validated_on": len(held_out),
        "tokens": train.size + held_out.size,
        "epochs": settings.steps / batches.steps_per_epoch,
        "unigram_loss": unigram_loss(train, held_out),
    }
    return TrainingData(batches, validation, summary)


def unigram_loss(train: Int[np.ndarray, "n s"], held_out: Int[np.ndarray, "m s"]) -> float:
    """Compute the cross-entropy of held-out tokens under the frequencies of the training tokens.

    Every token is counted once more than it occurs, so that a token that training lacks has a finite loss. The first
    token of a window is not predicted.

    Returns:
      The loss in nats per token.
    """
    counts = 1 + np.bincount(train.ravel(), minlength=int(max(train.max(), held_out.max())) + 1)
    return float(math.log(counts.sum()) - np.log(counts[held_out[:, 1:]]).mean())


def start_pretraining(
    data: TrainingData, tokenizer: Tokenizer, shape: ModelShape, settings: PretrainSettings, checkpoints: Path | None
) -> Trainer:
    """Construct the trainer of a model with random weights of the settings' seed.

    Args:
      checkpoints: Folder of the checkpoints, from the latest of which the run resumes; None writes none.

    Returns:
      The trainer, whose `Trainer.adapter` holds the trained weights in ``params``.
    """
    config = shape.llama_config(tokenizer)
    params = llama.init_params(jax.random.key(settings.seed), config)
    whole = WholeModelConfig().build(jax.random.key(settings.seed), config, params)
    # There is no frozen base.
    return Trainer({}, config, whole, settings.training(), data.train, data.validation, checkpoints)


def _examples(windows: Int[np.ndarray, "n s"]) -> Examples:
    """Return windows as examples in which every token but the first is a target."""
    count, length = windows.shape
    is_target = np.ones(windows.shape, bool)
    is_target[:, 0] = False
    return Examples(windows.ravel(), np.arange(count + 1) * length, is_target.ravel(), truncated=0, skipped=0)
