"""Peer of benchmarks/finetune.py: transformers' LLaMA with peft's adapters, trained by a plain torch loop.

A step is that of transformers' Trainer without its bookkeeping: forward, loss, backward, clipping, AdamW, schedule.
"""

import json
import os
import sys
import time
from typing import Any

import finetune
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup


def work(spec: dict[str, Any]) -> None:
    """Run the peer's side in a worker process, with the settings of `finetune.work`."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: spec["cores"]])
    torch.manual_seed(0)
    torch.set_num_threads(spec["cores"])
    # Model, adapter, optimizer and schedule, with the settings of this package's side.
    model: Any = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32)
    batches = [tuple(torch.from_numpy(array).long() for array in arrays) for arrays in finetune.read(spec["batches"])]
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
    model = get_peft_model(model, lora)
    model.train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-4, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 100, 1000)
    loss = 0.0

    def step(index: int) -> None:
        nonlocal loss
        tokens, mask, labels = batches[index % len(batches)]
        out = model(input_ids=tokens, attention_mask=mask, labels=labels)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        loss = float(out.loss.detach())

    # Warm-up, as on this package's side.
    begin = time.perf_counter()
    step(0)
    setup = {"first_step_seconds": time.perf_counter() - begin}
    for index in range(len(batches)):
        step(index)

    def report() -> dict[str, Any]:
        return {"peak_memory_gb": finetune.peak_memory_gb(), "loss": loss}

    finetune.serve(setup, step, report)


if __name__ == "__main__":
    work(json.loads(sys.argv[2]))
