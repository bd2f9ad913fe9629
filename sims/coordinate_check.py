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
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from rora_theory import digests
from rora_theory.adapters.inits import INITS, Init
from rora_theory.adapters.lora import PAPER_TARGETS
from rora_theory.data.batches import Batch
from rora_theory.errors import InputError
from rora_theory.finetune import Batches, choose_widths, read_records, split, tokenize
from rora_theory.llama import Model, load
from rora_theory.measure import coordinate_check
from rora_theory.measure.coordinate_check import MODEL, Coordinate, Setting, Table
from rora_theory.scaling import check_positive, exponent, scaling_factor
from rora_theory.seeds import check_seed
from rora_theory.stats import slopes
from rora_theory.toy import dynamics
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
WHOLE = ((MODEL, "hidden"), (MODEL, "logits"))
"""What the verdict on a rule is on: modules lose cross-talk with the rank, and it does not add up over them."""
OPTIMIZERS = {"sgd": "SGD", "momentum": "SGD with momentum", "adam": "Adam", "adamw": "AdamW"}


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
    optimizers: tuple[dynamics.Optimizer, ...] = ("adamw", "sgd")
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


class Case(NamedTuple):
    """One line of the check: everything but the rank and the seed."""

    optimizer: dynamics.Optimizer
    rule: str
    init: Init
    control: bool

    @property
    def label(self) -> str:
        """In words."""
        kappa = {"lora": "alpha/r", "rora": "alpha/sqrt(r)", "rslora": "alpha/sqrt(r)"}.get(self.rule)
        text = f"{OPTIMIZERS[self.optimizer]}, {kappa or f'kappa = {self.rule}'}, A {self.init}"
        return text + (" (control)" if self.control else "")


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
    check(config)
    started = time.monotonic()
    records = read_records(config.data)
    places = devices.pick(1)
    model = load(config.model, revision=config.revision)
    cli.tell(model.remarks)
    data = prepare(config, records, model)
    checker = coordinate_check.Checker(
        model.params, model.config, width=max(config.ranks), target_modules=config.targets
    )
    identity = {name: value for name, value in asdict(config).items() if name not in ("out", "data", "revision")}
    # Named by what they are, not by where they lie: the run may go on elsewhere.
    identity |= model.origin.identity() | {"records_sha256": digests.of_json(records)}
    extra = {"units": UNITS, "device": devices.describe(places), "data": [_short(source) for source in config.data]}
    folder = RunFolder.open(NAME, identity, out=config.out, seed=config.seed, extra=extra)
    kept = Cells(folder)
    rows: list[dict[str, Any]] = []
    todo = [(case, seed, rank) for case in cases(config) for seed in range(config.seeds) for rank in config.ranks]
    with progress_bar("coordinate check", len(todo), fields="{cell}") as bar:
        for case, seed, rank in todo:
            label = f"{case.label}, r = {rank}, seed {seed}"
            bar.advance(0, cell=label)
            fresh = label not in kept
            work = partial(cell_rows, config, checker, data, case, seed, rank)
            rows += kept.do(label, work)
            if fresh:
                folder.write_rows(COLUMNS, rows)
            bar.advance(1, cell=label)
    folder.write_rows(COLUMNS, rows)
    found = fits(config, rows)
    folder.write_rows(FIT_COLUMNS, found, "slopes.csv")
    folder.finish(last_session_seconds=round(time.monotonic() - started, 1))
    report(config, found, rows)
    tables.print_text(f"{len(todo)} cells in {time.monotonic() - started:.0f} s, written to {folder.path}")


def check(config: Config) -> None:
    """Refuse wrong arguments before anything is read.

    Raises:
      InputError: see the options' ranges.
    """
    scalings.check_ranks(config.ranks)
    for rule in scalings.parse_rules(config.rules).values():
        scalings.alpha_at(rule, gamma=config.gamma, reference_rank=config.reference_rank)
    for name, accepted in (("optimizers", dynamics.OPTIMIZERS), ("inits", INITS)):
        scalings.check_list(name, getattr(config, name))
        for value in getattr(config, name):
            if value not in accepted:
                raise InputError(f"--{name} has {value!r}; accepted are {', '.join(accepted)}")
    dynamics.check_steps(config.steps)
    for name in ("adam_rate", "sgd_rate", "momentum_rate", "band"):
        check_positive("--" + name.replace("_", "-"), getattr(config, name))
    cli.check_integers(config, seeds=2, batch=1, held_out=1, cutoff=2)
    check_seed(config.seed, "--seed")


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


