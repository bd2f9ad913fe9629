"""Make tests/golden/adapters/ with transformers and peft, and check that peft loads the files of this package.

    python tests/golden/make_adapters.py

Every case is a folder as peft saves it (configuration and tensors, all random and non-zero, so that nothing
agrees because it vanishes) with `golden.npz`: logits, the gradient of the mean next-token loss in every
adapter tensor, and the losses of 20 AdamW steps. The base model is a tiny LLaMA with biases whose weights
`base_weights` makes from a seed here and in the tests alike.
"""

import dataclasses
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "adapters"
SHAPE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": True,
    "mlp_bias": True,
    "max_position_embeddings": 64,
}
PAPER = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
PATTERNS = {
    "rank_pattern": {
        "layers.1.self_attn.q_proj": 6,
        "down_proj": 2,
        r"model\.layers\.[02]\.self_attn\.k_proj": 3,
    },
    "alpha_pattern": {"v_proj": 3.5, r"layers\.[02]\.mlp\.up_proj": 7, "self_attn.q_proj": 12},
}
CASES = {
    "lora": {"r": 4, "lora_alpha": 8, "target_modules": PAPER},
    "rora": {"r": 4, "lora_alpha": 2.5, "use_rslora": True, "target_modules": ["o_proj", "gate_proj"]}
    | {"layers_to_transform": [0, 2]},
    "dora": {"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": "all-linear"},
    "lora_patterns": {"r": 4, "lora_alpha": 8, "target_modules": PAPER, **PATTERNS},
    "dora_rora_patterns": {
        "r": 4,
        "lora_alpha": 3,
        "use_rslora": True,
        "use_dora": True,
        "target_modules": PAPER,
    }
    | PATTERNS,
    "regex": {"r": 2, "lora_alpha": 1, "target_modules": r"model\.layers\.(0\.self_attn|2\.mlp)\..*_proj"},
}
STEPS, RATE = 20, 1e-3
TOKENS = np.random.default_rng(7).integers(0, SHAPE["vocab_size"], (2, 12))


