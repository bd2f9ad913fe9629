"""The bridge to PyTorch on a real model: is it equal to the JAX route, and what does it cost beside a training step?

    python benchmarks/bridge.py agreement --data DATA/ARC-Easy/train.json --out agreement.json
    python benchmarks/bridge.py cost --data DATA/ARC-Easy/train.json --out cost.json

``agreement`` measures every adapted module by `rora_theory.measure.regime` and by `rora_theory.measure.torch.regime`,
both in float32 on one batch, at the same held-out tokens and with one draw of A's rows, and reports the largest
relative difference of every figure. Exit status 1 where one is above its bound. It takes some minutes.

``cost`` times, in processes of their own that take turns, one plain training step of PEFT's LoRA (forward, backward,
AdamW), the hooks alone (each module's gradient formed and dropped), and the whole measurement, as it is by default and
exact; and the peak memory of each above the loaded model's.
"""

import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
import transformers
import tyro
from hardware import Others, in_words, machine

from rora_theory.adapter_config import PAPER_TARGETS
from rora_theory.errors import InputError
from rora_theory.io.files import write_whole
from rora_theory.measure.regimes.module_regime import RegimeConfig
from rora_theory.scaling import check_integer
from sims.common import cli, tables

BOUNDS = {"loss": 1e-5, "cross_talk": 1e-3, "predicted": 1e-3, "takeover": 2e-3}
BOUNDS |= dict.fromkeys(("signal", "crossing_rank", "lower_quartile", "median", "upper_quartile", "linear_term"), 1e-3)
"""Largest accepted relative differences: two float32 programs of thirty layers, whose gradients differ by some 1e-5 of
their largest entry; a signal is a sum of such entries in which much cancels."""

CASES = ("training step", "hooks alone", "measurement", "exact measurement")


@dataclass(frozen=True)
class Config:
    """What to compare."""

    what: tyro.conf.Positional[Literal["agreement", "cost"]]
    """agreement with the JAX route, or cost beside a training step"""
    data: tuple[str, ...]
    """.json or .jsonl files in the LLM-Adapters schema"""
    model: str = "smollm2-135m"
    """for both routes"""
    batch_size: int = 8
    """records of the batch, and as many held-out ones"""
    cutoff: int = 256
    """most tokens of a record"""
    rounds: int = 5
    """turns of each case of cost"""
    device: str = "cpu"
    """of cost: PyTorch's"""
    seed: int = 0
    """of the records and tokens"""
    out: Path | None = None
    """JSON file for the figures"""


def main(config: Config) -> None:
    for name in ("batch_size", "rounds"):
        check_integer(name, getattr(config, name))
    check_integer("cutoff", config.cutoff, minimum=2)
    here, others = machine(packages=("torch", "transformers", "peft", "jax")), Others()
    print(in_words(here), flush=True)
    found = agreement(config) if config.what == "agreement" else cost(config)
    print(others.in_words())
    apart = {"out", *(("rounds", "device") if config.what == "agreement" else ())}
    said = {name: value for name, value in asdict(config).items() if name not in apart}
    said["data"] = ["/".join(Path(name).parts[-2:]) for name in config.data]
    report = {"config": said, "machine": here, "others": others.share()} | found
    if config.out is not None:
        write_whole(config.out, (json.dumps(report, indent=2) + "\n").encode())
    if found.get("outside"):
        print(f"outside its bound: {', '.join(found['outside'])}", file=sys.stderr)
        sys.exit(1)


def prepared(config: Config, folder: Path) -> tuple[Any, list[Any], list[dict[str, np.ndarray]]]:
    """The model in JAX, written to ``folder`` for PyTorch too; and both batches for each of them."""
    from rora_theory.finetune import Batches, choose_widths, read_records, split_records, tokenize
    from rora_theory.llama import load
    from rora_theory.llama.weights import save_hf

    records = read_records(config.data)
    if len(records) < 2 * config.batch_size:
        raise InputError(f"--data holds {len(records)} records; accepted are {2 * config.batch_size} or more")
    model = load(config.model)
    save_hf(folder, model.params, model.config)
    rest, apart = split_records(records, config.batch_size, config.seed)
    ours, theirs = [], []
    for part in (rest[: config.batch_size], apart):
        examples = tokenize(part, model.tokenizer, cutoff=config.cutoff)
        ours.append(Batches(examples, choose_widths(examples.input_lengths, 1), batch_size=len(examples))[0])
        ids = np.zeros((len(examples), int(examples.lengths.max())), np.int64)
        mask = np.zeros_like(ids)
        for i in range(len(examples)):
            ids[i, : len(examples[i])], mask[i, : len(examples[i])] = examples[i], 1
        theirs.append({"input_ids": ids, "attention_mask": mask, "labels": np.where(mask, ids, -100)})
    return model, ours, theirs


def load_torch(folder: Path) -> Any:
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def tensors(batch: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in batch.items()}


