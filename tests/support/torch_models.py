"""Tiny random models of transformers, batches for them, and the state that a measurement must not change.

A test file that imports this module is skipped without the extra torch.
"""

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the bridge: the extra torch")
peft = pytest.importorskip("peft", reason="the bridge: the extra torch")
transformers = pytest.importorskip("transformers", reason="the bridge: the extra torch")

torch.set_num_threads(1)  # threads wait for each other longer than so small a model takes

VOCABULARY = 64
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**TEXT),
    "qwen2": lambda: transformers.Qwen2Config(**TEXT),
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


def model(family: str = "llama", seed: int = 0) -> Any:
    """Build a model in evaluation mode, with weight matrices of standard deviation 0.2, so that every layer matters."""
    classes = {"vit": transformers.ViTForImageClassification, "t5": transformers.T5ForConditionalGeneration}
    torch.manual_seed(seed)
    config = CONFIGS[family]()
    create = classes.get(family, transformers.AutoModelForCausalLM.from_config)
    return initialised(create(config)).eval()


def initialised(network: Any) -> Any:
    """Draw the weight matrices as `model` does."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.2)
    return network


def adapted(base: Any, rank: int = 2, **arguments: Any) -> Any:
    """Return a PEFT model with a fresh LoRA adapter on a base model."""
    arguments = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | arguments
    return peft.get_peft_model(base, peft.LoraConfig(r=rank, **arguments))


def batch(family: str = "llama", seed: int = 0, rows: int = 3, length: int = 9) -> dict[str, Any]:
    """Draw random tokens, all of them labels (or images with classes)."""
    random = torch.Generator().manual_seed(seed)
    if family == "vit":
        pixels = torch.randn((rows, 3, 8, 8), generator=random)
        return {"pixel_values": pixels, "labels": torch.randint(3, (rows,), generator=random)}
    tokens = torch.randint(3, VOCABULARY, (rows, length), generator=random)
    if family == "t5":
        return {"input_ids": tokens, "labels": tokens[:, : length - 4].clone()}
    return {"input_ids": tokens, "labels": tokens.clone()}


def padded(rows: list[list[int]], *, left: bool = False) -> dict[str, Any]:
    """Pad rows of tokens with 0 and label them, as a tokenizer and a collator do."""
    width = max(map(len, rows))
    ids, mask = torch.zeros((len(rows), width), dtype=torch.long), torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        columns = slice(width - len(row), width) if left else slice(len(row))
        ids[i, columns], mask[i, columns] = torch.tensor(row), 1
    tokens = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    return tokens if left else tokens | {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def state_of(model: Any) -> dict[str, Any]:
    """Return what a measurement could change: tensors, flags, modes, hooks, attributes and the random generator."""
    return {
        "tensors": {name: value.clone() for name, value in model.state_dict().items()}
        | {"random": torch.get_rng_state()},
        "parameters": {name: (id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()},
        "modules": {
            name: (id(module), module.training, len(module._forward_hooks)) for name, module in model.named_modules()
        },
        "attributes": {*vars(model), *getattr(model, "peft_config", ())},
    }


def assert_unchanged(model: Any, before: dict[str, Any]) -> None:
    """Assert that a model has the state that `state_of` returned, copies to the bit."""
    after = state_of(model)
    for name, value in before["tensors"].items():
        assert torch.equal(value, after["tensors"][name]), name
    for key in ("parameters", "modules", "attributes"):
        assert before[key] == after[key], key
