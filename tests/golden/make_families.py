"""Write `families.npz`: what transformers and peft compute with tiny models other than LLaMA.

    python tests/golden/make_families.py

needs the extra ``peers``. Of every variant: logits; the gradient of the loss in every weight, a matrix's times a random
vector. Of some: the last logits under a LoRA adapter on every linear module, and the adapter's tensors by name; the
logits under a prefix; what is generated, greedily and with beams. Weights are drawn as `make_llama` draws them.
"""

import json
import zlib
from pathlib import Path

import numpy as np
from make_generation import generate
from make_llama import SIZES, batch, draw, peer_model

HERE = Path(__file__).parent
WINDOW = {"sliding_window": 5, "use_sliding_window": True, "num_hidden_layers": 3}
VARIANTS: dict[str, dict] = {
    "mistral": {"model_type": "mistral", "num_key_value_heads": 2, "head_dim": 12, "sliding_window": 5},
    "mistral_padded": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 5},
    "mistral_no_window": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None},
    "qwen2": {
        "model_type": "qwen2",
        "num_key_value_heads": 2,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "sliding_window": 5,
        "use_sliding_window": False,
        "max_window_layers": 1,
    },
    "qwen2_window": {"model_type": "qwen2", "num_key_value_heads": 2, **WINDOW, "max_window_layers": 2},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 12, "tie_word_embeddings": True},
    "qwen3_window_padded": {
        "model_type": "qwen3",
        "num_key_value_heads": 1,
        "head_dim": 8,
        "attention_bias": True,
        **WINDOW,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    },
    # Two periods of one windowed and one full layer, as from the pattern; heads wider than hidden_size / heads.
    "gemma3": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 4,
        "num_key_value_heads": 1,
        "head_dim": 12,
        "query_pre_attn_scalar": 20,
        "hidden_act": "gelu_pytorch_tanh",
        "pad_token_id": None,  # its embedding would get no gradient in torch
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "tie_word_embeddings": True,
        "sliding_window": 5,
        "sliding_window_pattern": 2,
    },
    "gemma3_padded": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "hidden_act": "gelu_pytorch_tanh",
        "pad_token_id": None,  # its embedding would get no gradient in torch
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 100.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
        },
        "tie_word_embeddings": False,
        "sliding_window": 5,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
}
LAST = 4
RANK, ALPHA, PREFIX = 4, 8.0, 3
# With LoRA: no biases; some; one on every module but the feed-forward's; norms of the outputs of modules.
ADAPTED = ("mistral", "qwen2", "qwen3_window_padded", "gemma3")
GENERATED = ("mistral", "qwen2_window", "qwen3_window_padded", "gemma3")
PREFIXED = ("mistral", "qwen2_window", "gemma3")
NEW_TOKENS = 10
BEAMS = 3


def prompts(name: str) -> list[list[int]]:
    """Return three prompts, the first longer than the window and the second shorter; token 0 pads."""
    random = np.random.default_rng(zlib.crc32(name.encode()) + 1)
    return [random.integers(3, SIZES["vocab_size"], count).tolist() for count in (14, 2, 6)]


def reduced(name: str, gradient: np.ndarray) -> np.ndarray:
    """Reduce a weight's gradient for storage: a matrix [out, in] times a vector drawn by name, [out]."""
    return gradient if gradient.ndim == 1 else gradient @ draw(f"direction:{name}", gradient.shape[1:])


def main() -> None:
    import peft
    import torch
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    arrays = {"made_with": np.array(json.dumps(versions))}
    for name, change in VARIANTS.items():
        config = SIZES | change
        model = peer_model(config)
        tokens, mask = (torch.tensor(part).long() for part in batch(name))
        # Positions count real tokens, as they do in generation.
        inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        logits = model(tokens, **inputs).logits
        token_losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none"
        )
        (token_losses * mask[:, :-1]).sum().backward()
        arrays[f"{name}/logits"] = logits.detach().numpy()
        for key, value in model.named_parameters():
            arrays[f"{name}/gradient/{key}"] = reduced(key, value.grad.numpy())
        for beams in (1, BEAMS) if name in GENERATED else ():
            new = generate(model, prompts(name), {"num_beams": beams}, [], NEW_TOKENS)
            arrays[f"{name}/generated/{beams}"] = np.array(new)
        if name in PREFIXED:  # tokens that leave the window as any other
            prefix = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PREFIX)
            with torch.no_grad():
                prefixed = peft.get_peft_model(model, prefix).eval()
                (embedding,) = prefixed.prompt_encoder["default"].parameters()
                embedding.copy_(torch.tensor(draw("prefix", tuple(embedding.shape))))
                arrays[f"{name}/prefixed"] = prefixed(tokens, attention_mask=mask).logits.numpy()
        if name not in ADAPTED:
            continue
        settings = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, use_rslora=True, target_modules="all-linear")
        adapted = peft.get_peft_model(model, settings).eval()
        trained = {key: value for key, value in adapted.named_parameters() if "lora_" in key}
        drawn = {key: torch.tensor(draw(key, tuple(value.shape))) for key, value in trained.items()}
        adapted.load_state_dict(drawn, strict=False)
        with torch.no_grad():
            arrays[f"{name}/adapted"] = adapted(tokens, **inputs).logits[:, -LAST:].numpy()
        names = {key: list(value.shape) for key, value in peft.get_peft_model_state_dict(adapted).items()}
        arrays[f"{name}/adapter"] = np.array(json.dumps(names))
    np.savez_compressed(HERE / "families.npz", **arrays)


if __name__ == "__main__":
    main()
