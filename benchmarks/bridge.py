"""Check the bridge to PyTorch on a real model: its agreement with the JAX route, and its cost.

    python benchmarks/bridge.py agreement --data DATA/ARC-Easy/train.json --out agreement.json
    python benchmarks/bridge.py cost --data DATA/ARC-Easy/train.json --out cost.json
    python benchmarks/bridge.py cost --model gemma3-270m --data DATA/ARC-Easy/train.json --out cost_gemma.json

``agreement`` measures every adapted module with `rora_theory.measure.regime` and `rora_theory.measure.regime`,
both in float32 on one batch, at the same held-out tokens and with the same draw of A's rows. It reports the largest
relative difference of every quantity. The exit status is 1 if one exceeds its bound. It takes some minutes.

``cost`` times four cases in turns, each in a process of its own: one plain training step of PEFT's LoRA (forward,
backward, AdamW), the hooks alone (each module's gradient is computed and dropped), and the whole measurement, with its
defaults and exact. It also reports the peak memory of each case above that of the model with its adapters after a
forward pass. This includes the adapters' gradients and AdamW's moments, and the samples of inputs of a measurement.
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
import tyro
from hardware import OtherLoad, describe_machine, format_machine, silence_transformers

from rora_theory.advice.adapter_config import PAPER_TARGETS
from rora_theory.defaults import MEASURE_BATCH_SIZE
from rora_theory.errors import InputError
from rora_theory.measure.regimes.module_regime import RegimeConfig
from rora_theory.runs.files import write_whole
from rora_theory.scaling import check_integer
from sims.common import cli, tables

BOUNDS = {"loss": 1e-5, "cross_talk": 1e-3, "predicted": 1e-3, "takeover": 2e-3}
BOUNDS |= dict.fromkeys(("signal", "crossing_rank", "lower_quartile", "median", "upper_quartile", "linear_term"), 1e-3)
"""Largest accepted relative differences: two float32 programs of thirty layers, whose gradients differ by some 1e-5 of
their largest entry; a signal is a sum of such entries in which much cancels."""

Case = Literal["training step", "hooks alone", "measurement", "exact measurement"]
CASES: tuple[Case, ...] = get_args(Case)


@dataclass(frozen=True)
class Config:
    """Settings of the benchmark."""

    what: tyro.conf.Positional[Literal["agreement", "cost"]]
    """Comparison to run: agreement with the JAX route, or cost relative to a training step"""
    data: tuple[str, ...]
    """.json or .jsonl files in the LLM-Adapters schema"""
    model: str = "smollm2-135m"
    """Model of both routes: smollm2-135m or gemma3-270m, a folder, a GGUF file or a hub id"""
    batch_size: int = MEASURE_BATCH_SIZE
    """Number of records of the training batch, and of the held-out batch"""
    cutoff: int = 256
    """Maximum number of tokens of a record"""
    rounds: int = 5
    """Number of times that each case of cost is timed"""
    cases: tuple[Case, ...] = CASES
    """Cases of cost to time"""
    device: str = "cpu"
    """PyTorch device of cost"""
    seed: int = 0
    """Seed of the records and tokens"""
    out: Path | None = None
    """JSON file for the results"""


def main(config: Config) -> None:
    """Run one comparison, and write its results with its settings and the machine."""
    silence_transformers()
    for name in ("batch_size", "rounds"):
        check_integer(name, getattr(config, name))
    check_integer("cutoff", config.cutoff, minimum=2)
    machine, other_load = describe_machine(packages=("torch", "transformers", "peft", "jax")), OtherLoad()
    print(format_machine(machine), flush=True)
    results = agreement(config) if config.what == "agreement" else cost(config)
    print(other_load.describe())
    # Settings that affect the results; paths are shortened to the last two parts.
    omitted = {"out", *(("rounds", "cases", "device") if config.what == "agreement" else ())}
    settings = {name: value for name, value in asdict(config).items() if name not in omitted}
    settings["data"] = ["/".join(Path(name).parts[-2:]) for name in config.data]
    report = {"config": settings, "machine": machine, "others": other_load.share()} | results
    if config.out is not None:
        write_whole(config.out, (json.dumps(report, indent=2) + "\n").encode())
    if results.get("outside"):
        print(f"outside its bound: {', '.join(results['outside'])}", file=sys.stderr)
        sys.exit(1)


def prepare(config: Config, folder: Path) -> tuple[Any, list[Any], list[dict[str, np.ndarray]]]:
    """Load the model in JAX, save it to ``folder`` for PyTorch, and prepare both batches for each route."""
    from rora_theory.lab.finetune import Batches, choose_widths, read_records, split_records, tokenize
    from rora_theory.lab.llama import load
    from rora_theory.lab.llama.weights import save_hf

    records = read_records(config.data)
    if len(records) < 2 * config.batch_size:
        raise InputError(f"--data must have at least {2 * config.batch_size} records, got {len(records)}")
    # Both routes read the same weights and records.
    model = load(config.model)
    save_hf(folder, model.params, model.config)
    training, held_out = split_records(records, config.batch_size, config.seed)
    jax_batches, torch_batches = [], []
    for sample in (training[: config.batch_size], held_out):
        examples = tokenize(sample, model.tokenizer, cutoff=config.cutoff)
        widths = choose_widths(examples.input_lengths, 1)
        jax_batches.append(Batches(examples, widths, batch_size=len(examples))[0])
        # The same examples for PyTorch, padded on the right: [records, longest].
        ids = np.zeros((len(examples), int(examples.lengths.max())), np.int64)
        mask = np.zeros_like(ids)
        for i in range(len(examples)):
            ids[i, : len(examples[i])], mask[i, : len(examples[i])] = examples[i], 1
        torch_batches.append({"input_ids": ids, "attention_mask": mask, "labels": np.where(mask, ids, -100)})
    return model, jax_batches, torch_batches


def load_torch(folder: Path) -> Any:
    """Load the model of a Hugging Face folder in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def tensors(batch: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Return a batch of arrays as tensors."""
    return {name: torch.from_numpy(value) for name, value in batch.items()}


def agreement(config: Config) -> dict[str, Any]:
    """Measure every adapted module by both routes, and print the relative differences.

    Returns:
      Number of modules, largest difference of each quantity, its place, the bounds, and the quantities outside them.
    """
    from rora_theory.measure import regime
    from rora_theory.measure.regimes import drawn_steps
    from rora_theory.measure.regimes import model as regimes

    regime_config = RegimeConfig(ranks=(1, 8, 128), rows=0, seed=config.seed, exact=True)
    with tempfile.TemporaryDirectory() as scratch:
        model, jax_batches, torch_batches = prepare(config, Path(scratch))
        measured_torch = regime(
            load_torch(Path(scratch)),
            *map(tensors, torch_batches),
            list(PAPER_TARGETS),
            config=regime_config,
            lora_A=drawn_steps.draw_takeover_rows,
        )
        measured_jax = regimes.regime(model, *jax_batches, regime_config, target_modules=PAPER_TARGETS)
    # Relative differences of the losses, then of every numeric column of the tables.
    differences: dict[str, float] = {"loss": 0.0}
    for name in ("training_loss", "held_out_loss"):
        ratio = getattr(measured_torch, name) / getattr(measured_jax, name)
        differences["loss"] = max(differences["loss"], abs(ratio - 1))
    keys = ["module", "split", "optimizer", "init", "rule", "rank"]
    rows, places = [], {}
    for name in ("tokens", "crossings", "results", "takeover"):
        frames = (getattr(measured_torch, name), getattr(measured_jax, name))
        index = [key for key in keys if key in frames[0]]
        # Align the rows; everything but the measured numbers has to be equal.
        by_torch, by_jax = (frame.sort_values(index, ignore_index=True) for frame in frames)
        numeric = [column for column in by_torch if by_torch[column].dtype.kind == "f"]
        if not by_torch.drop(columns=numeric).equals(by_jax.drop(columns=numeric)):
            raise AssertionError(f"{name}: modules or tokens differ")
        for column in set(numeric) & set(BOUNDS):
            gap = (by_torch[column] / by_jax[column] - 1).abs()
            differences[column] = float(gap.max())
            places[column] = " ".join(map(str, by_torch.loc[gap.idxmax(), index]))
            rows.append([column, f"{gap.max():.1e}", f"{gap.median():.1e}", f"{BOUNDS[column]:.0e}"])
    modules = measured_torch.crossings["module"].nunique()
    tables.print_table(
        f"The bridge against the JAX route on {config.model}, {modules} modules: relative differences",
        ["figure", "largest", "median", "bound"],
        sorted(rows),
    )
    outside = [name for name, value in differences.items() if not value <= BOUNDS[name]]
    return {"modules": modules, "differences": differences, "where": places, "bounds": BOUNDS, "outside": outside}


def cost(config: Config) -> dict[str, Any]:
    """Time the cases in turns, and print the medians of their time and peak memory.

    Returns:
      Seconds and bytes of every round, by case.
    """
    cases = config.cases
    seconds: dict[str, list[float]] = {case: [] for case in cases}
    memory: dict[str, list[int]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory() as scratch:
        _, _, batches = prepare(config, Path(scratch))
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
    cli.run(lambda: main(cli.parse(Config, description=__doc__ or "")))
