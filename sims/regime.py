"""Which regime a real model is in: one batch of real data, no training, every adapted module of every layer.

    python -m sims.regime --model smollm2-135m --data DATA/ARC-Easy/train.json

For each module: signal, cross-talk and crossing rank r* under SGD and Adam, on the batch itself and on held-out
records, the predicted rms of the first output change against rank, and the steps after which A leads under Adam. Then
the judge: adapters are drawn and stepped at every rank, and what they measure must agree with the prediction.
Held-out tokens that the training batch has with the same beginning, and attention sinks, are left out.

`results.csv` has a row a module, split, optimizer, init, rule and rank; `crossing_ranks.csv` what `sims.transfer
--regime` reads; `takeover.csv` the distances at which A leads; `tokens.csv` how many tokens were read and left out;
`judge.csv` the agreement by rank, and `verdict.json` whether it holds. `python -m figures.regime RUN` draws it.
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from rora_theory.adapters.lora import PAPER_TARGETS
from rora_theory.errors import InputError
from rora_theory.inits import Init
from rora_theory.measure import regimes, terms
from rora_theory.measure.layer_data import SPLITS
from rora_theory.measure.module_regime import LayerRegime, RegimeConfig, agreement, flat_kappa, judge
from rora_theory.measure.tokens import SINK
from rora_theory.rules import check_ranks
from rora_theory.scaling import check_integer, check_positive
from rora_theory.theory.laws import OPTIMIZERS, Optimizer
from sims.common import cli, tables
from sims.common.cells import Cells
from sims.common.crossings import CROSSING_COLUMNS, CROSSINGS
from sims.common.devices import describe, pick
from sims.common.progress import progress_bar
from sims.common.run_folder import RunFolder
from sims.common.scalings import parse_rule

NAME = "regime"
TAKEOVER, TOKENS, JUDGE, VERDICT = "takeover.csv", "tokens.csv", "judge.csv", "verdict.json"
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
    "takeover": "distance that A's entries move, at a constant gradient under Adam, until A leads: steps times rate",
    "turn_5 to turn_95": "distance at which so many per cent of the entries of G A^T have turned their sign",
    "seen": "held-out tokens up to which the record begins as one of the training batch does: not read",
    "sinks": f"others whose input's norm is above {SINK:g} times the median of the split's: not read",
}
TAKEOVER_COLUMNS = (
    "layer", "module", "split", "init", "rank", "takeover", "turn_5", "turn_25", "turn_50", "turn_75", "turn_95",
)  # fmt: skip
TOKEN_COLUMNS = ("layer", "module", "split", "all", "seen", "sinks", "read")
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
    """tokens of each split at which modules are read, drawn among all of it that the mask leaves"""
    mask: bool = True
    """leave out held-out tokens that share their whole beginning with the training batch (template, first tokens), and
    attention sinks: an input whose norm is above 10 times the median of the module's held-out inputs"""
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


def check(config: Config) -> RegimeConfig:
    """What the library is to measure. Raises `InputError` where a setting is out of range."""
    check_ranks(config.ranks, fewest=1)
    if not config.targets or len(set(config.targets)) < len(config.targets):
        raise InputError(f"targets is {' '.join(config.targets)!r}; accepted are one or more, each once")
    cli.check_integers(config, items=1, heldout_items=1, tokens=1, cutoff=2, rows=0)
    for layer in config.layers or ():
        check_integer("--layers", layer, least=0)
    check_positive("tolerance", config.tolerance)
    if not 0 < config.false_alarm < 1:
        raise InputError(f"false_alarm is {config.false_alarm}; accepted is a number between 0 and 1")
    if len(set(config.rules)) < len(config.rules):
        raise InputError(f"rules is {' '.join(config.rules)!r}; accepted are one or more, each once")
    return RegimeConfig(
        ranks=config.ranks,
        rules={text: parse_rule(text, "--rules") for text in config.rules},
        optimizers=config.optimizers,
        inits=config.inits,
        alpha=config.alpha,
        learning_rate=config.learning_rate,
        rows=config.rows,
        tokens=config.tokens,
        mask=config.mask,
        seed=config.seed,
    )


def run(config: Config) -> None:
    """Measure, or go on with, a run; exit status 1 where the judge finds that the law fails."""
    from rora_theory import llama
    from sims.common import real_batch

    started = time.monotonic()
    measured = check(config)
    records = real_batch.digest(config.data)  # before the model, which takes longer
    places = pick(1)
    model = llama.load(config.model, config.dtype, config.revision)
    cli.tell(model.remarks)
    targets = "all-linear" if config.targets == ("all-linear",) else config.targets
    modules = regimes.chosen(model.config, targets, config.layers)
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
    if any(f"layer {index}" not in kept for index in modules):
        recorded = regimes.read(model.params, model.config, pair.train, pair.heldout, regimes.kinds(modules))
        folder.update(training_loss=recorded.train.loss, heldout_loss=recorded.heldout.loss)

    def measure_layer(index: int) -> Any:
        return recorded.measure(measured, index, modules[index])

    found = LayerRegime([], [], [], [])
    with progress_bar("layers", len(modules), fields="{module}") as bar:
        for index in modules:
            bar.advance(0, module=f"layer {index}")
            rows = kept.do(f"layer {index}", partial(measure_layer, index))
            for table, part in zip(found, rows, strict=True):
                table += part
            folder.write_rows(CROSSING_COLUMNS, found.crossings, CROSSINGS)
            folder.write_rows(COLUMNS, found.results)
            folder.write_rows(TAKEOVER_COLUMNS, found.takeover, TAKEOVER)
            folder.write_rows(TOKEN_COLUMNS, found.tokens, TOKENS)
            bar.advance(1, module=f"layer {index}")
    crossings, results, takeover, read = map(pd.DataFrame, found)
    verdict = judge(results, false_alarm=config.false_alarm, tolerance=config.tolerance)
    if verdict is not None:
        folder.write_rows(JUDGE_COLUMNS, agreement(results).to_dict("records"), JUDGE)
        folder.write(VERDICT, json.dumps(verdict, indent=2, sort_keys=True) + "\n")
    folder.finish(last_session_seconds=round(time.monotonic() - started, 1))
    report(config, crossings, results, takeover, read, verdict)
    count = sum(map(len, modules.values()))
    tables.print_text(f"{count} modules in {time.monotonic() - started:.0f} s, written to {folder.path}")
    if verdict is not None and verdict["verdict"] == "fails":
        sys.exit(1)


