"""Compare LoRA, RoRA and DoRA with transformers and peft on a real model, in one run, on a CPU.

    python benchmarks/parity.py --model smollm2-135m --out parity.json

For each method, peft initialises an adapter (random A and B, none zero) and saves it; this package loads the folder. On
the same two texts, this package in float32, the peer in float32 and the peer in float64 compute the logits, the
gradient of every adapter tensor, and the losses of AdamW steps. The results are differences from the peer in float64,
because two float32 programs differ by the errors of both, and on a real model the peer's own error can exceed the
bound. (Its norms and softmax stay in float32 there too.) Then the adapter trained here is saved and loaded by peft:
``back``. The first row has no adapter. The exit status is 1 if a difference of this package exceeds its bound.
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
from hardware import silence_transformers

from rora_theory.lab.adapters import LoraAdapter, load_peft, save_peft
from rora_theory.lab.llama import Model, forward, load
from rora_theory.lab.llama.weights import save_hf
from rora_theory.runs.files import write_whole
from sims.common import cli
from sims.common.tables import print_table

TEXTS = (
    "The lighthouse keeper wrote every night in a thick book: the wind, the height of the waves, the ships that passed "
    "and the lamps that had to be cleaned. Once a year someone came from the mainland and carried the book away.",
    "To measure the depth of a well, drop a stone and count the seconds until it hits the water. Multiply the time by "
    "itself and then by five to get the depth in metres, but remember that the sound needs time to come back as well.",
)
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
class ParityOptions:
    model: str = "smollm2-135m"
    """Model for both sides."""
    rank: int = 8
    """Rank of every adapter."""
    alpha: float = 16.0
    """Alpha of every adapter."""
    length: int = 40
    """Number of tokens of each of the two texts."""
    steps: int = 20
    """Number of AdamW steps of the loss curve."""
    learning_rate: float = 2e-4
    """Constant learning rate of AdamW; its other settings are torch's defaults. At larger rates with alpha / sqrt(r),
    the model memorises the two texts within the steps, and rounding errors grow: at 1e-3, the peer's own float32 is off
    by 4%."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Methods to compare."""
    out: Path | None = None
    """JSON file for the results."""


def main(config: ParityOptions) -> bool:
    """Compare all methods, print and write the differences, and return whether all are within their bounds."""
    silence_transformers()
    model = load(config.model)
    tokens = np.asarray([model.tokenizer.encode(text)[: config.length] for text in TEXTS])
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch) / "base"
        save_hf(base, model.params, model.config)

        def torch_base() -> transformers.PreTrainedModel:
            return transformers.AutoModelForCausalLM.from_pretrained(
                base, dtype=torch.float32, attn_implementation="eager"
            )

        rows = [compare_base(model, torch_base, tokens)]
        for name in config.methods:
            row = compare(config, model, torch_base, tokens, METHODS[name], Path(scratch))
            rows.append({"method": name, **row})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    # A column for this package and one for the peer in float32, for each quantity.
    columns = ["method", "parameters"]
    columns += [name + suffix for name in ("logits", "gradients", "losses") for suffix in ("", ", peer")] + ["back"]
    print_table(
        f"{config.model}: largest differences from transformers {transformers.__version__} and peft {peft.__version__} "
        "in float64",
        columns,
        [[_cell(row.get(column)) for column in columns] for row in rows],
    )
    if config.out is not None:
        write_whole(config.out, json.dumps({"config": dataclasses.asdict(config), "rows": rows}, indent=2, default=str))
    return all(row[key] <= bound for row in rows for key, bound in BOUNDS.items() if key in row)


def compare_base(
    model: Model, torch_base: Callable[[], transformers.PreTrainedModel], tokens: np.ndarray
) -> dict[str, Any]:
    """Return the row of the base model."""
    ids = torch.from_numpy(tokens)
    with torch.no_grad():
        peer, reference = torch_base()(ids).logits.numpy(), torch_base().double()(ids).logits.numpy()
    ours = jax.jit(forward, static_argnums=2)(model.params, jnp.asarray(tokens, jnp.int32), model.config)
    return {
        "method": "none",
        "logits": relative(np.asarray(ours), reference),
        "logits, peer": relative(peer, reference),
    }


