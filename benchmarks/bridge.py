"""Time the measurement of a PyTorch model relative to a training step, with its peak memory.

    python benchmarks/bridge.py --data DATA/ARC-Easy/train.json --out cost.json
    python benchmarks/bridge.py --model gemma3-270m --data DATA/ARC-Easy/train.json --out cost_gemma.json

It times four cases in turns, each in a process of its own: one plain training step of PEFT's LoRA (forward, backward,
AdamW), the hooks alone (each module's gradient is computed and dropped), and the whole measurement, with its defaults
and exact. It also reports the peak memory of each case above that of the model with its adapters after a forward pass.
This includes the adapters' gradients and AdamW's moments, and the samples of inputs of a measurement.

`results/published/bridge/agreement.json` compared the measurement with one in JAX, which was removed; commit c5ad19fd
has both.
"""

import ctypes
import gc
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import transformers
from hardware import OtherLoad, describe_machine, format_machine, silence_transformers

from rora_theory.advice.adapter_config import PAPER_TARGETS
from rora_theory.defaults import MEASURE_BATCH_SIZE
from rora_theory.runs.files import write_whole
from rora_theory.scaling import check_integer
from sims.common import cli, tables

Case = Literal["training step", "hooks alone", "measurement", "exact measurement"]
CASES: tuple[Case, ...] = get_args(Case)


@dataclass(frozen=True)
class BridgeOptions:
    data: tuple[str, ...]
    """.json or .jsonl files in the LLM-Adapters schema"""
    model: str = "smollm2-135m"
    """Model: smollm2-135m or gemma3-270m, a folder, a GGUF file or a hub id"""
    batch_size: int = MEASURE_BATCH_SIZE
    """Number of records of the training batch, and of the held-out batch"""
    cutoff: int = 256
    """Maximum number of tokens of a record"""
    rounds: int = 5
    """Number of times that each case is timed"""
    cases: tuple[Case, ...] = CASES
    """Cases to time"""
    device: str = "cpu"
    """PyTorch device"""
    seed: int = 0
    """Seed of the records and tokens"""
    out: Path | None = None
    """JSON file for the results"""


def main(config: BridgeOptions) -> None:
    """Time the cases, and write their results with its settings and the machine."""
    silence_transformers()
    for name in ("batch_size", "rounds"):
        check_integer(name, getattr(config, name))
    check_integer("cutoff", config.cutoff, minimum=2)
    machine, other_load = describe_machine(packages=("torch", "transformers", "peft", "jax")), OtherLoad()
    print(format_machine(machine), flush=True)
    results = cost(config)
    print(other_load.describe())
    # Settings that affect the results; paths are shortened to the last two parts.
    settings = {name: value for name, value in asdict(config).items() if name != "out"}
    settings["data"] = ["/".join(Path(name).parts[-2:]) for name in config.data]
    report = {"config": settings, "machine": machine, "others": other_load.share()} | results
    if config.out is not None:
        write_whole(config.out, (json.dumps(report, indent=2) + "\n").encode())


def prepare(config: BridgeOptions, folder: Path) -> list[dict[str, np.ndarray]]:
    """Save the model to ``folder`` for the processes of the cases, and prepare both batches."""
    from sims.common import inputs
    from sims.common.record_batches import PairConfig, make_batch_pair

    source = inputs.read_inputs(config.data, config.model)
    pair = make_batch_pair(PairConfig(config.batch_size, config.batch_size, config.cutoff), source, seed=config.seed)
    model = source.model
    model.save_pretrained(folder)
    return [{name: value.numpy() for name, value in batch.items()} for batch in (pair.train, pair.held_out)]


def load_torch(folder: Path) -> Any:
    """Load the model of a Hugging Face folder in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def tensors(batch: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Return a batch of arrays as tensors."""
    return {name: torch.from_numpy(value) for name, value in batch.items()}


