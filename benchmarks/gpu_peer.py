"""Run one section of benchmarks/gpu.py with the peer: transformers' LLaMA and peft's adapters on torch, in bfloat16.

A training step is that of transformers' Trainer without its bookkeeping: forward and backward under autocast, the
adapter in float32, clipping, fused AdamW. Attention is torch's own fused kernel. Layers are checkpointed only if a step
would not fit the card otherwise. In a cell with "compiled", torch.compile compiles each layer.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import gpu
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
Work = Callable[[str], dict[str, Any]]
"""Function that runs the part of a given name and returns its results."""


def random_model(spec: dict[str, Any]) -> Any:
    """Return a model with random bfloat16 weights on the device."""
    config = LlamaConfig(**spec["sizes"]["model"], max_position_embeddings=2048, tie_word_embeddings=False)
    torch.manual_seed(0)
    with torch.device(device(spec)):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    return model.eval()


def device(spec: dict[str, Any]) -> str:
    """Return torch's name of the platform."""
    return spec["sizes"]["platform"]


def timed(spec: dict[str, Any], work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds until the result of a call is ready, and the result."""
    wait(spec)
    begin = time.perf_counter()
    result = work()
    wait(spec)
    return time.perf_counter() - begin, result


def wait(spec: dict[str, Any]) -> None:
    """Wait until the device has finished all work."""
    if device(spec) == "cuda":
        torch.cuda.synchronize()


def training(spec: dict[str, Any]) -> Work:
    """Time training steps on random tokens, without checkpointing if that fits the device."""
    model = random_model(spec).train()
    model.config.use_cache = False

    def run_named(name: str) -> dict[str, Any]:
        cell = gpu.Cell(**spec["cells"][name])
        for checkpointing in (False, True):
            try:
                return run_cell(spec, model, cell, checkpointing) | {"checkpointing": checkpointing}
            except torch.OutOfMemoryError:
                if checkpointing:
                    raise
            torch.cuda.empty_cache()
        raise AssertionError("the loop returns or raises")

    return run_named


def run_cell(spec: dict[str, Any], base: Any, cell: gpu.Cell, checkpointing: bool) -> dict[str, Any]:
    """Train a cell, and return the timings of its steps, the peak memory and the loss.

    Args:
      spec: Settings of the worker.
      base: Base model, which is restored afterwards.
      cell: Adapter and shape of the batch.
      checkpointing: Whether the layers are recomputed in the backward pass.
    """
    platform = device(spec)
    if platform == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    lora = LoraConfig(
        r=cell.rank,
        lora_alpha=16,
        lora_dropout=0.0,
        target_modules=TARGETS,
        use_dora=cell.method == "dora",
        task_type="CAUSAL_LM",
    )
    if checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    begin = time.perf_counter()
    model = get_peft_model(base, lora)
    try:
        if cell.compiled:
            for layer in base.model.layers:
                layer.compile(**({} if platform == "cuda" else {"backend": "aot_eager"}))
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=3e-4, weight_decay=0.0, fused=platform == "cuda" or None)
        tokens = torch.randint(0, base.config.vocab_size, (cell.rows, cell.width), device=platform)

        def step() -> float:
            with torch.autocast(platform, torch.bfloat16):
                out = model(input_ids=tokens, labels=tokens)
            out.loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return float(out.loss.detach())

        # The first two steps are a warm-up.
        first_seconds, _ = timed(spec, step)
        timings, loss = [], 0.0
        for number in range(1 + spec["sizes"]["steps"]):
            seconds, loss = timed(spec, step)
            timings += [seconds] if number else []
        summary = gpu.summarise_timings(timings)
        return summary | {
            "tokens_per_second": cell.rows * cell.width / summary["seconds"],
            "first_step_seconds": round(first_seconds, 2),
            "set_up_seconds": round(time.perf_counter() - begin, 2),
            "peak_bytes": torch.cuda.max_memory_allocated() if platform == "cuda" else None,
            "trainable": sum(weight.numel() for weight in trained),
            "loss": loss,
        }
    finally:
        # Remove everything that the cell has added to the base model.
        for layer in base.model.layers:
            layer._compiled_call_impl = None
        if cell.compiled:
            torch._dynamo.reset()
        if checkpointing:
            base.gradient_checkpointing_disable()
        model.unload()
        for parameter in base.parameters():
            parameter.grad = None


def scoring(spec: dict[str, Any]) -> Work:
    """Time log-likelihoods as lm-evaluation-harness computes them: a row for each choice, the longest first."""
    model = random_model(spec)
    items = gpu.random_items(spec["sizes"]["items"], model.config.vocab_size)
    rows = sorted((choice for item in items for choice in item), key=lambda choice: -len(choice[0]))

    @torch.inference_mode()
    def sum_scores(size: int) -> float:
        total = 0.0
        for start in range(0, len(rows), size):
            # Pad the rows on the right; the last token of a row is not read.
            group = rows[start : start + size]
            width = max(len(tokens) - 1 for tokens, _ in group)
            inputs = torch.zeros((len(group), width), dtype=torch.long)
            for number, (tokens, _) in enumerate(group):
                inputs[number, : len(tokens) - 1] = torch.tensor(tokens[:-1])
            logits = model(input_ids=inputs.to(device(spec))).logits
            log_probabilities = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
            # Sum the log-probabilities of each choice's own tokens.
            for number, (tokens, count) in enumerate(group):
                end = len(tokens) - 1
                gold = torch.tensor(tokens[-count:], device=log_probabilities.device)[:, None]
                total += float(log_probabilities[number, end - count : end].gather(1, gold).sum())
        return total

    def score(_: str) -> dict[str, Any]:
        cold, _ = timed(spec, lambda: sum_scores(32))
        # The faster of two batch sizes counts.
        by_size = {size: timed(spec, lambda size=size: sum_scores(size))[0] for size in (32, 128)}
        seconds = min(by_size.values())
        _, total = timed(spec, lambda: sum_scores(32))
        return {"seconds": seconds, "by_batch_size": by_size, "cold_seconds": cold, "total": total} | {
            "items_per_second": len(items) / seconds
        }

    return score


def generation(spec: dict[str, Any]) -> Work:
    """Time transformers' `generate` at 4 beams, all prompts together, padded on the left."""
    model = random_model(spec)
    sizes = spec["sizes"]
    prompts = gpu.random_prompts(sizes["prompts"], model.config.vocab_size)
    # Pad on the left, so that every prompt ends at the last position.
    width = max(map(len, prompts))
    inputs = torch.zeros((len(prompts), width), dtype=torch.long)
    mask = torch.zeros_like(inputs)
    for number, prompt in enumerate(prompts):
        inputs[number, width - len(prompt) :] = torch.tensor(prompt)
        mask[number, width - len(prompt) :] = 1
    inputs, mask = inputs.to(device(spec)), mask.to(device(spec))
    model.generation_config.eos_token_id = None

    @torch.inference_mode()
    def texts() -> Any:
        return model.generate(
            input_ids=inputs,
            attention_mask=mask,
            num_beams=4,
            max_new_tokens=sizes["new_tokens"],
            do_sample=False,
            pad_token_id=0,
        )

    def generate(_: str) -> dict[str, Any]:
        cold, _ = timed(spec, texts)
        seconds, generated = timed(spec, texts)
        assert generated.shape[1] == width + sizes["new_tokens"]
        return {"seconds": seconds, "cold_seconds": cold, "items_per_second": len(prompts) / seconds}

    return generate


SECTIONS = {"training": training, "scoring": scoring, "generation": generation}

if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    gpu.run_parts(arguments, SECTIONS[arguments["section"]](arguments))
