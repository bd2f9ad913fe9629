"""Peak memory of a fine-tuning step on a CPU: beside `sims.capacity`'s plan, and beside torch + peft + bitsandbytes.

    python benchmarks/memory.py --out memory.json          SmolLM2-135M, LoRA r = 8, 4 x 64 tokens, minutes on two cores

In float32 on 1, 2 and 4 host devices that share the weights; on a base in bfloat16, 8 and 4 bits; and the peer's on
float32, bfloat16 and bitsandbytes' int8 and nf4 (where that is installed). Each measurement is a process of its own,
and the figures are written after every round of them. A step's peak is what its arrays took before it and what the
process's resident memory grew by in it, a device's share; so what Python, the libraries and the loading of a model take
is left out, on both sides. Random weights here, the model's own there. Linux alone tells.
"""

import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from finetune import HERE, TARGETS, middle
from hardware import PACKAGES, in_words, machine

from rora_theory.validation.ranges import Count, check_ranges

OURS = ("float32", "bfloat16", "q8_0", "q4_1", "q4_0")
PEER = ("float32", "bfloat16", "int8", "nf4")


@dataclass(frozen=True)
class Config:
    model: str = "smollm2-135m"
    """model to train; of this package's side the shapes alone"""
    rounds: Count = 3
    """processes of each measurement; the median stands"""
    rows: Count = 4
    """records a step"""
    seq: Count = 64
    """tokens a record"""
    rank: Count = 8
    """of LoRA on q, k, v, up and down"""
    cores: Count = 2
    """cores that a process runs on"""
    out: Path | None = None
    """JSON file for the figures"""

    def __post_init__(self) -> None:
        check_ranges(self)


def ours(spec: dict[str, Any]) -> dict[str, Any]:
    """This package's side of a measurement: planned, by the compiler's account, and measured, each device's bytes."""
    import jax

    jax.config.update("jax_num_cpu_devices", spec["devices"])
    from rora_theory.finetune import FinetuneConfig, capacity, sharding
    from rora_theory.finetune.sharding import Layout

    dense = spec["base"] in ("float32", "bfloat16")
    own = {"dtype": spec["base"]} if dense else {"dtype": "float32", "quantization": spec["base"]}
    run = FinetuneConfig(rule="lora", rank=spec["rank"], alpha=16.0, dropout=0.0, batch_size=spec["rows"], **own)
    layout = None if spec["devices"] == 1 else Layout(sharding.mesh(1, spec["devices"], devices=jax.devices()))
    model = capacity.find_model(spec["model"])
    planned = capacity.account(model, run, spec["seq"], layout)
    found = capacity.measure_step(model, run, spec["seq"], layout)
    most = planned.on_cpu(run.dtype)
    figures = {"planned": planned.total, "on_cpu": most, "program": found.program.total, "peak": found.peak}
    return figures | {f"{name}_bytes": size for name, size in planned.parts().items()}


