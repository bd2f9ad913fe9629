"""The rank coordinate check on a LLaMA model: do its first steps depend on the rank, under each rule and optimizer?

    python -m sims.coordinate_check --model smollm2-135m --data DATA/ARC-Easy/train.json

Adapters of several ranks, nested, take the same few steps on real records; what they add to every module, to the final
hidden state and to the logits is read on the batch they learned from and on held-out records. The rules meet at the
reference rank. A slope against the rank within the band of zero, seeds and all, is flat: the rule keeps that quantity
when the rank changes. The verdict on a rule is on the whole model, its final hidden state and its logits; the modules'
own outputs have one beside it. Controls are run too: they must not be flat.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rora_theory import digests
from rora_theory.adapters.inits import Init
from rora_theory.adapters.lora import PAPER_TARGETS
from rora_theory.data.batches import Batch
from rora_theory.finetune import Batches, choose_widths, read_records, split, tokenize
from rora_theory.llama import Model, load
from rora_theory.measure import rank_check
from rora_theory.measure.coordinate_table import MODEL
from rora_theory.measure.coordinates import Checker
from rora_theory.measure.rank_check import CheckConfig
from rora_theory.measure.unseen import apart_from
from rora_theory.optimizers import OptimizerName
from rora_theory.rules import alpha_at, check_list, check_ranks
from rora_theory.stats import slopes
from sims.common import cli, devices, scalings, tables
from sims.common.cells import Cells
from sims.common.progress import progress_bar
from sims.common.run_folder import RunFolder

NAME = "coordinate_check"
COLUMNS = (
    "optimizer", "rule", "kappa", "init", "control", "rank", "scaling", "learning_rate", "seed", "step", "split",
    "module", "quantity", "value",
)  # fmt: skip
FIT_COLUMNS = (
    "optimizer", "rule", "kappa", "init", "control", "step", "split", "module", "quantity", "slope", "standard_error",
    "half_width", "seeds", "verdict", "kappa_flat",
)  # fmt: skip
UNITS = {
    "output": "root mean square of gamma B A x over adapted layers, tokens and outputs",
    "inner": "root mean square of A x",
    "delta": "|gamma B A|_F, root mean square over layers",
    "grad_A, grad_B": "Frobenius norm over layers of the gradient that made the step",
    "hidden, logits": "root mean square of their change from the base model's",
    "loss": "nats a token",
    "half_width": "of the 95% interval of the slope, Student's t over seeds",
    "kappa_flat": "exponent that would have been flat: kappa + slope under Adam, kappa + slope/2 under SGD, if the "
    "quantity went on as gamma and gamma^2",
}


@dataclass(frozen=True)
class Config:
    """What to check. Lists are separated by spaces."""

    data: tuple[str, ...]
    """.json or .jsonl files in the LLM-Adapters schema"""
    model: str = "smollm2-135m"
    """a folder in Hugging Face layout, a .gguf file, a hub id or a built-in name"""
    revision: str | None = None
    """branch, tag or commit of a model on the hub"""
    ranks: tuple[int, ...] = (2, 8, 32, 128)
    """ranks of the adapter"""
    rules: tuple[str, ...] = ("lora", "rora")
    """scaling rules: lora, rora, rslora, or the exponent kappa of gamma = alpha / r^kappa"""
    optimizers: tuple[OptimizerName, ...] = ("adamw", "sgd")
    """sgd, momentum, adam or adamw, at a constant rate and without clipping"""
    inits: tuple[Init, ...] = ("kaiming_uniform",)
    """laws of A"""
    controls: bool = True
    """check kappa = 0 and the gaussian init under the first optimizer too, which must not be flat"""
    batches: Literal["fixed", "fresh"] = "fixed"
    """fixed: every step on one batch; fresh: each on a batch of its own"""
    steps: tuple[int, ...] = (1, 2, 5, 10)
    """updates after which to read, ascending"""
    seeds: int = 4
    """number of adapters, each with its own batches, 2 or more for error bars"""
    gamma: float = 2.0
    """scaling of every rule at the reference rank"""
    reference_rank: int = 8
    """rank at which the rules meet"""
    adam_rate: float = 1e-4
    """learning rate of adam and adamw"""
    sgd_rate: float = 0.01
    """learning rate of sgd"""
    momentum_rate: float = 0.001
    """learning rate of momentum"""
    targets: tuple[str, ...] = PAPER_TARGETS
    """adapted modules"""
    batch: int = 4
    """records a batch"""
    held_out: int = 64
    """records set aside, from which each seed's held-out batch is taken"""
    cutoff: int = 64
    """most tokens of a record"""
    template: Literal["train", "clean"] = "train"
    """training prompt"""
    band: float = slopes.BAND
    """largest absolute slope to call flat"""
    seed: int = 0
    """seed of all draws"""
    out: Path | None = None
    """run folder; none is results/coordinate_check/ID"""