def base_weights() -> dict[str, np.ndarray]:
    """Return the base model's state dict by Hugging Face's names, in float32."""
    rng = np.random.default_rng(0)

    def uniform(*shape: int) -> np.ndarray:
        return ((rng.random(shape) * 2 - 1) * 3**0.5).astype(np.float32)

    width, inner, vocabulary = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["vocab_size"]
    keys = SHAPE["num_key_value_heads"] * SHAPE["head_dim"]
    weights = {"model.embed_tokens.weight": uniform(vocabulary, width)}
    for layer in range(SHAPE["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}{name}.weight"] = 1 + 0.1 * uniform(width)
        for name, out, into in (
            ("self_attn.q_proj", width, width),
            ("self_attn.k_proj", keys, width),
            ("self_attn.v_proj", keys, width),
            ("self_attn.o_proj", width, width),
            ("mlp.gate_proj", inner, width),
            ("mlp.up_proj", inner, width),
            ("mlp.down_proj", width, inner),
        ):
            weights[f"{prefix}{name}.weight"] = uniform(out, into) / np.float32(into**0.5)
            weights[f"{prefix}{name}.bias"] = 0.1 * uniform(out)
    weights["model.norm.weight"] = 1 + 0.1 * uniform(width)
    weights["lm_head.weight"] = uniform(vocabulary, width) / np.float32(width**0.5)
    return weights


def torch_base():
    """Return the base model in transformers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation="eager"))
    model.load_state_dict({name: torch.from_numpy(value) for name, value in base_weights().items()})
    return model.eval()


def torch_loss(model):
    """Compute the mean cross-entropy of the next token over all positions."""
    import torch

    tokens = torch.from_numpy(TOKENS)
    logits = model(tokens).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()), logits


def make(name: str, settings: dict) -> None:
    """Write one case."""
    import torch
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(torch_base(), LoraConfig(task_type="CAUSAL_LM", **settings))
    rng = np.random.default_rng(1)
    adapted = {key: value for key, value in model.named_parameters() if value.requires_grad}
    with torch.no_grad():
        for key, value in adapted.items():
            noise = torch.from_numpy((rng.random(tuple(value.shape)) * 2 - 1).astype(np.float32))
            value.copy_(value * (1 + 0.2 * noise) if "magnitude" in key else 0.3 * noise)
    folder = FOLDER / name
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()  # peft writes a set: sorted, so that the file is the same every time
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    loss, logits = torch_loss(model)
    loss.backward()
    arrays = {"logits": logits.detach().numpy(), "count": np.asarray(model.get_nb_trainable_parameters()[0])}
    for key, value in adapted.items():
        saved_name = key.replace(".default", "").removesuffix(".weight" if "magnitude" in key else "")
        arrays[f"grad:{saved_name}"] = value.grad.numpy()
    losses = train(model, adapted.values())
    np.savez_compressed(folder / "golden.npz", losses=losses, **arrays)


def train(model, trained) -> np.ndarray:
    """Return the losses of AdamW steps on the trained tensors of a model."""
    import torch

    optimizer = torch.optim.AdamW(trained, lr=RATE)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss, _ = torch_loss(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return np.asarray(losses)


def peft_logits(folder: Path | str) -> np.ndarray:
    """Return what peft computes with the adapter in a folder."""
    import torch
    from peft import PeftModel

    with torch.no_grad():
        return torch_loss(PeftModel.from_pretrained(torch_base(), folder))[1].numpy()


def peft_difference(adapter, expected) -> float:
    """Return the largest difference between logits and those that peft computes with our file of an adapter."""
    from rora_theory.lab.adapters import save_peft

    with tempfile.TemporaryDirectory() as folder:
        save_peft(folder, adapter)
        return float(np.abs(peft_logits(folder) - np.asarray(expected)).max())


def check_ours(name: str) -> float:
    """Read a case with this package, and return the difference of peft's logits on our file from those of the case."""
    from rora_theory.lab.adapters import load_peft
    from rora_theory.lab.llama import LlamaConfig

    adapter = load_peft(FOLDER / name, LlamaConfig(**SHAPE))
    return peft_difference(adapter, np.load(FOLDER / name / "golden.npz")["logits"])


def check_exponent() -> float:
    """Compare the logits of an adapter of kappa = 1/4, with ranks and alphas by layer, with peft's on our file."""
    import jax.numpy as jnp

    from rora_theory.lab.adapters import load_peft
    from rora_theory.lab.adapters.lora import assemble_lora
    from rora_theory.lab.llama import LlamaConfig, forward

    config = LlamaConfig(**SHAPE)
    read = load_peft(FOLDER / "lora_patterns", config)
    adapter = assemble_lora(dataclasses.replace(read.config, rule=0.25), read.targets, read.params)
    return peft_difference(adapter, forward(base_params(), jnp.asarray(TOKENS), config, adapter))


def base_params():
    """Return the base model's weights in this package's layout."""
    import jax.numpy as jnp

    from rora_theory.lab.llama import MODULES

    weights = base_weights()

    def stacked(name: str):
        layers = range(SHAPE["num_hidden_layers"])
        return jnp.asarray(np.stack([weights[f"model.layers.{layer}.{name}"] for layer in layers]))

    norms = {name: stacked(f"{name}.weight") for name in ("input_layernorm", "post_attention_layernorm")}
    modules = {name: {kind: stacked(f"{name}.{kind}") for kind in ("weight", "bias")} for name in MODULES}
    return {
        "embed_tokens": jnp.asarray(weights["model.embed_tokens.weight"]),
        "layers": norms | modules,
        "norm": jnp.asarray(weights["model.norm.weight"]),
        "lm_head": jnp.asarray(weights["lm_head.weight"]),
    }


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    worst = {}
    for name, settings in CASES.items():
        make(name, settings)
        worst[name] = check_ours(name)
    worst["kappa = 1/4"] = check_exponent()
    for name, difference in worst.items():
        print(f"{name}: peft on our file differs by at most {difference:.1e}")
    if max(worst.values()) > 1e-5:
        sys.exit("peft does not compute from our files what it saved")


if __name__ == "__main__":
    main()