def peer(spec: dict[str, Any]) -> dict[str, Any]:
    """The peer's: peft's LoRA on transformers' model, its linear layers bitsandbytes' where the base is int8 or nf4."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from rora_theory.finetune import capacity

    torch.set_num_threads(spec["cores"])
    dense = spec["base"] in ("float32", "bfloat16")
    settings: dict[str, Any] = {"dtype": getattr(torch, spec["base"]) if dense else torch.float32}
    if not dense:
        four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        bits = {"load_in_8bit": True} if spec["base"] == "int8" else four
        settings |= {"quantization_config": BitsAndBytesConfig(**bits), "device_map": "cpu"}
    model: Any = AutoModelForCausalLM.from_pretrained(spec["folder"], **settings)
    model.config.use_cache = False
    if not dense:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    lora = LoraConfig(r=spec["rank"], lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-4, weight_decay=0.0)
    tokens = torch.randint(model.config.vocab_size, (spec["rows"], spec["seq"]))
    for p in model.parameters():
        if p.is_floating_point():
            p.data = p.data.clone()  # in memory, no more a view of the file that a first step reads in
    held = sum(a.numel() * a.element_size() for a in [*model.parameters(), *model.buffers()])
    held += sum(absmax.numel() * absmax.element_size() for absmax in _scales(model))
    ctypes.CDLL(None).malloc_trim(0)  # what loading has freed is not there for the step
    capacity.reset_peak_memory()
    before = capacity.resident("VmRSS")
    out = model(input_ids=tokens, labels=tokens)
    out.loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    kinds = {type(module).__name__ for module in model.modules() if "Linear" in type(module).__name__}
    return {"held": held, "peak": held + capacity.resident("VmHWM") - before, "modules": sorted(kinds)}


def _scales(model: Any) -> Iterator[Any]:
    """Of bitsandbytes' blocks or rows, which are beside the parameters."""
    for weight in (getattr(module, "weight", None) for module in model.modules()):
        state = getattr(weight, "quant_state", None)
        yield from (each for each in (getattr(state, "absmax", None), getattr(weight, "SCB", None)) if each is not None)


def measurements() -> list[dict[str, Any]]:
    """Which, in the order of a round."""
    ours = [("float32", 1), ("float32", 2), ("float32", 4), *((base, 1) for base in OURS[1:])]
    peers = PEER if find_spec("bitsandbytes") else PEER[:2]
    found = [{"side": "ours", "base": base, "devices": count} for base, count in ours]
    return found + [{"side": "peer", "base": base, "devices": 1} for base in peers]


def measure(one: dict[str, Any], spec: dict[str, Any]) -> dict[str, Any]:
    """A process of its own."""
    command = [
        sys.executable,
        str(HERE / "memory.py"),
        f"--{one['side']}",
        json.dumps(spec | {name: one[name] for name in ("base", "devices")}),
    ]
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(said.splitlines()[-1])


def line(found: dict[str, Any]) -> str:
    """The figures of a measurement in words."""
    held = found["held"] if found["side"] == "peer" else found["base_bytes"]
    text = f"{found['side']}, {found['base']}, {found['devices']} devices: weights {held / 1e6:.0f} MB a device, "
    text += f"a step's peak {found['peak']['median'] / 1e6:.0f}"
    if found["side"] == "ours":
        text += f", planned {found['planned'] / 1e6:.0f}, by XLA's account {found['program'] / 1e6:.0f}"
    return text


def main() -> None:
    from rora_theory.io.files import write_whole
    from rora_theory.llama import load
    from rora_theory.llama.saving import save_model
    from sims.common import cli

    config = cli.parse(Config, description=__doc__ or "")
    figures: dict[str, Any] = {"machine": machine(config.cores, (*PACKAGES, "bitsandbytes"))}
    print(in_words(figures["machine"]), flush=True)
    figures["config"] = {name: getattr(config, name) for name in ("model", "rows", "seq", "rank")}
    spec = {name: getattr(config, name) for name in ("model", "rows", "seq", "rank", "cores")}
    ones = measurements()
    peaks: list[list[int]] = [[] for _ in ones]
    with tempfile.TemporaryDirectory() as folder:
        spec["folder"] = f"{folder}/model"
        save_model(Path(spec["folder"]), load(config.model))
        os.environ |= {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache", "JAX_PLATFORMS": "cpu"}  # for later rounds
        for _ in range(config.rounds):
            for one, known in zip(ones, peaks, strict=True):
                found = measure(one, spec)
                known.append(found["peak"])
                one |= found | {"peak": middle(known)}
                print(line(one), flush=True)
            figures["measurements"] = ones
            if config.out is not None:
                write_whole(config.out, json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] in (["--ours"], ["--peer"]):
        spec = json.loads(sys.argv[2])
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: spec["cores"]])
        print(json.dumps({"--ours": ours, "--peer": peer}[sys.argv[1]](spec)))
    else:
        from sims.common import cli

        cli.run(main)
