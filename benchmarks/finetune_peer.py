"""The peer's side of benchmarks/finetune.py: transformers' LLaMA with peft's adapters, trained by a plain torch loop.

What transformers' Trainer does in a step, without its bookkeeping: forward, loss, backward, clipping, AdamW, schedule.
"""

import json
import os
import sys
import time
from typing import Any

import finetune
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, get_linear_schedule_with_warmup


def work(spec: dict[str, Any]) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: spec["cores"]])
    torch.manual_seed(0)
    gpu = spec.get("gpu", False)
    if gpu:
        shapes = finetune.llama_7b()
        with torch.device("cuda"):
            torch.set_default_dtype(torch.bfloat16)
            model: Any = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=shapes.vocab_size,
                    hidden_size=shapes.hidden_size,
                    intermediate_size=shapes.intermediate_size,
                    num_hidden_layers=shapes.num_hidden_layers,
                    num_attention_heads=shapes.num_attention_heads,
                )
            )
            torch.set_default_dtype(torch.float32)
            tokens = torch.randint(0, shapes.vocab_size, (16, 256))
        batches = [(tokens, torch.ones_like(tokens), tokens)]
    else:
        torch.set_num_threads(spec["cores"])
        model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32)
        batches = [tuple(torch.from_numpy(a).long() for a in arrays) for arrays in finetune.read(spec["batches"])]
    model.config.use_cache = False
    lora = LoraConfig(
        r=spec["rank"],
        lora_alpha=16,
        lora_dropout=spec["dropout"],
        target_modules=finetune.TARGETS,
        use_rslora=spec["method"] == "rora",
        use_dora=spec["method"] == "dora",
        task_type="CAUSAL_LM",
    )
    if gpu and spec["checkpointing"]:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    model = get_peft_model(model, lora)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-4, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 100, 1000)
    loss = 0.0

    def step(index: int) -> None:
        nonlocal loss
        tokens, mask, labels = batches[index % len(batches)]
        with torch.autocast("cuda", torch.bfloat16, enabled=gpu):
            out = model(input_ids=tokens, attention_mask=mask, labels=labels)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        loss = float(out.loss.detach())  # waits for the device

    begin = time.perf_counter()
    step(0)
    setup = {"first_step_seconds": time.perf_counter() - begin}
    for index in range(len(batches)):
        step(index)

    def report() -> dict[str, Any]:
        memory = torch.cuda.max_memory_allocated() / 1e9 if gpu else finetune.peak_memory_gb()
        return {"peak_memory_gb": memory, "loss": loss}

    finetune.serve(setup, step, report)


if __name__ == "__main__":
    work(json.loads(sys.argv[2]))
