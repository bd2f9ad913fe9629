"""Compare the peak memory of a fine-tuning step on a CPU with XLA's analysis and with torch + peft + bitsandbytes.

    python benchmarks/memory.py --out memory.json          SmolLM2-135M, LoRA r = 8, 4 x 64 tokens, minutes on two cores

This side is measured in float32 on 1, 2 and 4 host devices that share the weights, and on a base in bfloat16, 8 and 4
bits; the peer in float32, bfloat16 and bitsandbytes' int8 and nf4 (if that is installed). Each measurement runs in a
process of its own, and the results are written after every round. The peak of a step is the size of its arrays before
it plus the growth of the process's resident memory in it, divided by the number of devices. Memory of Python, of the
libraries and of loading a model is therefore left out on both sides. Only Linux reports the peak.
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

from finetune import HERE, TARGETS, quartiles
from hardware import PACKAGES, describe_machine, format_machine, silence_transformers

from rora_theory.validation.ranges import Count, check_ranges

OUR_BASES = ("float32", "bfloat16", "q8_0", "q4_1", "q4_0")
PEER_BASES = ("float32", "bfloat16", "int8", "nf4")


@dataclass(frozen=True)
class MemoryOptions:
    model: str = "smollm2-135m"
    """Model to train"""
    rounds: Count = 3
    """Number of processes of each measurement, whose median is reported"""
    rows: Count = 4
    """Number of records in a step"""
    seq: Count = 64
    """Number of tokens of a record"""
    rank: Count = 8
    """Rank of LoRA on q, k, v, up and down"""
    cores: Count = 2
    """Number of cores that a process runs on"""
    out: Path | None = None
    """JSON file for the results"""

    def __post_init__(self) -> None:
        check_ranges(self)


def measure_ours(spec: dict[str, Any]) -> dict[str, Any]:
    """Return the analysed and the measured bytes of this package's step on each device, and those of its weights.

    Args:
      spec: Settings of the measurement, see `main` and `measurements`.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    jax.config.update("jax_num_cpu_devices", spec["devices"])
    from rora_theory.lab.finetune import Batch, FinetuneConfig
    from rora_theory.lab.finetune import step as steps
    from rora_theory.lab.finetune.memory import StepMemory
    from rora_theory.lab.finetune.sharding import layout_over_all_devices
    from rora_theory.lab.llama import load, locate, model_config

    dense = spec["base"] in ("float32", "bfloat16")
    base_type = {"dtype": spec["base"]} if dense else {"dtype": "float32", "quantization": spec["base"]}
    run = FinetuneConfig(rule="lora", rank=spec["rank"], alpha=16.0, dropout=0.0, batch_size=spec["rows"], **base_type)
    # Weights, training state and batch, on their devices.
    origin = locate(spec["folder"])
    model = model_config(origin)
    layout, shardings = layout_over_all_devices(model, run, split_weights=True)
    loaded = load(origin, run.dtype, shardings=shardings, quantization=run.quantization)
    # Loaded weights may be views of the file, which the first step would read: copy them into memory before it.
    base = jax.block_until_ready(jax.tree.map(jnp.copy, loaded.params))
    del loaded
    adapter = run.adapter().build(jax.random.key(1), model, base)
    state: Any = steps.init_state(adapter, steps.finetune_optimizer(run, 1), jax.random.key(2))
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (spec["rows"], spec["seq"] + 1)).astype(np.int32)
    batch: Any = Batch(tokens[:, :-1], tokens[:, 1:], np.ones((spec["rows"], spec["seq"]), np.float32), None)
    state_shardings = None
    if layout is not None:
        state_shardings, state, batch = layout.shardings(state), layout.place(state), layout.batch(batch)
    step = steps.train_step(adapter, model, run, 1, state_shardings=state_shardings)
    # Compile first, so that the compiler's own memory is not part of the step's.
    compiled = step.lower(state, base, batch).compile()
    program = StepMemory.from_compiled(compiled)
    del adapter
    return_freed_memory()
    arrays = jax.tree.leaves((base, state._replace(key=None)))
    jax.block_until_ready(arrays)
    reset_peak_memory()
    held = sum(shard.data.nbytes for array in arrays for shard in array.addressable_shards)
    resident_before = process_memory("VmRSS") - held
    jax.block_until_ready(compiled(state, base, batch))
    return {
        "program": program.total,
        "peak": (process_memory("VmHWM") - resident_before) // spec["devices"],
        "base_bytes": sum(array.addressable_shards[0].data.nbytes for array in jax.tree.leaves(base)),
    }