def agreement(config: Config) -> dict[str, Any]:
    from rora_theory.measure.layers import drawn_steps
    from rora_theory.measure.regimes import model as regimes
    from rora_theory.measure.torch import regime

    measured = RegimeConfig(ranks=(1, 8, 128), rows=0, seed=config.seed, exact=True)
    with tempfile.TemporaryDirectory() as scratch:
        model, ours, theirs = prepared(config, Path(scratch))
        found = regime(
            load_torch(Path(scratch)),
            *map(tensors, theirs),
            list(PAPER_TARGETS),
            config=measured,
            lora_A=drawn_steps.takeover_rows,
        )
        expected = regimes.regime(model, *ours, measured, target_modules=PAPER_TARGETS)
    differences: dict[str, float] = {"loss": 0.0}
    for name in ("training_loss", "held_out_loss"):
        one, other = getattr(found, name), getattr(expected, name)
        differences["loss"] = max(differences["loss"], abs(one / other - 1))
    keys = ["module", "split", "optimizer", "init", "rule", "rank"]
    rows, where = [], {}
    for name in ("tokens", "crossings", "results", "takeover"):
        tables_ = (getattr(found, name), getattr(expected, name))
        own = [key for key in keys if key in tables_[0]]
        one, other = (table.sort_values(own, ignore_index=True) for table in tables_)
        if not one.drop(columns=_figures(one)).equals(other.drop(columns=_figures(other))):
            raise AssertionError(f"{name}: modules or tokens differ")
        for column in set(_figures(one)) & set(BOUNDS):
            gap = (one[column] / other[column] - 1).abs()
            differences[column] = float(gap.max())
            where[column] = " ".join(map(str, one.loc[gap.idxmax(), own]))
            rows.append([column, f"{gap.max():.1e}", f"{gap.median():.1e}", f"{BOUNDS[column]:.0e}"])
    modules = found.crossings["module"].nunique()
    tables.print_table(
        f"The bridge against the JAX route on {config.model}, {modules} modules: relative differences",
        ["figure", "largest", "median", "bound"],
        sorted(rows),
    )
    outside = [name for name, value in differences.items() if not value <= BOUNDS[name]]
    return {"modules": modules, "differences": differences, "where": where, "bounds": BOUNDS, "outside": outside}


def _figures(table: pd.DataFrame) -> list[str]:
    return [name for name in table if table[name].dtype.kind == "f"]


def cost(config: Config) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {case: [] for case in CASES}
    memory: dict[str, list[int]] = {case: [] for case in CASES}
    with tempfile.TemporaryDirectory() as scratch:
        _, _, batches = prepared(config, Path(scratch))
        context = multiprocessing.get_context("spawn")
        for turn in range(config.rounds):
            for case in CASES[turn % len(CASES) :] + CASES[: turn % len(CASES)]:
                with context.Pool(1) as pool:
                    took, peak = pool.apply(work, (case, scratch, batches, config.device))
                seconds[case].append(took)
                memory[case].append(peak)
    base = statistics.median(seconds[CASES[0]])
    tables.print_table(
        f"Cost on {config.model}, {config.batch_size} records, {config.device}: medians of {config.rounds} turns",
        ["", "seconds", "of a step", "peak MiB above the model"],
        [
            [
                case,
                f"{statistics.median(seconds[case]):.2f}",
                f"{statistics.median(seconds[case]) / base:.2f}",
                f"{statistics.median(memory[case]) / 2**20:.0f}",
            ]
            for case in CASES
        ],
    )
    return {"seconds": seconds, "peak_bytes_above_the_model": memory}


def work(case: str, folder: str, batches: list[dict[str, np.ndarray]], device: str) -> tuple[float, int]:
    """Seconds and peak memory of one case, in this process, after one turn to warm up."""
    from peft import LoraConfig, get_peft_model

    from rora_theory.measure.torch import hooks, regime
    from rora_theory.measure.torch.modules import base_model, chosen
    from rora_theory.measure.torch.regimes import DEFAULT

    base = load_torch(Path(folder)).to(device)
    base.config.use_cache = False
    lora = LoraConfig(r=16, lora_alpha=16, target_modules=list(PAPER_TARGETS), task_type="CAUSAL_LM")
    model = get_peft_model(base, lora).train()
    batch, held_out = ({name: value.to(device) for name, value in tensors(each).items()} for each in batches)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.0)
    modules = chosen(base_model(model), None)

    def step() -> None:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    def alone() -> None:
        hooks.backward(
            model, modules, lambda: model(**batch).loss, dict.fromkeys(modules, 1), lambda name, grad, inputs: None
        )

    def whole() -> None:
        regime(model, batch, held_out)

    def exact() -> None:
        regime(model, batch, held_out, config=replace(DEFAULT, exact=True))

    turn: Callable[[], None] = dict(zip(CASES, (step, alone, whole, exact), strict=True))[case]
    if turn is not exact:
        turn()
    before = _reset_peak(device)
    started = time.perf_counter()
    turn()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - started, _peak(device) - before


def _reset_peak(device: str) -> int:
    """Bytes in use; the peak is told from here on."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device.startswith("cuda") else _status("VmHWM")


def _status(name: str) -> int:
    line = next(each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith(name))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    cli.run(lambda: main(cli.parse(Config, description=__doc__ or "")))
