"""Which regime a real model is in: one batch of real data, no training, every adapted module of every layer.

    python -m sims.regime --model smollm2-135m --data DATA/ARC-Easy/train.json

For each module: signal, cross-talk and crossing rank r* under SGD and Adam, on the batch itself and on held-out
records, and the predicted rms of the first output change against rank. Then the judge: adapters are drawn and stepped
at every rank, and what they measure must agree with the prediction. `results.csv` has a row a module, split, optimizer,
init, rule and rank; `crossing_ranks.csv` what `sims.transfer --regime` reads; `judge.csv` the agreement by rank, and
`verdict.json` whether it holds. `python -m figures.regime RUN` draws it.
"""

import hashlib
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from scipy import stats

from rora_theory.adapters.lora import PAPER_TARGETS
from rora_theory.adapters.targets import full_name, matched
from rora_theory.advice.transfer import Setting, transfer
from rora_theory.errors import InputError
from rora_theory.inits import INITS, Init
from rora_theory.llama import MODULES
from rora_theory.measure import terms
from rora_theory.measure.layer_data import SPLITS, Layer
from rora_theory.scaling import Rule, check_integer, check_positive, exponent, scaling_factor
from rora_theory.seeds import check_seed
from rora_theory.stats.moments import Moments, root
from rora_theory.theory.laws import OPTIMIZERS, Optimizer
from sims.common import cli, tables
from sims.common.cells import Cells
from sims.common.crossings import CROSSING_COLUMNS, CROSSINGS
from sims.common.devices import describe, pick
from sims.common.progress import progress_bar
from sims.common.run_folder import RunFolder
from sims.common.scalings import check_ranks, parse_rule

NAME = "regime"
JUDGE, VERDICT = "judge.csv", "verdict.json"
COLUMNS = (
    "layer", "module", "split", "optimizer", "init", "rule", "kappa", "rank", "alpha", "scaling", "predicted",
    "measured", "standard_error", "adapters",
)  # fmt: skip
JUDGE_COLUMNS = (
    "optimizer", "init", "split", "rank", "modules", "mean_ratio", "standard_error", "largest_deviation", "largest_t",
)  # fmt: skip
UNITS = {
    "predicted": "root mean square over adapters, tokens and outputs of w = gamma B A x' after the first step: the law",
    "measured": "the same of adapters drawn and stepped; its standard error is over adapters",
    "signal": "mean over tokens of |G x'|^2; Adam: rows of G normalised",
    "cross_talk": "mean over tokens of |G|_F^2 |x'|^2; Adam: rows of G normalised",
    "crossing_rank": "rank where signal and cross-talk, summed over tokens, are equal; quartiles over tokens",
    "linear_term": "c: the mean square of w is proportional to r^2 + c r at fixed gamma and deviation of A",
    "epsilon": terms.EPSILON,
}
USER_RANKS = (8, 128)
"""Most users choose among these: the flat kappa is told between them."""


@dataclass(frozen=True)
class Config:
    """What to measure, and how finely."""

    data: tuple[str, ...]
    """.json or .jsonl files in the LLM-Adapters schema"""
    model: str = "smollm2-135m"
    """a folder in Hugging Face layout, a .gguf file, a hub id or a built-in name"""
    revision: str | None = None
    """branch, tag or commit of a model on the hub"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """type of the weights and activations"""
    targets: tuple[str, ...] = PAPER_TARGETS
    """modules to measure, as target_modules; all-linear is every one"""
    layers: tuple[int, ...] | None = None
    """layers to measure; none is all. Not with --targets all-linear, which is every layer"""
    items: int = 8
    """records of the batch that gives the gradient"""
    heldout_items: int = 8
    """records it is read at"""
    cutoff: int = 256
    """longest record in tokens"""
    loss_on: Literal["all", "answer"] = "all"
    """tokens in the loss: all (the protocol), or the answer alone"""
    tokens: int = 64
    """tokens of each split at which modules are read, drawn among all of it"""
    ranks: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    """ranks to predict and to step"""
    rules: tuple[str, ...] = ("lora", "rora", "0.25")
    """scaling rules to predict; adapters are stepped under the first, whose gamma is a factor of what is measured"""
    optimizers: tuple[Optimizer, ...] = OPTIMIZERS
    """sgd, adam"""
    inits: tuple[Init, ...] = ("kaiming_uniform", "gaussian")
    """laws of lora_A: PEFT's default and its gaussian (deviation 1/r); also normal, rademacher"""
    alpha: float = 16.0
    """alpha of every rule"""
    learning_rate: float = 3e-4
    """of the step; the change is proportional to it"""
    rows: int = 4096
    """rows of lora_A drawn for each module and init, dealt out as rows / r adapters at every rank; 0 steps none"""
    tolerance: float = 0.02
    """measured may differ from predicted by this much, or by its error bar where that is larger"""
    false_alarm: float = 0.01
    """probability that a true law fails somewhere: it sets the error bars' width"""
    seed: int = 0
    """of the records, the tokens and the adapters"""
    out: Path | None = None
    """run folder; none is results/regime/RUN_ID"""


