"""The peer's side of benchmarks/gpu.py: transformers' LLaMA with peft's adapters on torch, in bfloat16.

Training is what transformers' Trainer does in a step, without its bookkeeping: forward and backward under autocast, the
adapter in float32, clipping, fused AdamW. Attention is torch's own fused kernel. Layers are checkpointed only where the
card would not hold a step otherwise. "compiled" has each layer compiled by torch.compile.
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


def made_model(spec: dict[str, Any]) -> Any:
    """Random bfloat16 weights on the device."""
    config = LlamaConfig(**spec["sizes"]["model"], max_position_embeddings=2048, tie_word_embeddings=False)
    torch.manual_seed(0)
    with torch.device(device(spec)):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    return model.eval()


def device(spec: dict[str, Any]) -> str:
    """torch's name of the platform."""
    return spec["sizes"]["platform"]


def timed(spec: dict[str, Any], work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds until the result is there, and the result."""
    wait(spec)
    begin = time.perf_counter()
    found = work()
    wait(spec)
    return time.perf_counter() - begin, found


def wait(spec: dict[str, Any]) -> None:
    """Until the device has done all."""
    if device(spec) == "cuda":
        torch.cuda.synchronize()


def training(spec: dict[str, Any]) -> Work:
    """Steps of training on random tokens."""
    model = made_model(spec).train()
    model.config.use_cache = False

    def cell(name: str) -> dict[str, Any]:
        one = gpu.Cell(**spec["cells"][name])
        for checkpointing in (False, True):
            try:
                return run_cell(spec, model, one, checkpointing) | {"checkpointing": checkpointing}
            except torch.OutOfMemoryError:
                if checkpointing:
                    raise
            torch.cuda.empty_cache()
        raise AssertionError("a cell ends in the loop")

    return cell


def run_cell(spec: dict[str, Any], base: Any, cell: gpu.Cell, checkpointing: bool) -> dict[str, Any]:
    """Timings of a cell's steps, peak memory and loss; the base is as before afterwards."""
    on = device(spec)
    if on == "cuda":
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
                layer.compile(**({} if on == "cuda" else {"backend": "aot_eager"}))
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=3e-4, weight_decay=0.0, fused=on == "cuda" or None)
        tokens = torch.randint(0, base.config.vocab_size, (cell.rows, cell.width), device=on)

        def step() -> float:
            with torch.autocast(on, torch.bfloat16):
                out = model(input_ids=tokens, labels=tokens)
            out.loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return float(out.loss.detach())

        first, _ = timed(spec, step)
        timings, loss = [], 0.0
        for number in range(1 + spec["sizes"]["steps"]):
            seconds, loss = timed(spec, step)
            timings += [seconds] if number else []
        return gpu.middle(timings) | {
            "tokens_per_second": cell.rows * cell.width / gpu.middle(timings)["seconds"],
            "first_step_seconds": round(first, 2),
            "set_up_seconds": round(time.perf_counter() - begin, 2),
            "peak_bytes": torch.cuda.max_memory_allocated() if on == "cuda" else None,
            "trainable": sum(p.numel() for p in trained),
            "loss": loss,
        }
    finally:
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
    """Log-likelihoods as lm-evaluation-harness asks for them: a row a choice, longest first, 32 rows a call."""
    model = made_model(spec)
    items = gpu.made_items(spec["sizes"]["items"], model.config.vocab_size)
    rows = sorted((choice for item in items for choice in item), key=lambda choice: -len(choice[0]))

    @torch.inference_mode()
    def run(size: int) -> float:
        total = 0.0
        for start in range(0, len(rows), size):
            group = rows[start : start + size]
            width = max(len(tokens) - 1 for tokens, _ in group)
            inputs = torch.zeros((len(group), width), dtype=torch.long)
            for number, (tokens, _) in enumerate(group):
                inputs[number, : len(tokens) - 1] = torch.tensor(tokens[:-1])
            logits = model(input_ids=inputs.to(device(spec))).logits
            found = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
            for number, (tokens, count) in enumerate(group):
                end = len(tokens) - 1
                gold = torch.tensor(tokens[-count:], device=found.device)[:, None]
                total += float(found[number, end - count : end].gather(1, gold).sum())
        return total

    def score(_: str) -> dict[str, Any]:
        cold, _ = timed(spec, lambda: run(32))
        tried = {size: timed(spec, lambda size=size: run(size))[0] for size in (32, 128)}
        seconds = min(tried.values())
        _, total = timed(spec, lambda: run(32))
        return {"seconds": seconds, "by_batch_size": tried, "cold_seconds": cold, "total": total} | {
            "items_per_second": len(items) / seconds
        }

    return score


def generation(spec: dict[str, Any]) -> Work:
    """transformers' `generate` at 4 beams, all prompts together, padded on the left."""
    model = made_model(spec)
    sizes = spec["sizes"]
    prompts = gpu.made_prompts(sizes["prompts"], model.config.vocab_size)
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
        seconds, found = timed(spec, texts)
        assert found.shape[1] == width + sizes["new_tokens"]
        return {"seconds": seconds, "cold_seconds": cold, "items_per_second": len(prompts) / seconds}

    return generate


SECTIONS = {"training": training, "scoring": scoring, "generation": generation}

if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    gpu.each(given, SECTIONS[given["section"]](given))
