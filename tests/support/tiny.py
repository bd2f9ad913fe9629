"""Tiny models, an encoder of bytes and invented records."""

from dataclasses import replace

import jax
import numpy as np

from rora_theory.lab.finetune import Record
from rora_theory.lab.llama import LlamaConfig, init_params

CONFIG = LlamaConfig(
    vocab_size=128, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, max_position_embeddings=512, eos_token_id=2,
)  # fmt: skip
WIDE = LlamaConfig(
    700, 32, 96, 2, 4, 2, 8, 1e-5, max_position_embeddings=512, bos_token_id=1, eos_token_id=(2, 3), pad_token_id=2
)
"""Model with grouped queries, rows of whole quantisation blocks, and an embedding for each token of `gguf_files`."""
WINDOWED = replace(WIDE, model_type="mistral", sliding_window=7)
LARGE = LlamaConfig(1024, 256, 768, 8, 4, 4, 64, max_position_embeddings=128)
"""Model with nearly all of its weights in the layers, and with more of them than of anything else in a step."""


class ByteEncoder:
    """Encoder with one token for each byte after a beginning token 1; the end token is 2."""

    eos_id = 2

    def encode_batch(self, texts):
        return [[1, *text.encode()] for text in texts]


def params(seed=0, config=CONFIG):
    """Draw weights of standard deviation 0.2, large enough at this width for every layer to matter."""
    plain = init_params(jax.random.key(seed), config)
    return jax.tree.map_with_path(lambda path, a: a if path[-1].key.endswith("norm") else 10.0 * a, plain)


def records(count, seed=0, longest=60):
    """Return records whose instructions have 1 to ``longest`` letters."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, longest + 1, count)
    return [
        Record("".join(chr(97 + letter) for letter in random.integers(0, 26, length)), f"answer{i % 4}")
        for i, length in enumerate(lengths)
    ]