BLOCK_ROWS = 256
"""Rows of A in one block."""

MOST_ROWS = 10**8
"""Most rows of A for each module and init."""


def check(config: Config) -> dict[str, Rule]:
    """The rules by their names. Raises `InputError` where a setting is out of range."""
    check_ranks(config.ranks, fewest=1)
    rules: dict[str, Rule] = {}
    for text in config.rules:
        rules[text] = parse_rule(text, "--rules")
        scaling_factor(rules[text], alpha=config.alpha, rank=max(config.ranks))
    accepted = {"optimizers": OPTIMIZERS, "inits": INITS}
    for name in ("rules", "optimizers", "inits", "targets"):
        values = getattr(config, name)
        if not values or len(set(values)) < len(values):
            raise InputError(f"{name} is {' '.join(map(str, values))!r}; accepted are one or more, each once")
        wrong = [value for value in values if name in accepted and value not in accepted[name]]
        if wrong:
            raise InputError(f"{name} has {wrong[0]!r}; accepted are {', '.join(accepted[name])}")
    cli.check_integers(config, items=1, heldout_items=1, tokens=1, cutoff=2, rows=0)
    for layer in config.layers or ():
        check_integer("--layers", layer, least=0)
    if config.rows > MOST_ROWS:
        raise InputError(
            f"--rows is {config.rows}; accepted are at most {MOST_ROWS:,}: at rank 1 the rms is then known to 0.01% of "
            "itself, and more would take days a module"
        )
    check_seed(config.seed)
    least = 4 * max(config.ranks)
    if config.rows and config.rows < least:
        raise InputError(f"rows is {config.rows}; accepted are 0, or {least} or more: 4 adapters of the largest rank")
    check_positive("learning_rate", config.learning_rate)
    check_positive("tolerance", config.tolerance)
    if not 0 < config.false_alarm < 1:
        raise InputError(f"false_alarm is {config.false_alarm}; accepted is a number between 0 and 1")
    return rules


