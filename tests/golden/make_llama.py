"""Write the logits of tiny random LLaMA models by transformers: `llama.json` (configurations) and `llama.npz` (arrays).

    python tests/golden/make_llama.py

needs the extra ``peers``. The weights are drawn from NumPy's generator by tensor name, here and in the tests, so that
the files hold none.
"""

import json
import zlib
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
SIZES = {
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Of eight pairs the llama3 scaling keeps some, stretches some and interpolates the rest.
WIDE = {"hidden_size": 64, "head_dim": 16}
VARIANTS: dict[str, dict] = {
    "llama1": {"rms_norm_eps": 1e-6, "max_sequence_length": 128, "pretraining_tp": 1},
    "llama2": {"num_key_value_heads": 4, "rope_scaling": None, "attention_bias": False},
    "llama3": {"num_key_value_heads": 2, "rope_theta": 500000.0, "eos_token_id": [2, 3]},
    "llama31": {
        **WIDE,
        "num_key_value_heads": 1,
        "rope_theta": 10000.0,
        "rope_scaling": {"rope_type": "llama3", **LLAMA3},
    },
    "llama31_new_names": {
        **WIDE,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 20000.0, **LLAMA3},
    },
    "linear": {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "smollm2": {
        "hidden_size": 24,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
    },
    "head_dim": {"num_key_value_heads": 2, "head_dim": 12},
    "attention_bias": {"num_key_value_heads": 2, "attention_bias": True},
    "mlp_bias": {"num_key_value_heads": 2, "mlp_bias": True},
    "left_padded": {"num_key_value_heads": 2},
}
BATCH, LENGTH = 2, 24


def draw(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Draw tensor ``name`` of a random model in float32, large enough that every part affects the logits."""
    values = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape)
    if name.endswith("norm.weight"):
        return (1 + 0.3 * values).astype(np.float32)
    if name.endswith("bias"):
        return (0.5 * values).astype(np.float32)
    # Unit logits and attention scores: weights of variance 1 / fan-in, embeddings of variance 1.
    return (values if "embed" in name else values / np.sqrt(shape[-1])).astype(np.float32)


def batch(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and attention mask of a variant: int32 [BATCH, LENGTH]."""
    tokens = np.random.default_rng(zlib.crc32(name.encode())).integers(0, SIZES["vocab_size"], (BATCH, LENGTH))
    mask = np.ones((BATCH, LENGTH), np.int32)
    if name.endswith("padded"):
        mask[1, :9] = 0
    return tokens.astype(np.int32), mask


def peer_model(config: dict):
    """Return transformers' model of a configuration with the weights that `draw` gives its parameters."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**json.loads(json.dumps(config))), attn_implementation="eager"
    )
    weights = {name: torch.tensor(draw(name, tuple(value.shape))) for name, value in model.named_parameters()}
    model.load_state_dict(weights, strict=not config["tie_word_embeddings"])
    return model.eval()


def main() -> None:
    import torch
    import transformers

    arrays, configs = {}, {}
    for name, change in VARIANTS.items():
        config = SIZES | change
        tokens, mask = batch(name)
        with torch.no_grad():
            out = peer_model(config)(torch.tensor(tokens).long(), attention_mask=torch.tensor(mask)).logits
        arrays[name] = out.numpy()
        configs[name] = config
    np.savez_compressed(HERE / "llama.npz", **arrays)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    text = json.dumps({"made_with": versions, "configs": configs}, indent=1)
    (HERE / "llama.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