def report(
    config: Config,
    crossings: pd.DataFrame,
    results: pd.DataFrame,
    takeover: pd.DataFrame,
    tokens: pd.DataFrame,
    verdict: dict[str, Any] | None,
) -> None:
    """Print crossing ranks and takeover by type and depth, and the judge's verdict."""
    init = config.inits[0]
    for optimizer in config.optimizers:
        _print_crossings(optimizer, init, crossings, tokens)
    if len(takeover):
        _print_takeover(config.learning_rate, init, takeover)
    if verdict is None:
        return
    heldout = agreement(results).query("split == 'heldout'")
    cells = {
        (row.optimizer, row.init, row.rank): (
            f"{row.mean_ratio:.4f} ± {row.standard_error:.4f} ({row.largest_deviation:.1%})"
        )
        for row in heldout.itertuples()
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


def _print_crossings(optimizer: Optimizer, init: Init, crossings: pd.DataFrame, tokens: pd.DataFrame) -> None:
    low, high = USER_RANKS
    own = crossings[(crossings["optimizer"] == optimizer) & (crossings["init"] == init)]
    rows = []
    for kind, name, parts in _places(own):
        ranks, kappas = [], []
        for split in SPLITS:
            part = parts[parts["split"] == split]
            pooled, lower, median, upper = (
                float(part[column].median())
                for column in ("crossing_rank", "lower_quartile", "median", "upper_quartile")
            )
            flat = [flat_kappa(optimizer, init, c, low=low, high=high) for c in part["linear_term"]]
            ranks += [f"{pooled:.1f}", f"{median:.1f} ({lower:.1f}-{upper:.1f})"]
            kappas.append(f"{min(flat):.2f}-{max(flat):.2f}")
        rows.append([kind, name, *ranks, *kappas, _left_out(tokens, set(parts["module"]))])
    tables.print_table(
        f"{optimizer}, A {init}: crossing rank r* of all tokens together (pooled) and of a token (median and quartiles "
        f"over tokens), medians over layers; kappa: the exponent whose first step is as large at rank {high} as at "
        f"{low}, range over layers; left out: held-out tokens of a module that begin as the training batch does + "
        f"sinks (input above {SINK:g} times the median norm), of all",
        [
            "module",
            "layers",
            *(f"r* {what} {split}" for split in SPLITS for what in ("pooled", "median")),
            *(f"kappa {split}" for split in SPLITS),
            "left out",
        ],
        rows,
        left=2,
    )


def _print_takeover(learning_rate: float, init: Init, takeover: pd.DataFrame) -> None:
    own = takeover[takeover["init"] == init]
    rows = []
    for kind, name, parts in _places(own):
        cells = [
            _over_layers(part["takeover"] / learning_rate) for _, part in parts.groupby(["split", "rank"], sort=False)
        ]
        rows.append([kind, name, *cells, f"{(parts['turn_5'] / learning_rate).median():.1f}"])
    heads = [f"r = {rank} {split}" for split, rank in own[["split", "rank"]].drop_duplicates().itertuples(index=False)]
    tables.print_table(
        f"Adam, A {init}: steps t_A at rate {learning_rate:g} and a constant gradient after which A leads, median over "
        "layers (range); turn: steps after which 5% of the entries of G A^T have turned their sign, far beyond which "
        "the law is approximate",
        ["module", "layers", *heads, "turn"],
        rows,
        left=2,
    )


def _over_layers(values: pd.Series) -> str:
    text = f"{values.median():.1f}"
    return text if len(values) == 1 else f"{text} ({values.min():.1f}-{values.max():.1f})"


def _places(rows: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Type of module, name of a third of the layers, and its rows."""
    kinds = rows["module"].str.rpartition(".")[2]
    for kind in dict.fromkeys(kinds):
        for name, layers in _thirds(sorted(set(rows["layer"]))):
            part = rows[(kinds == kind) & rows["layer"].isin(layers)]
            if len(part):
                yield kind, name, part


def _left_out(tokens: pd.DataFrame, modules: set[str]) -> str:
    """Held-out tokens of a module that were not read, a range where modules differ; nothing where no one knows."""
    if not len(tokens):
        return ""
    own = tokens[tokens["module"].isin(modules) & (tokens["split"] == "heldout")]
    low, high = own["sinks"].min(), own["sinks"].max()
    sinks = f"{low}" if low == high else f"{low}-{high}"
    return f"{own['seen'].iloc[0]}+{sinks} of {own['all'].iloc[0]}"


def _thirds(layers: list[int]) -> list[tuple[str, set[int]]]:
    """Early, middle and late layers."""
    parts = [part for part in np.array_split(layers, 3) if len(part)]
    return [(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}", set(part.tolist())) for part in parts]


if __name__ == "__main__":
    cli.run(lambda: run(cli.parse(Config, description=(__doc__ or "").strip())))
