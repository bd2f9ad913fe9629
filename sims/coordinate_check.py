"""The rank coordinate check on a LLaMA model: do its first steps depend on the rank, under each rule and optimizer?

    python -m sims.coordinate_check --model smollm2-135m --data DATA/ARC-Easy/train.json

Adapters of several ranks, nested, take the same few steps on real records; what they add to every module, to the final
hidden state and to the logits is read on the batch they learned from and on held-out records. The rules meet at the
reference rank. A slope against the rank within the band of zero, seeds and all, is flat: the rule keeps that quantity
when the rank changes. The verdict on a rule is on the whole model, its final hidden state and its logits; the modules'
own outputs have one beside it. Controls are run too: they must not be flat.
"""

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rora_theory.adapters.lora import PAPER_TARGETS
from rora_theory.data.records import DataConfig, read
from rora_theory.llama import load
from rora_theory.measure import rank_check, record_batches, thin
from rora_theory.measure.coordinate_table import MODEL
from rora_theory.measure.coordinates import Checker
from rora_theory.measure.rank_check import Cell, CheckConfig
from rora_theory.measure.record_batches import BatchConfig
from rora_theory.runs.folder import RunFolder
from rora_theory.runs.reading import flat
from sims.common import cli, devices, prompts, tables
from sims.common.cells import run_table

NAME = "coordinate_check"
SPLITS = {"train": "trained on", "held_out": "held out"}


@dataclass(frozen=True)
class Config:
    """What to check. Lists are separated by spaces."""

    data: tuple[str, ...]
    """.json, .jsonl, .parquet or .txt files, of the hub as hf://datasets/OWNER/NAME[@REVISION]/FILE; or a split, as
    FOLDER:train or hf://datasets/OWNER/NAME:train"""
    model: str = "smollm2-135m"
    """a folder in Hugging Face layout, a .gguf file, a hub id or a built-in name"""
    revision: str | None = None
    """branch, tag or commit of a model on the hub"""
    reading: DataConfig = field(default_factory=DataConfig)
    check: CheckConfig = field(default_factory=CheckConfig)
    targets: tuple[str, ...] = PAPER_TARGETS
    """adapted modules"""
    records: BatchConfig = field(default_factory=BatchConfig)
    out: Path | None = None
    """run folder; none is results/coordinate_check/ID"""


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, check, run."""
    cli.run(lambda: run(cli.parse(Config, argv, description=__doc__ or "")))


def run(config: Config) -> None:
    """Run every cell that an earlier part of the run left, fit, judge, print."""
    started, checked = time.monotonic(), config.check
    records = read(config.data, config.reading)
    chosen = replace(config.records, template=records.template(config.records.template))
    places = devices.pick(1)
    model = load(config.model, revision=config.revision)
    cli.tell(model.remarks)
    prompts.tell(records, chosen.template)
    chat = records.chat(model.tokenizer, chosen.template)
    steps = max(checked.steps)
    batches = record_batches.by_seed(
        chosen, records.records, model.tokenizer, seeds=checked.seeds, steps=steps, chat=chat
    )
    checker = Checker(model.params, model.config, width=max(checked.ranks), target_modules=config.targets)
    # Named by what they are, not by where they lie: the run may go on elsewhere.
    identity = flat(checked) | flat(chosen) | {"targets": config.targets}
    identity |= model.origin.identity() | records.identity(chat)
    sources = ["/".join(Path(source).parts[-2:]) for source in config.data]
    extra = {"units": rank_check.UNITS, "device": devices.describe(places), "data": sources}
    folder = RunFolder.open(NAME, identity, out=config.out, extra=extra, models=[model.origin])
    prompts.keep(folder, batches[checked.seeds[0]].train.examples, model.tokenizer, show=config.reading.show)
    cells = rank_check.cells(checked)

    def work(cell: Cell, _: Path) -> list[dict[str, Any]]:
        own = batches[cell.seed]
        return rank_check.rows(checked, checker, cell, own.at, own.held_out)

    sizes = run_table(cells, work, folder, rank_check.COLUMNS, title="coordinate check")
    slopes = rank_check.fits(checked, sizes)
    folder.write_frame(slopes, "slopes.csv")
    words = thin.of_ranks(checked.ranks)
    folder.finish(last_session_seconds=round(time.monotonic() - started, 1), warnings=words)
    for one in words:
        tables.print_text(one)
    report(checked, slopes, sizes, batches=config.records.batches)
    tables.print_text(f"{len(cells)} cells in {time.monotonic() - started:.0f} s, written to {folder.path}")


def report(config: CheckConfig, slopes: pd.DataFrame, sizes: pd.DataFrame, *, batches: str) -> None:
    """Print the slopes of each case by module, and what they say."""
    ends = [(split, step) for split in SPLITS for step in (config.steps[0], config.steps[-1])]
    summary = []
    for case, verdict in zip(
        rank_check.cases(config), rank_check.verdicts(config, slopes).to_dict("records"), strict=True
    ):
        group = rank_check.of_case(slopes, case)
        modules = [name for name in dict.fromkeys(group["module"]) if name != MODEL]
        lines = {"output": [*modules, MODEL], "hidden": [MODEL], "logits": [MODEL]}
        for split, label in SPLITS.items():
            own = {
                (row["quantity"], row["module"], row["step"]): _slope(row)
                for row in group[group["split"] == split].to_dict("records")
            }
            tables.print_table(
                f"{case}, batch {label}: slope in the rank ± half of its 95% interval, = within ±{config.band:g}",
                ["", *[f"step {step}" for step in config.steps]],
                [
                    [
                        quantity if quantity != "output" else _short(module),
                        *(own.get((quantity, module, step), "") for step in config.steps),
                    ]
                    for quantity, of in lines.items()
                    for module in of
                ],
            )
        loss = rank_check.of_case(sizes, case).query("quantity == 'loss'")["value"]
        kappa = verdict["kappa_flat"]
        summary.append(
            [
                case,
                verdict["whole_model"],
                verdict["modules"],
                *[verdict[f"flat {split} {step}"] for split, step in ends],
                "" if math.isnan(kappa) else f"{kappa:.2f}",
                f"{loss.min():.2f} to {loss.max():.2f}" if len(loss) and np.isfinite(loss).all() else "not finite",
            ]
        )
    tables.print_table(
        f"Verdicts ({batches} batch, {len(config.seeds)} seeds, ranks {' '.join(map(str, sorted(config.ranks)))})",
        [
            "rule",
            "whole model",
            "modules' own outputs",
            *[f"flat modules, {SPLITS[split]}, step {step}" for split, step in ends],
            f"flat kappa of the whole model, step {config.steps[-1]}",
            "losses",
        ],
        summary,
        left=3,
    )


def _short(module: str) -> str:
    return "all modules" if module == MODEL else module.rpartition(".")[2]


def _slope(row: dict[Any, Any]) -> str:
    if row["verdict"] == "diverged":
        return "diverged"
    return f"{row['slope']:+.2f} ± {row['half_width']:.2f}" + (" =" if row["verdict"] == "flat" else "")


if __name__ == "__main__":
    main(sys.argv[1:])
