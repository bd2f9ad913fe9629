"""The rank coordinate check on a LLaMA model: do its first steps depend on the rank, under each rule and optimizer?

    python -m sims.coordinate_check --model smollm2-135m --data DATA/ARC-Easy/train.json

Adapters of several ranks, nested, take the same few steps on real records; what they add to every module, to the final
hidden state and to the logits is read on the batch they learned from and on held-out records. The rules meet at the
reference rank. A slope against the rank within the band of zero, seeds and all, is flat: the rule keeps that quantity
when the rank changes. The verdict on a rule is on the whole model, its final hidden state and its logits; the modules'
own outputs have one beside it. Controls are run too: they must not be flat.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rora_theory.adapters.lora import PAPER_TARGETS
from rora_theory.cluster import ClusterConfig
from rora_theory.data.records import DataConfig
from rora_theory.measure import record_batches
from rora_theory.measure.rank_check import check as rank_check
from rora_theory.measure.rank_check.check import CheckConfig, CoordinateCell
from rora_theory.measure.rank_check.coordinate_table import MODEL
from rora_theory.measure.rank_check.coordinates import Checker
from rora_theory.measure.record_batches import BatchConfig
from rora_theory.measure.regimes import thin
from rora_theory.runs import devices
from rora_theory.runs.folder import RunFolder, check_free, path_of
from rora_theory.runs.reading import flat
from rora_theory.runs.summary import key_figures
from rora_theory.validation.rules import check_list
from sims.common import answers, cli, prompts, tables
from sims.common.cells import run_table
from sims.common.summaries import summarised

NAME = "coordinate_check"
SPLITS = {"train": "trained on", "held_out": "held out"}


@dataclass(frozen=True)
class Config:
    """What to check. Lists are separated by spaces."""

    data: cli.Data
    model: cli.ModelName = "smollm2-135m"
    revision: cli.Revision = None
    reading: DataConfig = field(default_factory=DataConfig)
    check: CheckConfig = field(default_factory=CheckConfig)
    targets: tuple[str, ...] = PAPER_TARGETS
    """adapted modules"""
    records: BatchConfig = field(default_factory=BatchConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    out: cli.Out = None

    def __post_init__(self) -> None:
        check_list("--targets", self.targets)


def run(config: Config) -> None:
    """Run every cell that an earlier part of the run left, fit, judge, print."""
    checked, runner = config.check, config.cluster.runner()
    read = prompts.read_inputs(
        config.data, config.model, config.reading, template=config.records.template, revision=config.revision
    )
    chosen = replace(config.records, template=read.template)
    # Named by what they are, not by where they lie: the run may go on elsewhere.
    identity = flat(checked) | flat(chosen) | {"targets": config.targets} | read.identity
    check_free(path_of(NAME, identity, config.out))
    data, tokenizer, steps = read.records.records, read.tokenizer, max(checked.steps)
    batches = record_batches.by_seed(chosen, data, tokenizer, seeds=checked.seeds, steps=steps, chat=read.chat)
    checker = Checker(read.model.params, read.model.config, width=max(checked.ranks), target_modules=config.targets)
    sources = ["/".join(Path(source).parts[-2:]) for source in config.data]
    extra = {"units": rank_check.UNITS, "device": devices.describe(read.places), "data": sources}
    folder = RunFolder.open(NAME, identity, out=config.out, extra=extra, models=[read.origin])
    prompts.keep(folder, batches[checked.seeds[0]].train.examples, tokenizer, show=config.reading.show)
    cells = rank_check.coordinate_cells(checked)

    def work(cell: CoordinateCell, _: Path) -> list[dict[str, Any]]:
        own = batches[cell.seed]
        return rank_check.coordinate_rows(checked, checker, cell, own.at, own.held_out)

    sizes = run_table(cells, work, folder, rank_check.COLUMNS, runner=runner, title="coordinate check")
    slopes = rank_check.coordinate_slopes(checked, sizes)
    folder.write_frame(slopes, "slopes.csv")
    ends = slopes[(slopes["module"] == MODEL) & (slopes["step"] == steps)]
    scope = ("optimizer", "rule", "init", "control", "step", "split", "quantity", "verdict")
    with summarised(folder, key_figures(ends, "slope in the rank", "slope", over="seeds", scope=scope)):
        report(checked, slopes, sizes, batches=config.records.batches)
    folder.finish(warnings=thin.rank_warnings(checked.ranks))
    answers.tell_files(folder.path)


def report(config: CheckConfig, slopes: pd.DataFrame, sizes: pd.DataFrame, *, batches: str) -> None:
    """Print what the slopes say, and the slopes of each case by module."""
    judged = rank_check.verdicts(config, slopes)
    answers.say(rank_check.describe_check(config, judged), thin.rank_warnings(config.ranks))
    cases, losses = list(rank_check.cases(config)), []
    for case in cases:
        group = rank_check.rows_of_case(slopes, case)
        modules = [name for name in dict.fromkeys(group["module"]) if name != MODEL]
        lines = [*(("output", name) for name in (*modules, MODEL)), ("hidden", MODEL), ("logits", MODEL)]
        for split, label in SPLITS.items():
            own = {
                (row["quantity"], row["module"], row["step"]): _slope(row)
                for row in group[group["split"] == split].to_dict("records")
            }
            tables.print_table(
                f"{case}, batch {label}: slope in the rank ± half of its 95% interval, = within ±{config.band:g}",
                ["", *[f"step {step}" for step in config.steps]],
                [[_short(*line), *(own.get((*line, step), "") for step in config.steps)] for line in lines],
            )
        loss = rank_check.rows_of_case(sizes, case).query("quantity == 'loss'")["value"]
        whole = len(loss) and np.isfinite(loss).all()
        losses.append(f"{loss.min():.2f} to {loss.max():.2f}" if whole else "not finite")
    ends = [(split, step) for split in SPLITS for step in (config.steps[0], config.steps[-1])]
    tables.print_records(
        f"Verdicts ({batches} batch, {len(config.seeds)} seeds, ranks {' '.join(map(str, sorted(config.ranks)))})",
        judged.assign(rule=[str(case) for case in cases], losses=losses),
        {"rule": "{rule}", "whole model": "{whole_model}", "modules' own outputs": "{modules}"}
        | {f"flat modules, {SPLITS[split]}, step {step}": f"{{flat {split} {step}}}" for split, step in ends}
        | {f"flat kappa of the whole model, step {config.steps[-1]}": "{kappa_flat:.2f}", "losses": "{losses}"},
        left=3,
    )


def _short(quantity: str, module: str) -> str:
    if quantity != "output":
        return quantity
    return "all modules" if module == MODEL else module.rpartition(".")[2]


def _slope(row: dict[Any, Any]) -> str:
    if row["verdict"] == "diverged":
        return "diverged"
    return f"{row['slope']:+.2f} ± {row['half_width']:.2f}" + (" =" if row["verdict"] == "flat" else "")


main = cli.command(Config, run, __doc__)

if __name__ == "__main__":
    main()