def measure_peer(spec: dict[str, Any]) -> dict[str, Any]:
    """Return the measured bytes of a step of peft's LoRA on transformers' model.

    Args:
      spec: Settings of the measurement; bases int8 and nf4 use the linear layers of bitsandbytes.

    Returns:
      Bytes of the weights, ``held``; bytes of the peak; and the types of the linear modules.
    """
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    torch.set_num_threads(spec["cores"])
    # Base model, quantised while it is loaded.
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
    # Adapter, optimizer and batch.
    lora = LoraConfig(r=spec["rank"], lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    model.train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-4, weight_decay=0.0)
    tokens = torch.randint(model.config.vocab_size, (spec["rows"], spec["seq"]))
    # Loaded weights are views of the file, which the first step would read: copy them into memory before it.
    for weight in model.parameters():
        if weight.is_floating_point():
            weight.data = weight.data.clone()
    held = sum(array.numel() * array.element_size() for array in [*model.parameters(), *model.buffers()])
    held += sum(scales.numel() * scales.element_size() for scales in _scales(model))
    return_freed_memory()
    reset_peak_memory()
    before = process_memory("VmRSS")
    out = model(input_ids=tokens, labels=tokens)
    out.loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    kinds = {type(module).__name__ for module in model.modules() if "Linear" in type(module).__name__}
    return {"held": held, "peak": held + process_memory("VmHWM") - before, "modules": sorted(kinds)}


def process_memory(field: str) -> int:
    """Return a memory field of Linux's status of this process, such as ``VmRSS``, in bytes."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(f"{field}:"))


def return_freed_memory() -> None:
    """Return the memory that glibc keeps after loading has freed it, so that the step's use of it counts as growth."""
    ctypes.CDLL(None).malloc_trim(0)


def reset_peak_memory() -> None:
    """Reset the peak of this process's resident memory to its present value."""
    Path("/proc/self/clear_refs").write_text("5")


def _scales(model: Any) -> Iterator[Any]:
    """Yield the scales of bitsandbytes' blocks (nf4) or rows (int8), which are not among the parameters."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        block_scales = getattr(getattr(weight, "quant_state", None), "absmax", None)
        row_scales = getattr(weight, "SCB", None)
        yield from (scales for scales in (block_scales, row_scales) if scales is not None)


def measurements() -> list[dict[str, Any]]:
    """Return the side, the base and the number of devices of each measurement of a round, in order."""
    ours = [("float32", 1), ("float32", 2), ("float32", 4), *((base, 1) for base in OUR_BASES[1:])]
    peer_bases = PEER_BASES if find_spec("bitsandbytes") else PEER_BASES[:2]
    cases = [{"side": "ours", "base": base, "devices": count} for base, count in ours]
    return cases + [{"side": "peer", "base": base, "devices": 1} for base in peer_bases]


def measure_case(case: dict[str, Any], spec: dict[str, Any]) -> dict[str, Any]:
    """Run one of the `measurements` in a process of its own.

    Args:
      case: Side, base and number of devices.
      spec: Settings that all measurements share.

    Returns:
      Result of `measure_ours` or `measure_peer`.
    """
    command = [
        sys.executable,
        str(HERE / "memory.py"),
        f"--{case['side']}",
        json.dumps(spec | {name: case[name] for name in ("base", "devices")}),
    ]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def describe(case: dict[str, Any]) -> str:
    """Return a line of text with a measurement and its results."""
    held = case["held"] if case["side"] == "peer" else case["base_bytes"]
    text = f"{case['side']}, {case['base']}, {case['devices']} devices: weights {held / 1e6:.0f} MB a device, "
    text += f"a step's peak {case['peak']['median'] / 1e6:.0f}"
    if case["side"] == "ours":
        text += f", by XLA's analysis {case['program'] / 1e6:.0f}"
    return text


def main() -> None:
    """Repeat all measurements, print each result, and write the medians after each round."""
    from rora_theory.lab.llama import load
    from rora_theory.lab.llama.saving import save_model
    from rora_theory.runs.files import write_whole
    from sims.common import cli

    silence_transformers()
    config = cli.parse(MemoryOptions, description=__doc__ or "")
    results: dict[str, Any] = {"machine": describe_machine(config.cores, (*PACKAGES, "bitsandbytes"))}
    print(format_machine(results["machine"]), flush=True)
    results["config"] = {name: getattr(config, name) for name in ("model", "rows", "seq", "rank")}
    spec = {name: getattr(config, name) for name in ("model", "rows", "seq", "rank", "cores")}
    cases = measurements()
    peaks: list[list[int]] = [[] for _ in cases]
    with tempfile.TemporaryDirectory() as folder:
        spec["folder"] = f"{folder}/model"
        save_model(Path(spec["folder"]), load(config.model))
        # Later rounds reuse the programs that the first one compiles.
        os.environ |= {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache", "JAX_PLATFORMS": "cpu"}
        for _ in range(config.rounds):
            for case, case_peaks in zip(cases, peaks, strict=True):
                measured = measure_case(case, spec)
                case_peaks.append(measured["peak"])
                case |= measured | {"peak": quartiles(case_peaks)}
                print(describe(case), flush=True)
            results["measurements"] = cases
            if config.out is not None:
                write_whole(config.out, json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] in (["--ours"], ["--peer"]):
        spec = json.loads(sys.argv[2])
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: spec["cores"]])
        print(json.dumps({"--ours": measure_ours, "--peer": measure_peer}[sys.argv[1]](spec)))
    else:
        from sims.common import cli

        cli.run_command(main)
