"""Tiny random models of transformers, and batches for them."""

import torch
import transformers

torch.set_num_threads(1)  # threads wait for each other longer than so small a model takes

VOCABULARY = 64
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**TEXT),
    "mistral": lambda: transformers.MistralConfig(**TEXT, sliding_window=4),
    "qwen2": lambda: transformers.Qwen2Config(**TEXT),
    "qwen3": lambda: transformers.Qwen3Config(**TEXT),
    "gemma": lambda: transformers.GemmaConfig(**TEXT),
    "phi3": lambda: transformers.Phi3Config(**TEXT),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, word_embed_proj_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    ),
    "mixtral": lambda: transformers.MixtralConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2),
    "vit": lambda: transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4,
        num_labels=3,
    ),
    "t5": lambda: transformers.T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, pad_token_id=0, eos_token_id=2,
        decoder_start_token_id=0,
    ),
}  # fmt: skip
"""By family."""


def model(family: str = "llama", seed: int = 0) -> torch.nn.Module:
    """In evaluation mode; weight matrices of standard deviation 0.2, so that every layer matters."""
    classes = {"vit": transformers.ViTForImageClassification, "t5": transformers.T5ForConditionalGeneration}
    torch.manual_seed(seed)
    config = CONFIGS[family]()
    own = classes[family](config) if family in classes else transformers.AutoModelForCausalLM.from_config(config)
    return initialised(own).eval()


def initialised(own: torch.nn.Module) -> torch.nn.Module:
    """With the weight matrices of `model`."""
    with torch.no_grad():
        for parameter in own.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.2)
    return own


def batch(family: str = "llama", seed: int = 0, rows: int = 3, length: int = 9) -> dict[str, torch.Tensor]:
    """Random tokens, all of them labels (or images with classes)."""
    random = torch.Generator().manual_seed(seed)
    if family == "vit":
        pixels = torch.randn((rows, 3, 8, 8), generator=random)
        return {"pixel_values": pixels, "labels": torch.randint(3, (rows,), generator=random)}
    tokens = torch.randint(3, VOCABULARY, (rows, length), generator=random)
    if family == "t5":
        return {"input_ids": tokens, "labels": tokens[:, : length - 4].clone()}
    return {"input_ids": tokens, "labels": tokens.clone()}
