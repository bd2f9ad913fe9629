"""Check on a LLaMA model whether the first steps depend on the rank, for each scaling rule and optimizer.

    python -m sims.coordinate_check --model smollm2-135m --data DATA/ARC-Easy/train.json

Nested adapters of several ranks take the same few steps on real records. The change of every module's output, of the
final hidden state and of the logits is measured on the training batch and on held-out records. All rules have the same
scaling at the reference rank. A quantity is flat if the confidence interval of its slope against the rank, over seeds,
lies within the band around zero: the rule then preserves the quantity when the rank changes. The verdict on a rule is
about the whole model, that is the final hidden state and the logits; the outputs of the modules have a separate
verdict. Two controls must not be flat.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rora_theory.lab.adapters.lora import PAPER_TARGETS
from rora_theory.lab.data.records import DataConfig
from rora_theory.measure import record_batches
from rora_theory.measure.rank_check import rules as rank_check
from rora_theory.measure.rank_check.coordinate_table import MODEL
from rora_theory.measure.rank_check.coordinates import Checker
from rora_theory.measure.rank_check.rules import CheckConfig, CoordinateCell
from rora_theory.measure.record_batches import BatchConfig
from rora_theory.measure.regimes import thin
from rora_theory.runs import devices
from rora_theory.runs.cluster import ClusterConfig
from rora_theory.runs.folder import RunFolder, check_free, path_of
from rora_theory.runs.reading import flatten
from rora_theory.runs.summary import key_figures
from rora_theory.validation.rules import check_list
from sims.common import answers, cli, prompts, tables
from sims.common.cells import run_table
from sims.common.summaries import summarised

NAME = "coordinate_check"
SPLITS = {"train": "training", "held_out": "held-out"}
"""Labels of the batches at which changes are measured."""


@dataclass(frozen=True)
class Config:
    """Options of the check. Separate the values of a list with spaces."""

    data: cli.Data
    model: cli.ModelName = "smollm2-135m"
    revision: cli.Revision = None
    reading: DataConfig = field(default_factory=DataConfig)
    check: CheckConfig = field(default_factory=CheckConfig)
    targets: tuple[str, ...] = PAPER_TARGETS
    """Adapted modules"""
    records: BatchConfig = field(default_factory=BatchConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    out: cli.Out = None

    def __post_init__(self) -> None:
        check_list("--targets", self.targets)


def run(config: Config) -> None:
    """Run the cells that the run folder lacks, then fit the slopes and report."""
    check_config, runner = config.check, config.cluster.runner()
    inputs = prompts.read_inputs(
        config.data, config.model, config.reading, template=config.records.template, revision=config.revision
    )
    batch_config = replace(config.records, template=inputs.template)
    # The identity contains digests of the inputs, not their paths, so that the run can be resumed on another machine.
    identity = flatten(check_config) | flatten(batch_config) | {"targets": config.targets} | inputs.identity
    check_free(path_of(NAME, identity, config.out))
    # Batches of all seeds, and one model with compiled functions for all cells.
    data, tokenizer, steps = inputs.records.records, inputs.tokenizer, max(check_config.steps)
    seeds, width = check_config.seeds, max(check_config.ranks)
    batches = record_batches.make_seed_batches(
        batch_config, data, tokenizer, seeds=seeds, steps=steps, chat=inputs.chat
    )
    checker = Checker(inputs.model.params, inputs.model.config, width=width, target_modules=config.targets)
    sources = ["/".join(Path(source).parts[-2:]) for source in config.data]
    extra = {"units": rank_check.UNITS, "device": devices.describe(inputs.devices), "data": sources}
    folder = RunFolder.open(NAME, identity, out=config.out, extra=extra, models=[inputs.origin])
    prompts.save_prompts(folder, batches[check_config.seeds[0]].train.examples, tokenizer, show=config.reading.show)
    cells = rank_check.coordinate_cells(check_config)

    def work(cell: CoordinateCell, _: Path) -> list[dict[str, Any]]:
        batch = batches[cell.seed]
        return rank_check.coordinate_rows(check_config, checker, cell, batch.at, batch.held_out)

    sizes = run_table(cells, work, folder, rank_check.COLUMNS, runner=runner, title="coordinate check")
    # Slopes in the rank, with verdicts.
    slopes = rank_check.coordinate_slopes(check_config, sizes)
    folder.write_frame(slopes, "slopes.csv")
    # Key figures: the whole model's slopes after the last step.
    ends = slopes[(slopes["module"] == MODEL) & (slopes["step"] == steps)]
    scope = ("optimizer", "rule", "init", "control", "step", "split", "quantity", "verdict")
    with summarised(folder, key_figures(ends, "slope in the rank", "slope", over="seeds", scope=scope)):
        report(check_config, slopes, sizes, batches=config.records.batches)
    folder.finish(warnings=thin.rank_warnings(check_config.ranks))
    answers.print_files(folder.path)


def report(config: CheckConfig, slopes: pd.DataFrame, sizes: pd.DataFrame, *, batches: str) -> None:
    """Print the verdicts, and the slopes of each case by module."""
    judged = rank_check.verdicts(config, slopes)
    answers.print_answer(rank_check.describe_check(config, judged), thin.rank_warnings(config.ranks))
    # One table for each case and split, with a line for each module and for the whole model.
    cases, losses = list(rank_check.cases(config)), []
    for case in cases:
        group = rank_check.rows_of_case(slopes, case)
        modules = [name for name in dict.fromkeys(group["module"]) if name != MODEL]
        lines = [*(("output", name) for name in (*modules, MODEL)), ("hidden", MODEL), ("logits", MODEL)]
        for split, label in SPLITS.items():
            slope_of = {
                (row["quantity"], row["module"], row["step"]): _slope(row)
                for row in group[group["split"] == split].to_dict("records")
            }
            tables.print_table(
                f"{case}, {label} batch: slope against the rank ± half of its 95% interval; = is within "
                f"±{config.band:g}",
                ["", *[f"step {step}" for step in config.steps]],
                [[_short(*line), *(slope_of.get((*line, step), "") for step in config.steps)] for line in lines],
            )
        loss = rank_check.rows_of_case(sizes, case).query("quantity == 'loss'")["value"]
        is_finite = len(loss) and np.isfinite(loss).all()
        losses.append(f"{loss.min():.2f} to {loss.max():.2f}" if is_finite else "not finite")
    # Verdicts on all cases.
    ends = [(split, step) for split in SPLITS for step in (config.steps[0], config.steps[-1])]
    tables.print_records(
        f"Verdicts ({batches} batch, {len(config.seeds)} seeds, ranks {' '.join(map(str, sorted(config.ranks)))})",
        judged.assign(rule=[str(case) for case in cases], losses=losses),
        {"rule": "{rule}", "whole model": "{whole_model}", "outputs of modules": "{modules}"}
        | {f"flat modules, {SPLITS[split]} batch, step {step}": f"{{flat {split} {step}}}" for split, step in ends}
        | {f"kappa with a flat model, step {config.steps[-1]}": "{kappa_flat:.2f}", "losses": "{losses}"},
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