def apart_from(batch: Batch, trained: Sequence[Batch]) -> Batch:
    """``batch`` with weight 0 wherever a row is, so far, the beginning of a trained row.

    Raises:
      InputError: nothing is left.
    """
    rows = np.concatenate([part.inputs for part in trained])
    same = (np.asarray(batch.inputs)[:, None] == rows[None]).cumprod(axis=2).any(axis=1)
    weights = np.where(same, np.float32(0), batch.weights)
    if not weights.any():
        raise InputError("--cutoff leaves no token of a held-out record apart from the trained ones; accepted is more")
    return batch._replace(weights=weights)


def cases(config: Config) -> Iterator[Case]:
    """The rules asked for, then the controls."""
    for optimizer in config.optimizers:
        for rule in config.rules:
            for init in config.inits:
                yield Case(optimizer, rule, init, False)
    if config.controls:
        first = config.optimizers[0]
        asked = {exponent(rule) for rule in scalings.parse_rules(config.rules).values()}
        if 0.0 not in asked:
            yield Case(first, "0", "kaiming_uniform", True)
        if "gaussian" not in config.inits:
            # Under constant gamma the gaussian init is flat: the rule farthest from that one.
            steepest = max(config.rules, key=lambda rule: exponent(scalings.parse_rules((rule,))[rule]))
            yield Case(first, steepest, "gaussian", True)


def cell_rows(
    config: Config, checker: coordinate_check.Checker, data: Data, case: Case, seed: int, rank: int
) -> list[dict[str, Any]]:
    """The rows of one adapter."""
    rule = scalings.parse_rules((case.rule,))[case.rule]
    alpha = scalings.alpha_at(rule, gamma=config.gamma, reference_rank=config.reference_rank)
    rates = {"sgd": config.sgd_rate, "momentum": config.momentum_rate}
    setting = Setting(rank, alpha, rule, case.init, case.optimizer, rates.get(case.optimizer, config.adam_rate))
    key = jax.random.fold_in(jax.random.key(config.seed), seed)
    frame = {"optimizer": case.optimizer, "rule": case.rule, "kappa": exponent(rule), "init": case.init}
    frame |= {"control": int(case.control), "rank": rank, "learning_rate": setting.learning_rate, "seed": seed}
    frame["scaling"] = scaling_factor(rule, alpha=alpha, rank=rank)
    run = checker.run(setting, key, lambda step: data.batch(seed, step), data.held_out[seed], steps=config.steps)
    return [
        frame
        | {name: getattr(coordinate, name) for name in ("step", "split", "module", "quantity")}
        | {"value": float(f"{value:.6g}")}
        for coordinate, value in run
    ]