@dataclass(frozen=True)
class Data:
    """Batches by seed.

    Attributes:
      train, held_out: of each seed.
      fresh: whether each step has a batch of its own.
    """

    train: tuple[Batches, ...]
    held_out: tuple[Batch, ...]
    fresh: bool

    def batch(self, seed: int, step: int) -> Batch:
        """The batch of a step, from 0."""
        batches = self.train[seed]
        return batches[step % len(batches) if self.fresh else 0]


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, check, run."""
    cli.run(lambda: run(cli.parse(Config, argv, description=__doc__ or "")))


def run(config: Config) -> None:
    """Run every cell that an earlier part of the run left, fit, judge, print."""
    checked = check(config)
    started = time.monotonic()
    records = read_records(config.data)
    places = devices.pick(1)
    model = load(config.model, revision=config.revision)
    cli.tell(model.remarks)
    data = prepare(config, records, model)
    checker = Checker(model.params, model.config, width=max(config.ranks), target_modules=config.targets)
    identity = {name: value for name, value in asdict(config).items() if name not in ("out", "data", "revision")}
    # Named by what they are, not by where they lie: the run may go on elsewhere.
    identity |= model.origin.identity() | {"records_sha256": digests.of_json(records)}
    extra = {"units": UNITS, "device": devices.describe(places), "data": [_short(source) for source in config.data]}
    folder = RunFolder.open(NAME, identity, out=config.out, seed=config.seed, extra=extra)
    kept = Cells(folder)
    rows: list[dict[str, Any]] = []
    todo = [
        (case, seed, rank)
        for case in rank_check.cases(checked)
        for seed in range(config.seeds)
        for rank in config.ranks
    ]
    with progress_bar("coordinate check", len(todo), fields="{cell}") as bar:
        for case, seed, rank in todo:
            label = f"{case.label}, r = {rank}, seed {seed}"
            bar.advance(0, cell=label)
            fresh = label not in kept
            batches = partial(data.batch, seed)
            work = partial(rank_check.cell_rows, checked, checker, case, seed, rank, batches, data.held_out[seed])
            rows += kept.do(label, work)
            if fresh:
                folder.write_rows(COLUMNS, rows)
            bar.advance(1, cell=label)
    folder.write_rows(COLUMNS, rows)
    found = rank_check.fits(checked, rows)
    folder.write_rows(FIT_COLUMNS, found, "slopes.csv")
    folder.finish(last_session_seconds=round(time.monotonic() - started, 1))
    report(config, checked, found, rows)
    tables.print_text(f"{len(todo)} cells in {time.monotonic() - started:.0f} s, written to {folder.path}")


def check(config: Config) -> CheckConfig:
    """What the library is to check.

    Raises:
      InputError: a setting out of range, before anything is read.
    """
    check_ranks(config.ranks)
    rules = scalings.parse_rules(config.rules)
    for rule in rules.values():
        alpha_at(rule, gamma=config.gamma, reference_rank=config.reference_rank)
    for name in ("optimizers", "inits"):
        check_list("--" + name, getattr(config, name))
    cli.check_integers(config, seeds=2, batch=1, held_out=1, cutoff=2)
    names = [field.name for field in fields(CheckConfig) if field.name != "rules"]
    return CheckConfig(rules=rules, **{name: getattr(config, name) for name in names})


def prepare(config: Config, records: list[Any], model: Model) -> Data:
    """Batches of one width, each seed's own; no record is in both splits.

    Where a held-out record begins as a trained one does (the prompt's opening), its inputs are the trained record's
    own, causal attention seeing nothing else: those tokens are not read.
    """
    trained, apart = split(records, config.held_out, config.seed)
    train, held_out = (
        tokenize(part, model.tokenizer, cutoff=config.cutoff, template=config.template) for part in (trained, apart)
    )
    widths = choose_widths(np.concatenate([train.sizes, held_out.sizes]), 1)
    seeds = range(config.seed, config.seed + config.seeds)
    batches = tuple(Batches(train, widths, batch=config.batch, seed=seed) for seed in seeds)
    most = max(config.steps) if config.batches == "fresh" else 1
    read = tuple(
        apart_from(
            Batches(held_out, widths, batch=config.batch, seed=seed)[0], [own[i % len(own)] for i in range(most)]
        )
        for seed, own in zip(seeds, batches, strict=True)
    )
    return Data(batches, read, config.batches == "fresh")


def report(
    config: Config, checked: CheckConfig, found: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]
) -> None:
    """Print the slopes of each case by module, and what they say."""
    splits = {"train": "trained on", "held_out": "held out"}
    ends = [(name, step) for name in splits for step in (config.steps[0], config.steps[-1])]
    summary = []
    for case, verdict in zip(rank_check.cases(checked), rank_check.verdicts(checked, found), strict=True):
        group = rank_check.of_case(found, case)
        table = {(row["quantity"], row["module"], row["split"], row["step"]): row for row in group}
        modules = [name for name in dict.fromkeys(row["module"] for row in group) if name != MODEL]
        lines = [("output", module) for module in modules] + [("output", MODEL), ("hidden", MODEL), ("logits", MODEL)]
        for split_, label in splits.items():
            tables.print_table(
                f"{case.label}, batch {label}: slope in the rank ± half of its 95% interval, = within ±{config.band:g}",
                ["", *[f"step {step}" for step in config.steps]],
                [
                    [
                        {"output": "all modules" if module == MODEL else module.rpartition(".")[2]}.get(
                            quantity, quantity
                        ),
                        *[_text(table.get((quantity, module, split_, step))) for step in config.steps],
                    ]
                    for quantity, module in lines
                ],
            )
        loss = [row["value"] for row in rank_check.of_case(rows, case) if row["quantity"] == "loss"]
        kappa = verdict["kappa_flat"]
        summary.append(
            [
                case.label,
                verdict["whole_model"],
                verdict["modules"],
                *[verdict[f"flat {split_} {step}"] for split_, step in ends],
                "" if kappa is None else f"{kappa:.2f}",
                f"{min(loss):.2f} to {max(loss):.2f}" if loss and np.isfinite(loss).all() else "not finite",
            ]
        )
    columns = [f"flat modules, {splits[split_]}, step {step}" for split_, step in ends]
    tables.print_table(
        f"Verdicts ({config.batches} batch, {config.seeds} seeds, ranks {' '.join(map(str, sorted(config.ranks)))})",
        [
            "rule",
            "whole model",
            "modules' own outputs",
            *columns,
            f"flat kappa of the whole model, step {config.steps[-1]}",
            "losses",
        ],
        summary,
        left=3,
    )


def _text(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if row["verdict"] == "diverged":
        return "diverged"
    return f"{row['slope']:+.2f} ± {row['half_width']:.2f}" + (" =" if row["verdict"] == "flat" else "")


def _short(source: str) -> str:
    """The last folder and the name of a file."""
    return "/".join(Path(source).parts[-2:])


if __name__ == "__main__":
    main(sys.argv[1:])
