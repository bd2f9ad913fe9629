"""LoRA, RoRA and DoRA against transformers and peft on a real model, in one run, float32 on CPU.

    python benchmarks/parity.py --model smollm2-135m --out parity.json

For each method peft makes an adapter (random A and B, none zero) and saves it; this package opens the folder. On the
same tokens both compute logits, the gradient of every adapter tensor, and the losses of AdamW steps. Then the adapter
trained here is saved and peft opens it. The first row, the model without an adapter, is the floor: what two ways to
order float32 sums differ by. Exit status 1 where a difference exceeds its bound.
"""

import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import torch
import transformers

from rora_theory.adapters import LoraAdapter, load_peft, save_peft
from rora_theory.llama import Model, forward, load
from rora_theory.llama.weights import save_hf
from sims.common import cli
from sims.common.run_folder import write_whole
from sims.common.tables import print_table

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
PATTERNS = {
    "rank_pattern": {r"layers\.[0-9]\.self_attn\.q_proj": 16, "down_proj": 4},
    "alpha_pattern": {"v_proj": 12, r"layers\.1\d\.mlp\.up_proj": 5.5},
}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora-rora": {"use_dora": True, "use_rslora": True},
    "lora-patterns": PATTERNS,
    "dora-rora-patterns": {"use_dora": True, "use_rslora": True, **PATTERNS},
}
BOUNDS = {"logits": 1e-5, "gradients": 1e-4, "losses": 1e-4, "back": 1e-5}
"""Largest accepted differences: of logits relative to the largest logit, of a gradient relative to its tensor's
largest entry, of a loss relative to itself."""


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = "smollm2-135m"
    """Model for both sides."""
    rank: int = 8
    """Rank of every adapter."""
    alpha: float = 16.0
    """Alpha of every adapter."""
    batch: int = 2
    """Sequences."""
    length: int = 32
    """Tokens a sequence, drawn at random from the vocabulary."""
    steps: int = 20
    """AdamW steps of the loss curve."""
    learning_rate: float = 1e-3
    """Constant rate of AdamW; the rest is torch's default."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Methods to compare."""
    out: Path | None = None
    """JSON file for the figures."""


def main(config: Config) -> bool:
    transformers.utils.logging.disable_progress_bar()
    model = load(config.model)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (config.batch, config.length))
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch) / "base"
        save_hf(base, model.params, model.config)

        def torch_base() -> transformers.LlamaForCausalLM:
            return transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")

        rows = [floor(model, torch_base(), tokens)]
        for name in config.methods:
            row = compare(config, model, torch_base, tokens, METHODS[name], Path(scratch))
            rows.append({"method": name, **row})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    columns = ("method", "parameters", "largest logit", "logits", "gradients", "losses", "back")
    print_table(
        f"{config.model} against transformers {transformers.__version__}, peft {peft.__version__}: largest differences",
        columns,
        [[_cell(row.get(column)) for column in columns] for row in rows],
    )
    if config.out is not None:
        write_whole(config.out, json.dumps({"config": dataclasses.asdict(config), "rows": rows}, indent=2, default=str))
    return all(row[key] <= bound for row in rows for key, bound in BOUNDS.items() if key in row)


def floor(model: Model, base: transformers.LlamaForCausalLM, tokens: np.ndarray) -> dict[str, Any]:
    """The row of the model without an adapter."""
    with torch.no_grad():
        theirs = base(torch.from_numpy(tokens)).logits.numpy()
    ours = np.asarray(jax.jit(forward, static_argnums=2)(model.params, jnp.asarray(tokens, jnp.int32), model.config))
    return {"method": "none", "largest logit": float(np.abs(theirs).max()), "logits": relative(ours, theirs)}