def fits(config: Config, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Slope of every coordinate but the loss, and of the modules' outputs together (their logarithms' mean)."""
    found = []
    ranks = tuple(sorted(config.ranks))
    for case in cases(config):
        group = [row for row in rows if (row["optimizer"], row["rule"], row["init"]) == case[:3]]
        values: dict[Coordinate, np.ndarray] = {}
        for row in group:
            coordinate = Coordinate(row["quantity"], row["split"], row["module"], row["step"])
            table = values.setdefault(coordinate, np.full((config.seeds, len(ranks)), np.nan))
            table[row["seed"], ranks.index(row["rank"])] = row["value"]
        modules = [name for name in dict.fromkeys(row["module"] for row in group) if name != MODEL]
        for split_, step in dict.fromkeys((row["split"], row["step"]) for row in group):
            outputs = np.stack([values[Coordinate("output", split_, module, step)] for module in modules])
            with np.errstate(divide="ignore", invalid="ignore"):
                values[Coordinate("output", split_, MODEL, step)] = np.exp(np.mean(np.log(outputs), axis=0))
        table_of_case = Table(ranks, values)
        for coordinate, value in values.items():
            if coordinate.quantity == "loss":
                continue
            line: dict[str, Any] = {"optimizer": case.optimizer, "rule": case.rule, "init": case.init}
            line["control"] = int(case.control)
            line |= {"kappa": exponent(scalings.parse_rules((case.rule,))[case.rule]), **coordinate._asdict()}
            if not (np.isfinite(value).all() and (value > 0).all()):
                moved = np.isfinite(value).all()  # the first gradient of A is zero
                if not moved:
                    found.append(line | {"seeds": config.seeds, "verdict": "diverged"})
                continue
            fit = table_of_case.slope(
                coordinate.quantity, split=coordinate.split, step=coordinate.step, module=coordinate.module
            )
            power = 2 if case.optimizer in ("sgd", "momentum") else 1
            line |= {"slope": float(f"{fit.slope:.5f}"), "standard_error": float(f"{fit.standard_error:.2g}")}
            line |= {"half_width": float(f"{fit.half_width():.2g}"), "seeds": fit.seeds}
            line |= {"verdict": slopes.judge(fit, config.band)}
            if coordinate.quantity in ("output", "delta", "hidden", "logits"):  # those that carry gamma^power at first
                line |= {"kappa_flat": float(f"{line['kappa'] + fit.slope / power:.4f}")}
            found.append(line)
    return found


def report(config: Config, found: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> None:
    """Print the slopes of each case by module, and what they say."""
    splits = {"train": "trained on", "held_out": "held out"}
    summary = []
    for case in cases(config):
        group = [row for row in found if (row["optimizer"], row["rule"], row["init"]) == case[:3]]
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
        own = {
            (split_, step): [
                row["verdict"]
                for (q, m, s, t), row in table.items()
                if (q, s, t) == ("output", split_, step) and m in modules
            ]
            for split_ in splits
            for step in config.steps
        }
        whole = [row["verdict"] for row in group if (row["module"], row["quantity"]) in WHOLE]
        words = {"whole": in_a_word(whole), "own": in_a_word([verdict for each in own.values() for verdict in each])}
        if case.control:
            words = {name: _of_control(word) for name, word in words.items()}
        flat = [
            f"{own[split_, step].count('flat')} of {len(own[split_, step])}"
            for split_ in splits
            for step in _ends(config.steps)
        ]
        last = table.get(("hidden", MODEL, "train", config.steps[-1]))
        loss = [row["value"] for row in rows if _case(row) == case[:3] and row["quantity"] == "loss"]
        summary.append(
            [
                case.label,
                words["whole"],
                words["own"],
                *flat,
                "" if last is None or "kappa_flat" not in last else f"{last['kappa_flat']:.2f}",
                f"{min(loss):.2f} to {max(loss):.2f}" if loss and np.isfinite(loss).all() else "not finite",
            ]
        )
    columns = [f"flat modules, {label}, step {step}" for label in splits.values() for step in _ends(config.steps)]
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


def in_a_word(verdicts: Sequence[str]) -> str:
    """One verdict on several slopes: theirs where they agree, else which of them were found."""
    found = list(dict.fromkeys(verdicts))
    if len(found) == 1:
        return f"{found[0]} with the rank" if found[0] in ("grows", "shrinks") else found[0]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in found)
    return f"mixed ({counts})" if found else "nothing moved"


def _of_control(word: str) -> str:
    if word == "flat":
        return "FLAT: the check has no power"
    return f"{word}, as a control must" if word.startswith(("grows", "shrinks")) else word


def _ends(steps: Sequence[int]) -> tuple[int, int]:
    return steps[0], steps[-1]


def _text(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if row["verdict"] == "diverged":
        return "diverged"
    return f"{row['slope']:+.2f} ± {row['half_width']:.2f}" + (" =" if row["verdict"] == "flat" else "")


def _case(row: dict[str, Any]) -> tuple[Any, ...]:
    return (row["optimizer"], row["rule"], row["init"])


def _short(source: str) -> str:
    """The last folder and the name of a file."""
    return "/".join(Path(source).parts[-2:])


if __name__ == "__main__":
    main(sys.argv[1:])
