"""Check on a language model whether the first steps depend on the rank, for each scaling rule and optimizer.

    python -m sims.coordinate_check --model smollm2-135m --data DATA/ARC-Easy/train.json

Nested adapters of several ranks take the same few steps on real records. The change of every module's output, of the
final hidden state and of the logits is measured on the training batch and on held-out records. All rules have the same
scaling at the reference rank. A quantity is flat if the confidence interval of its slope against the rank, over seeds,
lies within the band around zero: the rule then preserves the quantity when the rank changes. The verdict on a rule is
about the whole model, that is the final hidden state and the logits; the outputs of the modules have a separate
verdict. Two controls must not be flat.
"""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rora_theory.advice.adapter_config import PAPER_TARGETS, without_list_of_all_linear
from rora_theory.lab.data.records import DataConfig
from rora_theory.measure.rank_check import rules as rank_check
from rora_theory.measure.rank_check.coordinate_table import MODEL
from rora_theory.measure.rank_check.rules import CheckConfig, CoordinateCell
from rora_theory.measure.regimes import thin
from rora_theory.runs.folder import RunFolder, check_free, path_of
from rora_theory.runs.reading import flatten
from rora_theory.runs.summary import key_figures
from rora_theory.validation.rules import check_list
from sims.common import answers, cli, inputs, prompts, record_batches, tables
from sims.common.cells import run_table
from sims.common.progress import progress_bar
from sims.common.record_batches import BatchConfig
from sims.common.summaries import summarised

NAME = "coordinate_check"
SPLITS = {"train": "training", "held_out": "held-out"}
"""Labels of the batches at which changes are measured."""


@dataclass(frozen=True)
class CoordinateCheckOptions:
    data: cli.Data
    model: cli.ModelName = "smollm2-135m"
    revision: cli.Revision = None
    reading: DataConfig = field(default_factory=DataConfig)
    check: CheckConfig = field(default_factory=CheckConfig)
    targets: tuple[str, ...] = PAPER_TARGETS
    """Adapted modules"""
    records: BatchConfig = field(default_factory=BatchConfig)
    out: cli.Out = None

    def __post_init__(self) -> None:
        check_list("targets", self.targets)


def check_coordinates(config: CoordinateCheckOptions) -> None:
    """Run the cells that the run folder lacks, then fit the slopes and report."""
    with progress_bar("importing PyTorch and PEFT", 1):
        from rora_theory.measure.adapters import add_adapter
        from rora_theory.measure.batches import check_unseen
        from rora_theory.measure.modules import select_modules
        from rora_theory.measure.rank_check.check import FirstSteps, make_optimizer_of

    check_config, targets = config.check, without_list_of_all_linear(config.targets)
    source = inputs.read_inputs(
        config.data, config.model, config.reading, template=config.records.template, revision=config.revision
    )
    batch_config = replace(config.records, template=source.template)
    # The identity contains digests of the inputs, not their paths, so that the run can be resumed on another machine.
    identity = flatten(check_config) | flatten(batch_config) | {"targets": config.targets} | source.identity
    check_free(path_of(NAME, identity, config.out))
    # Batches of all seeds, and the model, whose modules the targets have to match, before its weights are read.
    seeds, steps = check_config.seeds, check_config.steps
    batches = record_batches.make_seed_batches(batch_config, source, seeds=seeds, steps=max(steps))
    select_modules(source.skeleton, targets)
    model = source.model
    for seed in seeds:
        check_unseen(model, batches[seed].held_out, batches[seed].train[0])
    data = ["/".join(Path(name).parts[-2:]) for name in config.data]
    extra = {"units": rank_check.UNITS, "device": inputs.describe_device(model), "data": data}
    folder = RunFolder.open(NAME, identity, out=config.out, extra=extra, models=[source.origin])
    prompts.print_prompts(batches[seeds[0]].examples, source.tokenizer, config.reading.show)
    # The outputs of the base model are computed once for each seed, and kept for the latest.
    latest: dict[int, FirstSteps] = {}

    def work(cell: CoordinateCell, _: Path) -> list[dict[str, Any]]:
        if cell.seed not in latest:
            latest.clear()
            latest[cell.seed] = FirstSteps(batches[cell.seed].train, batches[cell.seed].held_out, steps, label=_kind)
        setting = rank_check.setting_of(check_config, cell)
        adapted = add_adapter(model, setting, targets)
        make_optimizer = make_optimizer_of(setting.optimizer, setting.learning_rate)
        sizes = latest[cell.seed].measure(adapted, cell.rank, [cell.seed], make_optimizer)
        return rank_check.coordinate_rows(check_config, cell, sizes)

    sizes = run_table(
        rank_check.coordinate_cells(check_config), work, folder, rank_check.COLUMNS, title="coordinate check"
    )
    # Slopes in the rank, with verdicts.
    slopes = rank_check.coordinate_slopes(check_config, sizes)
    folder.write_frame(slopes, "slopes.csv")
    # Key figures: the whole model's slopes after the last step.
    ends = slopes[(slopes["module"] == MODEL) & (slopes["step"] == max(steps))]
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


def _kind(name: str) -> str:
    """Return a module's name within its layer, which modules of several layers share."""
    return re.sub(r"^.*?\.\d+\.", "", name)


def _short(quantity: str, module: str) -> str:
    if quantity != "output":
        return quantity
    return "all modules" if module == MODEL else module.rpartition(".")[2]


def _slope(row: dict[Any, Any]) -> str:
    if row["verdict"] == "diverged":
        return "diverged"
    return f"{row['slope']:+.2f} ± {row['half_width']:.2f}" + (" =" if row["verdict"] == "flat" else "")


main = cli.command(CoordinateCheckOptions, check_coordinates, __doc__)

if __name__ == "__main__":
    main()