def compare(
    config: Config,
    model: Model,
    torch_base: Callable[[], transformers.LlamaForCausalLM],
    tokens: np.ndarray,
    settings: dict[str, Any],
    scratch: Path,
) -> dict[str, Any]:
    """One method: its differences, both ways."""
    torch.manual_seed(0)
    settings = {"r": config.rank, "lora_alpha": config.alpha, "target_modules": TARGETS, **settings}
    peer = peft.get_peft_model(torch_base(), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    adapted = {name: value for name, value in peer.named_parameters() if value.requires_grad}
    with torch.no_grad():
        for name, value in adapted.items():
            if "lora_B" in name:
                value.normal_(std=0.01)
            elif "magnitude" in name:
                value.mul_(1 + 0.05 * torch.randn_like(value))
    theirs, ours = scratch / "theirs", scratch / "ours"
    peer.save_pretrained(theirs)
    logits, gradients, losses = torch_side(peer, adapted, tokens, config)
    adapter = load_peft(theirs, model.config, model.params)
    our_logits, our_gradients, our_losses, trained, trained_logits = jax_side(adapter, model, tokens, config)
    save_peft(ours, trained)
    with torch.no_grad():
        opened = peft.PeftModel.from_pretrained(torch_base(), ours)
        back = opened(torch.from_numpy(tokens)).logits.numpy()
    if set(our_gradients) != set(gradients):
        raise SystemExit("the two sides train different tensors")
    return {
        "parameters": adapter.count(),
        "largest logit": float(np.abs(logits).max()),
        "logits": relative(our_logits, logits),
        "gradients": max(relative(our_gradients[name], gradients[name]) for name in gradients),
        "losses": float(np.abs(our_losses / losses - 1).max()),
        "back": relative(trained_logits, back),
        "first and last loss": [float(losses[0]), float(losses[-1])],
    }


def torch_side(
    peer: peft.PeftModel, adapted: dict[str, torch.nn.Parameter], tokens: np.ndarray, config: Config
) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    """Logits, gradients by name of the saved tensor, and losses."""
    ids = torch.from_numpy(tokens)
    optimizer = torch.optim.AdamW(adapted.values(), lr=config.learning_rate)
    losses, logits, gradients = [], None, {}
    for step in range(config.steps):
        optimizer.zero_grad()
        out = peer(ids).logits
        loss = torch.nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        if step == 0:
            logits = out.detach().numpy()
            for name, value in adapted.items():
                saved = name.replace(".default", "").replace("magnitude_vector.weight", "magnitude_vector")
                gradients[saved] = value.grad.numpy().copy()
        optimizer.step()
        losses.append(loss.item())
    return logits, gradients, np.asarray(losses)


def jax_side(
    adapter: LoraAdapter, model: Model, tokens: np.ndarray, config: Config
) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray, LoraAdapter, np.ndarray]:
    """Logits, gradients by peft's names, losses, the trained adapter and its logits."""
    ids = jnp.asarray(tokens, jnp.int32)
    optimizer = optax.adamw(config.learning_rate, eps=1e-8, weight_decay=0.01)

    @jax.jit
    def step(trained: Any, state: Any, params: Any) -> Any:
        def loss(trained: Any) -> Any:
            logits = forward(params, ids, model.config, adapter.replace(trained))
            each = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:])
            return jnp.mean(each), logits

        (value, logits), gradient = jax.value_and_grad(loss, has_aux=True)(trained)
        updates, state = optimizer.update(gradient, state, trained)
        return optax.apply_updates(trained, updates), state, value, logits, gradient

    trained, state = adapter.params, optimizer.init(adapter.params)
    losses, first, gradients = [], None, {}
    for index in range(config.steps):
        trained, state, value, logits, gradient = step(trained, state, model.params)
        losses.append(float(value))
        if index == 0:
            first, gradients = np.asarray(logits), by_peft_names(adapter.replace(gradient))
    _, _, _, logits, _ = step(trained, state, model.params)
    return first, gradients, np.asarray(losses), adapter.replace(trained), np.asarray(logits)


def by_peft_names(adapter: LoraAdapter) -> dict[str, np.ndarray]:
    """The adapter's tensors as `save_peft` writes them."""
    from safetensors.numpy import load_file

    with tempfile.TemporaryDirectory() as folder:
        save_peft(folder, adapter)
        return load_file(Path(folder) / "adapter_model.safetensors")


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest difference over the largest absolute value."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.1e}" if value < 0.01 else f"{value:.1f}"
    return str(value)


if __name__ == "__main__":
    config = cli.parse(Config, description=__doc__ or "")
    cli.run(lambda: sys.exit(0 if main(config) else 1))