def cost(config: BridgeOptions) -> dict[str, Any]:
    """Time the cases in turns, and print the medians of their time and peak memory.

    Returns:
      Seconds and bytes of every round, by case.
    """
    cases = config.cases
    seconds: dict[str, list[float]] = {case: [] for case in cases}
    memory: dict[str, list[int]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory() as scratch:
        batches = prepare(config, Path(scratch))
        context = multiprocessing.get_context("spawn")
        for number in range(config.rounds):
            # Each round starts with another case, so that a drift of the machine's speed does not favour one.
            for case in cases[number % len(cases) :] + cases[: number % len(cases)]:
                with context.Pool(1) as pool:
                    elapsed, peak = pool.apply(time_case, (case, scratch, batches, config.device))
                seconds[case].append(elapsed)
                memory[case].append(peak)
                print(f"round {number + 1} of {config.rounds}, {case}: {elapsed:.2f} s", file=sys.stderr, flush=True)
    # Medians, relative to the first case.
    base = statistics.median(seconds[cases[0]])
    tables.print_table(
        f"Cost on {config.model}, {config.batch_size} records, {config.device}: medians of {config.rounds} rounds",
        ["", "seconds", f"relative to {cases[0]}", "peak MiB above the model"],
        [
            [
                case,
                f"{statistics.median(seconds[case]):.2f}",
                f"{statistics.median(seconds[case]) / base:.2f}",
                f"{statistics.median(memory[case]) / 2**20:.0f}",
            ]
            for case in cases
        ],
    )
    return {"seconds": seconds, "peak_bytes_above_the_model": memory}


def time_case(case: Case, folder: str, batches: list[dict[str, np.ndarray]], device: str) -> tuple[float, int]:
    """Measure a case in this process, after a warm-up (except for the exact measurement, which takes minutes).

    Args:
      case: Case to measure.
      folder: Folder of the model.
      batches: Training batch and held-out batch, see `prepare`.
      device: PyTorch device.

    Returns:
      Seconds of the case, and the bytes of its peak memory above that of the model.
    """
    from peft import LoraConfig, get_peft_model

    from rora_theory.measure import hooks, regime
    from rora_theory.measure.modules import base_model, select_modules
    from rora_theory.measure.regimes.model import DEFAULT

    base = load_torch(Path(folder)).to(device)
    base.config.use_cache = False
    lora = LoraConfig(r=16, lora_alpha=16, target_modules=list(PAPER_TARGETS), task_type="CAUSAL_LM")
    model = get_peft_model(base, lora).train()
    batch, held_out = ({name: value.to(device) for name, value in tensors(arrays).items()} for arrays in batches)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=0.0)
    modules = select_modules(base_model(model), None)

    def training_step() -> None:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    def hooks_alone() -> None:
        hooks.backward(
            model, modules, lambda: model(**batch).loss, dict.fromkeys(modules, 1), lambda name, grad, inputs: None
        )

    def measurement() -> None:
        regime(model, batch, held_out)

    def exact_measurement() -> None:
        regime(model, batch, held_out, config=replace(DEFAULT, exact=True))

    functions = (training_step, hooks_alone, measurement, exact_measurement)
    run_case: Callable[[], None] = dict(zip(CASES, functions, strict=True))[case]
    # Weights are read from the file at their first use: read them all before the model's memory is taken.
    with torch.no_grad():
        model(**batch)
    before = _reset_peak(device)
    if run_case is not exact_measurement:  # its first run is hardly slower
        run_case()
    _reset_peak(device)
    started = time.perf_counter()
    run_case()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - started, _peak(device) - before


def _reset_peak(device: str) -> int:
    """Reset the recorded peak memory, and return the number of bytes in use."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    # glibc keeps freed memory, gigabytes after a training step: give it back, so that it does not count as in use.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device.startswith("cuda") else _status("VmHWM")


def _status(name: str) -> int:
    """Return a memory field of Linux's status of this process, such as ``VmRSS``, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    cli.run_command(lambda: main(cli.parse(BridgeOptions, description=__doc__ or "")))