def blocks(config: Config) -> tuple[int, int]:
    """Rows of A in a block (room for the largest rank), and the number of blocks."""
    size = max(BLOCK_ROWS, max(config.ranks))
    return size, -(-config.rows // size)


@dataclass(frozen=True)
class Measured:
    """One module's figures."""

    crossings: list[dict[str, Any]]
    rows: list[dict[str, Any]]


def frames(config: Config, rules: dict[str, Rule], layer: int, module: str) -> Iterator[dict[str, Any]]:
    """A module's rows without figures."""
    for init in config.inits:
        for optimizer in config.optimizers:
            for text, rule in rules.items():
                for rank in config.ranks:
                    for split in SPLITS:
                        yield {
                            "layer": layer,
                            "module": full_name(layer, module),
                            "split": split,
                            "optimizer": optimizer,
                            "init": init,
                            "rule": text,
                            "kappa": exponent(rule),
                            "rank": rank,
                            "alpha": config.alpha,
                            "scaling": scaling_factor(rule, alpha=config.alpha, rank=rank),
                        }


def measure(config: Config, rules: dict[str, Rule], layer: Layer, index: int, module: str) -> Measured:
    """Crossing ranks, predictions and stepped adapters of one module."""
    x = np.concatenate([layer.inputs[split] for split in SPLITS])
    crossings: list[dict[str, Any]] = []
    predicted: dict[tuple, float] = {}
    for init in config.inits:
        for optimizer in config.optimizers:
            law = terms.terms(layer.grad, x, optimizer=optimizer, init=init)
            crossings += [_crossing(law, layer, index, split) for split in SPLITS]
            predicted |= predict(config, rules, layer, law)
    measured = step(config, rules, layer) if config.rows else {}
    rows = []
    for frame in frames(config, rules, index, module):
        key = tuple(frame[name] for name in ("init", "optimizer", "rule", "rank", "split"))
        rows.append(frame | {"predicted": predicted[key]} | measured.get(key, {}))
    return Measured(crossings, rows)


def _places(layer: Layer) -> dict[str, slice]:
    """Where each split's tokens are in all of them."""
    edges = np.cumsum([0, *(len(layer.inputs[split]) for split in SPLITS)]).tolist()
    return {split: slice(*pair) for split, pair in zip(SPLITS, itertools.pairwise(edges), strict=True)}


def _crossing(law: terms.Terms, layer: Layer, index: int, split: str) -> dict[str, Any]:
    found = law.crossing(_places(layer)[split])
    p_out, p_in = layer.grad.shape
    return {
        "layer": index,
        "module": layer.name,
        "p_in": p_in,
        "p_out": p_out,
        "split": split,
        "tokens": len(layer.inputs[split]),
        "optimizer": law.optimizer,
        "init": law.init,
        "signal": found.signal,
        "cross_talk": found.cross_talk,
        "crossing_rank": found.rank,
        "lower_quartile": found.quartiles[0],
        "median": found.quartiles[1],
        "upper_quartile": found.quartiles[2],
        "linear_term": found.linear_term,
    }


def predict(config: Config, rules: dict[str, Rule], layer: Layer, law: terms.Terms) -> dict[tuple, float]:
    """The law's rms by init, optimizer, rule, rank and split.

    Under the first rule, which is stepped, with Adam's epsilon; under the others in the sign limit, where the rms of
    another gamma is a power of it away.
    """
    found = {}
    for position, (text, rule) in enumerate(rules.items()):
        exact = law.rms(
            config.ranks,
            [scaling_factor(rule, alpha=config.alpha, rank=rank) for rank in config.ranks],
            learning_rate=config.learning_rate,
            epsilon=terms.EPSILON if position == 0 else 0.0,
        )
        for rank, row in zip(config.ranks, exact, strict=True):
            for split, place in _places(layer).items():
                found[law.init, law.optimizer, text, rank, split] = math.sqrt(float(np.mean(row[place] ** 2)))
    return found


def step(config: Config, rules: dict[str, Rule], layer: Layer) -> dict[tuple, dict[str, Any]]:
    """The rms that adapters of each rank measure under the first rule, by the keys of `predict`."""
    text, rule = next(iter(rules.items()))
    size, count = blocks(config)
    found = {}
    for init in config.inits:
        digest = hashlib.sha256(f"{layer.name} {init}".encode()).digest()
        stream = terms.steps(
            layer,
            jax.random.fold_in(jax.random.key(config.seed), int.from_bytes(digest[:4], "little")),
            ranks=config.ranks,
            scalings=[[scaling_factor(rule, alpha=config.alpha, rank=rank)] for rank in config.ranks],
            optimizers=config.optimizers,
            learning_rate=config.learning_rate,
            init=init,
            rows=size,
        )
        moments: dict[tuple, Moments] = {}
        for _ in range(count):
            for rank, part in zip(config.ranks, next(stream), strict=True):
                for o, optimizer in enumerate(config.optimizers):
                    for s, split in enumerate(SPLITS):
                        key = (init, optimizer, text, rank, split)
                        moments[key] = moments.get(key, Moments()).add(part[:, 0, o, s])
        for key, total in moments.items():
            estimate = root(total.mean)
            figures = {"measured": estimate.value, "standard_error": estimate.standard_error, "adapters": total.count}
            found[key] = figures
    return found


def run(config: Config) -> None:
    """Measure, or go on with, a run; exit status 1 where the judge finds that the law fails."""
    from rora_theory import llama
    from rora_theory.measure.model_layers import record
    from sims.common import real_batch

    started = time.monotonic()
    rules = check(config)
    records = real_batch.digest(config.data)  # before the model, which takes longer
    places = pick(1)
    model = llama.load(config.model, config.dtype, config.revision)
    cli.tell(model.remarks)
    targets = "all-linear" if config.targets == ("all-linear",) else config.targets
    names = matched(model.config, targets, config.layers)
    parts = [(int(name.split(".")[2]), name.split(".", 3)[3]) for name in names]
    modules = [module for module in MODULES if any(module == part for _, part in parts)]
    chosen = {layer: [part for at, part in parts if at == layer] for layer in sorted({at for at, _ in parts})}
    pair = real_batch.batches(
        config.data,
        model.tokenizer,
        items=config.items,
        heldout_items=config.heldout_items,
        cutoff=config.cutoff,
        loss_on=config.loss_on,
        seed=config.seed,
    )
    apart = ("data", "model", "revision", "out", "false_alarm", "tolerance")
    identity = {name: value for name, value in vars(config).items() if name not in apart}
    identity |= model.origin.identity() | {"records_sha256": records}
    extra = {"units": UNITS, "device": describe(places), "data": [Path(name).name for name in config.data]}
    folder = RunFolder.open(NAME, identity, out=config.out, seed=config.seed, extra=extra)
    folder.update(model_layers=model.config.num_hidden_layers)
    kept = Cells(folder)
    if any(f"layer {index}" not in kept for index in chosen):
        train = record(model.params, model.config, pair.train, modules)
        heldout = record(model.params, model.config, pair.heldout, modules, gradients=False)
        folder.update(training_loss=train.loss, heldout_loss=heldout.loss)
    with progress_bar("layers", len(chosen), fields="{module}") as bar:

        def measure_layer(index: int) -> Any:
            found = []
            for module in chosen[index]:
                bar.advance(0, module=full_name(index, module))
                inputs = {
                    split: recording.sample(module, index, config.tokens, config.seed)
                    for split, recording in (("train", train), ("heldout", heldout))
                }
                layer = Layer(full_name(index, module), train.gradient(module, index), inputs)
                found.append(measure(config, rules, layer, index, module))
            return [c for one in found for c in one.crossings], [r for one in found for r in one.rows]

        crossings: list[dict[str, Any]] = []
        rows: list[dict[str, Any]] = []
        for index, modules in chosen.items():
            own, figures = kept.do(f"layer {index}", partial(measure_layer, index))
            crossings += own
            rows += figures
            folder.write_rows(CROSSING_COLUMNS, crossings, CROSSINGS)
            folder.write_rows(COLUMNS, rows)
            bar.advance(1, module=full_name(index, modules[-1]))
    verdict = judge(config, rows)
    if verdict is not None:
        folder.write_rows(JUDGE_COLUMNS, agreement(config, rows), JUDGE)
        folder.write(VERDICT, json.dumps(verdict, indent=2, sort_keys=True) + "\n")
    folder.finish(last_session_seconds=round(time.monotonic() - started, 1))
    report(config, crossings, rows, verdict)
    tables.print_text(f"{len(names)} modules in {time.monotonic() - started:.0f} s, written to {folder.path}")
    if verdict is not None and verdict["verdict"] == "fails":
        sys.exit(1)


def judge(config: Config, rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Whether every measured rms lies within its error bar or the tolerance of the predicted one; None: none measured.

    The error bar is Student's for the number of adapters, two-sided, at false_alarm divided by the number of
    comparisons (Bonferroni): with true laws, and no tolerance, one or more would fail with that probability.
    """
    tried = [row for row in rows if "measured" in row]
    if not tried:
        return None
    bars = {
        count: float(stats.t.isf(config.false_alarm / len(tried) / 2, count - 1))
        for count in {row["adapters"] for row in tried}
    }
    gaps = np.array([row["measured"] / row["predicted"] - 1 for row in tried])
    errors = np.array([row["standard_error"] / row["predicted"] for row in tried])
    allowed = np.maximum(config.tolerance, errors * np.array([bars[row["adapters"]] for row in tried]))
    t = gaps / errors
    outside = np.abs(gaps) > allowed
    worst = tried[int(np.argmax(np.abs(gaps) / allowed))]
    names = ("module", "split", "optimizer", "init", "rank", "predicted", "measured", "standard_error")
    return {
        "verdict": "holds" if not outside.any() else "fails",
        "comparisons": len(tried),
        "outside": int(np.sum(outside)),
        "false_alarm": config.false_alarm,
        "tolerance": config.tolerance,
        "error_bars_in_standard_errors": {str(count): round(bar, 3) for count, bar in sorted(bars.items())},
        "within_tolerance": float(np.mean(np.abs(gaps) <= config.tolerance)),
        "largest_deviation": float(np.max(np.abs(gaps))),
        "largest_t": float(np.max(np.abs(t))),
        "rms_t": float(np.sqrt(np.mean(t**2))),
        "median_relative_standard_error": float(np.median(errors)),
        "nearest_to_failing": {name: worst[name] for name in names},
    }


def agreement(config: Config, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Measured over predicted by optimizer, init, split and rank: means over modules, whose draws are independent."""
    found = []
    for optimizer in config.optimizers:
        for init in config.inits:
            for split in SPLITS:
                for rank in config.ranks:
                    key = (optimizer, init, split, rank)
                    own = [
                        row
                        for row in rows
                        if "measured" in row and tuple(row[k] for k in ("optimizer", "init", "split", "rank")) == key
                    ]
                    # Mean squares, which are unbiased; their root halves the deviation.
                    squares = np.array([(row["measured"] / row["predicted"]) ** 2 for row in own])
                    spread = np.array([row["standard_error"] / row["predicted"] for row in own])
                    ratios = np.sqrt(squares)
                    mean = math.sqrt(float(np.mean(squares)))
                    found.append(
                        {
                            "optimizer": optimizer,
                            "init": init,
                            "split": split,
                            "rank": rank,
                            "modules": len(own),
                            "mean_ratio": mean,
                            "standard_error": float(np.sqrt(np.sum((spread * ratios) ** 2))) / len(own) / mean,
                            "largest_deviation": float(np.max(np.abs(ratios - 1))),
                            "largest_t": float(np.max(np.abs((ratios - 1) / spread))),
                        }
                    )
    return found


def report(
    config: Config,
    crossings: Sequence[dict[str, Any]],
    rows: Sequence[dict[str, Any]],
    verdict: dict[str, Any] | None,
) -> None:
    """Print crossing ranks by type and depth, and the judge's verdict."""
    low, high = USER_RANKS
    kinds = list(dict.fromkeys(row["module"].rpartition(".")[2] for row in crossings))
    init = config.inits[0]
    for optimizer in config.optimizers:
        table = []
        for kind in kinds:
            for name, layers in _thirds(sorted({row["layer"] for row in crossings})):
                ranks: list[str] = []
                kappas: list[str] = []
                for split in SPLITS:
                    own = [
                        row
                        for row in crossings
                        if row["module"].rpartition(".")[2] == kind
                        and row["layer"] in layers
                        and (row["optimizer"], row["split"], row["init"]) == (optimizer, split, init)
                    ]
                    if not own:
                        ranks, kappas = [*ranks, ""], [*kappas, ""]
                        continue
                    whole, bottom, top = (
                        float(np.median([row[k] for row in own]))
                        for k in ("crossing_rank", "lower_quartile", "upper_quartile")
                    )
                    flat = [flat_kappa(optimizer, init, row["linear_term"]) for row in own]
                    ranks.append(f"{whole:.1f} ({bottom:.1f}-{top:.1f})")
                    kappas.append(f"{min(flat):.2f}-{max(flat):.2f}")
                table.append([kind, name, *ranks, *kappas])
        tables.print_table(
            f"{optimizer}, A {init}: crossing rank r* (quartiles over tokens), medians over layers; kappa: the "
            f"exponent whose first step is as large at rank {high} as at {low}, range over layers",
            ["module", "layers", *(f"{what} {split}" for what in ("r*", "kappa") for split in SPLITS)],
            table,
            left=2,
        )
    if verdict is None:
        return
    cells = {
        (row["optimizer"], row["init"], row["rank"]): (
            f"{row['mean_ratio']:.4f} ± {row['standard_error']:.4f} ({row['largest_deviation']:.1%})"
        )
        for row in agreement(config, rows)
        if row["split"] == "heldout"
    }
    for optimizer in config.optimizers:
        tables.print_table(
            f"{optimizer}: measured over predicted rms, held-out tokens: mean over modules ± s.e. (largest single "
            "deviation), by law of A",
            ["rank", *config.inits],
            [[rank, *(cells[optimizer, init, rank] for init in config.inits)] for rank in config.ranks],
        )
    tables.print_text(
        f"verdict: {verdict['verdict']}. {verdict['comparisons'] - verdict['outside']} of {verdict['comparisons']} "
        f"figures within {verdict['tolerance']:.0%} or their error bar (false alarm {verdict['false_alarm']:g} over "
        f"all); {verdict['within_tolerance']:.1%} within {verdict['tolerance']:.0%}; largest deviation "
        f"{verdict['largest_deviation']:.1%}, largest |t| {verdict['largest_t']:.2f}, rms t {verdict['rms_t']:.3f}"
    )


def flat_kappa(optimizer: Optimizer, init: Init, linear_term: float) -> float:
    """The kappa of ``gamma = alpha / r**kappa`` whose first step is as large at the larger of `USER_RANKS`."""
    low, high = USER_RANKS
    carried = transfer(Setting(low, 1.0, 1.0, 0.0, optimizer, init), high, {"module": linear_term})
    return -math.log(carried.alpha) / math.log(high / low)


def _thirds(layers: list[int]) -> list[tuple[str, set[int]]]:
    """Early, middle and late layers."""
    parts = [part for part in np.array_split(layers, 3) if len(part)]
    return [(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}", set(part.tolist())) for part in parts]


if __name__ == "__main__":
    cli.run(lambda: run(cli.parse(Config, description=(__doc__ or "").strip())))