def compare(
    config: ParityOptions,
    model: Model,
    torch_base: Callable[[], transformers.PreTrainedModel],
    tokens: np.ndarray,
    settings: dict[str, Any],
    scratch: Path,
) -> dict[str, Any]:
    """Compare one method.

    Args:
      config: Settings of the benchmark.
      model: Model of this package.
      torch_base: Function that loads the peer's base model in float32.
      tokens: Token ids of the texts, [texts, length].
      settings: Settings of peft's LoraConfig in which the methods differ.
      scratch: Folder for the adapters.

    Returns:
      Row of differences from the peer in float64, those of this package and of the peer in float32.
    """
    torch.manual_seed(0)
    settings = {"r": config.rank, "lora_alpha": config.alpha, "target_modules": TARGETS, **settings}
    # An adapter whose factors and magnitudes are all random, saved by peft.
    peft_model = peft.get_peft_model(torch_base(), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, value in peft_model.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.01)
            elif "magnitude" in name:
                value.mul_(1 + 0.05 * torch.randn_like(value))
    theirs, ours = scratch / "theirs", scratch / "ours"
    peft_model.save_pretrained(theirs)
    # This package loads it, trains it and saves it.
    adapter = load_peft(theirs, model.config, model.params)
    logits, gradients, losses, trained, trained_logits = jax_side(adapter, model, tokens, config)
    save_peft(ours, trained)

    def load_in_peft(folder: Path, dtype: torch.dtype, trainable: bool = False) -> peft.PeftModel:
        return peft.PeftModel.from_pretrained(torch_base(), folder, is_trainable=trainable).to(dtype).eval()

    # peft loads the trained adapter, and trains its own in float32 and in float64.
    with torch.no_grad():
        back = load_in_peft(ours, torch.float32)(torch.from_numpy(tokens)).logits.numpy()
    peer = torch_side(load_in_peft(theirs, torch.float32, True), tokens, config)
    reference = torch_side(load_in_peft(theirs, torch.float64, True), tokens, config)
    row: dict[str, Any] = {"parameters": adapter.count(), "back": relative(trained_logits, back)}
    for suffix, side in (("", (logits, gradients, losses)), (", peer", peer)):
        if set(side[1]) != set(reference[1]):
            raise SystemExit("the two sides train different tensors")
        row["logits" + suffix] = relative(side[0], reference[0])
        row["gradients" + suffix] = max(relative(side[1][name], reference[1][name]) for name in reference[1])
        row["losses" + suffix] = float(np.abs(side[2] / reference[2] - 1).max())
    return row | {"first and last loss": [float(losses[0]), float(losses[-1])]}


def torch_side(
    peer: peft.PeftModel, tokens: np.ndarray, config: ParityOptions
) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    """Train with torch; return the first step's logits and gradients (by the saved tensors' names), and the losses."""
    ids = torch.from_numpy(tokens)
    adapted = {name: value for name, value in peer.named_parameters() if value.requires_grad}
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
    adapter: LoraAdapter, model: Model, tokens: np.ndarray, config: ParityOptions
) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray, LoraAdapter, np.ndarray]:
    """Train with this package, with torch's defaults for AdamW.

    Returns:
      The first step's logits and gradients (by peft's names), the losses, the trained adapter and its logits.
    """
    ids = jnp.asarray(tokens, jnp.int32)
    optimizer = optax.adamw(config.learning_rate, eps=1e-8, weight_decay=0.01)

    @jax.jit
    def step(trained: Any, state: Any, params: Any) -> Any:
        def loss(trained: Any) -> Any:
            logits = forward(params, ids, model.config, adapter.replace(trained))
            losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:])
            return jnp.mean(losses), logits

        (value, logits), gradient = jax.value_and_grad(loss, has_aux=True)(trained)
        updates, state = optimizer.update(gradient, state, trained)
        return optax.apply_updates(trained, updates), state, value, logits, gradient

    # The first step's logits and gradients are those of the loaded adapter.
    trained, state = adapter.params, optimizer.init(adapter.params)
    losses, first, gradients = [], None, {}
    for index in range(config.steps):
        trained, state, value, logits, gradient = step(trained, state, model.params)
        losses.append(float(value))
        if index == 0:
            first, gradients = np.asarray(logits), by_peft_names(adapter.replace(gradient))
    # One more evaluation gives the logits of the trained adapter; its update is discarded.
    _, _, _, logits, _ = step(trained, state, model.params)
    return first, gradients, np.asarray(losses), adapter.replace(trained), np.asarray(logits)


def by_peft_names(adapter: LoraAdapter) -> dict[str, np.ndarray]:
    """Return the adapter's tensors under the names that `save_peft` writes."""
    from safetensors.numpy import load_file

    with tempfile.TemporaryDirectory() as folder:
        save_peft(folder, adapter)
        return load_file(Path(folder) / "adapter_model.safetensors")


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return the largest absolute difference, divided by the largest absolute value of ``theirs``."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.1e}" if value < 0.01 else f"{value:.1f}"
    return str(value)


if __name__ == "__main__":
    cli.run_command(lambda: sys.exit(0 if main(cli.parse(ParityOptions, description=__doc__ or "")) else 1))
