"""The sweep on real layers (``sims.variance_sweep --layer-data``): data fixed, adapters drawn."""

import hashlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from rora_theory import digests
from rora_theory.errors import InputError
from rora_theory.inits import Init
from rora_theory.measure import layer_data
from rora_theory.scaling import Rule, exponent, scaling_factor
from rora_theory.stats.moments import Moments, log_log_fit, root
from rora_theory.theory import laws
from sims.common import tables
from sims.common.cells import Cells
from sims.common.devices import describe, pick
from sims.common.progress import progress_bar
from sims.common.run_folder import RunFolder

if TYPE_CHECKING:
    from sims.variance_sweep import Config

NAME = "variance_sweep_layers"

EPSILON = 1e-8
"""Adam's epsilon, PyTorch's and optax's default."""

RELATIVE_ERROR = 0.01

COLUMNS = (
    "layer", "split", "tokens", "optimizer", "rule", "kappa", "init", "p_in", "p_out", "rank", "alpha", "scaling",
    "quantity", "estimate", "standard_error", "exact", "draws", "sampler",
)  # fmt: skip
CROSSING_COLUMNS = (
    "layer",
    "split",
    "optimizer",
    "crossing_rank",
    "lower_quartile",
    "median",
    "upper_quartile",
)
UNITS = {
    "rms": "root mean square of w_i over adapters, tokens and outputs; its error is that over adapters",
    "crossing_rank": "rank at which signal and cross-talk, summed over tokens, are equal; quartiles over tokens",
    "epsilon": EPSILON,
}
USER_RANKS = (8, 128)
"""Most users choose among these: the exponent that they would see is fitted over the sweep's ranks between them."""


@dataclass(frozen=True)
class Cell:
    """One stream of adapters: it serves every optimizer, rule and split."""

    layer: layer_data.Layer
    init: Init
    rank: int

    @property
    def name(self) -> str:
        """As the run's files name it, and its stream of random numbers."""
        return f"{self.layer.name} {self.init} {self.rank}"


def run(config: "Config", rules: dict[str, Rule]) -> None:
    """Run the sweep on ``config.layer_data``, or go on with it."""
    assert config.layer_data is not None
    if config.sampler == "reduced":
        raise InputError("--sampler reduced has no fixed data; accepted with --layer-data are direct and auto")
    started = time.monotonic()
    layers = layer_data.read(config.layer_data)
    places = pick(1)
    keys = ("ranks", "rules", "inits", "optimizers", "alpha", "learning_rate", "relative_error", "draws", "seed")
    identity = {"layer_data": digests.of_file(config.layer_data)} | {key: getattr(config, key) for key in keys}
    extra = {"units": UNITS, "device": describe(places), "layer_data": config.layer_data.name}
    folder = RunFolder.open(NAME, identity, out=config.out, seed=config.seed, extra=extra)
    cells = [Cell(layer, init, rank) for layer in layers for init in config.inits for rank in config.ranks]
    kept = Cells(folder)
    rows: list[dict[str, Any]] = []
    crossings = list(_crossings(config, layers))
    folder.write_rows(CROSSING_COLUMNS, crossings, "crossing_ranks.csv")
    with progress_bar("real layers", len(cells), fields="{cell}") as bar:
        for cell in cells:
            bar.advance(0, cell=f"{cell.layer.name}, r = {cell.rank}")
            fresh = cell.name not in kept
            rows += kept.do(cell.name, partial(_simulate, config, rules, cell))
            if fresh:
                folder.write_rows(COLUMNS, rows)
            bar.advance(1, cell=f"{cell.layer.name}, r = {cell.rank}")
    folder.write_rows(COLUMNS, rows)
    folder.finish(last_session_seconds=round(time.monotonic() - started, 1))
    report(config, rows, crossings)
    tables.print_text(f"{len(cells)} cells in {time.monotonic() - started:.1f} s, written to {folder.path}")


def _frames(config: "Config", rules: dict[str, Rule], cell: Cell) -> list[dict[str, Any]]:
    """A cell's rows without figures."""
    p_out, p_in = cell.layer.grad.shape
    return [
        {
            "layer": cell.layer.name,
            "split": split,
            "tokens": len(cell.layer.inputs[split]),
            "optimizer": optimizer,
            "rule": text,
            "kappa": exponent(rule),
            "init": cell.init,
            "p_in": p_in,
            "p_out": p_out,
            "rank": cell.rank,
            "alpha": config.alpha,
            "scaling": scaling_factor(rule, alpha=config.alpha, rank=cell.rank),
            "quantity": "rms",
            "sampler": "direct",
        }
        for optimizer in config.optimizers
        for text, rule in rules.items()
        for split in layer_data.SPLITS
    ]


def _simulate(config: "Config", rules: dict[str, Rule], cell: Cell) -> list[dict[str, Any]]:
    """Draw adapters until every rms of the cell is known to the asked relative error."""
    frames = _frames(config, rules, cell)
    steps = [(frame["optimizer"], frame["scaling"]) for frame in frames[:: len(layer_data.SPLITS)]]
    digest = hashlib.sha256(cell.name.encode()).digest()
    stream = layer_data.mean_squares(
        cell.layer,
        jax.random.fold_in(jax.random.key(config.seed), int.from_bytes(digest[:4], "little")),
        rank=cell.rank,
        steps=steps,
        learning_rate=config.learning_rate,
        init=cell.init,
        epsilon=EPSILON,
    )
    moments = [Moments()] * len(frames)
    for block in stream:
        flat = block.reshape(len(block), len(frames))
        if config.draws is not None:
            flat = flat[: config.draws - moments[0].count]
        moments = [total.add(flat[:, column]) for column, total in enumerate(moments)]
        if config.draws is not None and moments[0].count >= config.draws:
            break
        worst = max(total.mean.standard_error / total.mean.value for total in moments) / 2
        if config.draws is None and moments[0].count >= 64 and worst <= (config.relative_error or RELATIVE_ERROR):
            break
    exact = [value for optimizer, scaling in steps for value in _exact(config, cell, optimizer, scaling)]
    rows = []
    for frame, total, value in zip(frames, moments, exact, strict=True):
        estimate = root(total.mean)
        figures = {"estimate": estimate.value, "standard_error": estimate.standard_error}
        rows.append(frame | figures | {"exact": value, "draws": total.count})
    return rows


def _exact(config: "Config", cell: Cell, optimizer: laws.Optimizer, scaling: float) -> list[float]:
    """The law's rms of w for each split."""
    law = laws.first_step_moments(
        cell.layer.grad,
        np.concatenate([cell.layer.inputs[split] for split in layer_data.SPLITS]),
        rank=cell.rank,
        scaling=scaling,
        learning_rate=config.learning_rate,
        optimizer=optimizer,
        init=cell.init,
        epsilon=EPSILON,
    )
    ends = np.cumsum([len(cell.layer.inputs[split]) for split in layer_data.SPLITS])[:-1]
    return [math.sqrt(float(np.mean(part))) for part in np.split(law.second_moment, ends)]


def _crossings(config: "Config", layers: list[layer_data.Layer]) -> Iterator[dict[str, Any]]:
    """Crossing ranks: of the layer (signal and cross-talk summed over tokens), and their quartiles over tokens."""
    for layer in layers:
        for split, x in layer.inputs.items():
            for optimizer in config.optimizers:
                ranks = laws.crossing_rank(layer.grad, x, optimizer=optimizer)
                weight = np.sum(np.float64(x) ** 2, axis=1)
                offset = 0.0 if optimizer == "sgd" else 1.0
                total = offset + float(np.sum(weight) / np.sum(weight / (ranks - offset)))
                low, middle, high = (float(value) for value in np.quantile(ranks, [0.25, 0.5, 0.75]))
                yield {
                    "layer": layer.name,
                    "split": split,
                    "optimizer": optimizer,
                    "crossing_rank": total,
                    "lower_quartile": low,
                    "median": middle,
                    "upper_quartile": high,
                }


def report(config: "Config", rows: list[dict[str, Any]], crossings: list[dict[str, Any]]) -> None:
    """Print how far measurement and law agree, and the exponents by layer."""
    scores = [(row["estimate"] - row["exact"]) / row["standard_error"] for row in rows]
    gap = max(abs(row["estimate"] / row["exact"] - 1) for row in rows)
    tables.print_text(
        f"rms of w, {len(rows)} figures: measured/law within {gap:.2%}, largest |z| {max(map(abs, scores)):.2f}, "
        f"rms z {math.sqrt(float(np.mean(np.square(scores)))):.2f}\n"
    )
    ranks = [rank for rank in sorted(config.ranks) if USER_RANKS[0] <= rank <= USER_RANKS[1]]
    if len(ranks) < 2:
        ranks = sorted(config.ranks)
    found: dict[tuple[str, ...], list[list[str]]] = {}
    for crossing in crossings:
        for init in dict.fromkeys(row["init"] for row in rows):
            key = (crossing["layer"], crossing["split"], crossing["optimizer"], init)
            line = [
                key[0].removeprefix("model.layers."),
                f"{crossing['crossing_rank']:.1f} ({crossing['lower_quartile']:.1f}-{crossing['upper_quartile']:.1f})",
            ]
            for rule in config.rules:
                chosen = [
                    row
                    for row in rows
                    if (row["layer"], row["split"], row["optimizer"], row["init"]) == key
                    and row["rule"] == rule
                    and row["rank"] in ranks
                ]
                if len(chosen) < 2:
                    line.append("")
                    continue
                x = [row["rank"] for row in chosen]
                fit = log_log_fit(x, [r["estimate"] for r in chosen], [r["standard_error"] for r in chosen])
                exact = log_log_fit(x, [r["exact"] for r in chosen], [0.0] * len(x))
                line.append(f"{fit.slope:+.3f} ± {fit.standard_error:.3f} ({exact.slope:+.3f})")
            found.setdefault((crossing["optimizer"], init, crossing["split"]), []).append(line)
    for (optimizer, init, split), table in found.items():
        tables.print_table(
            f"{optimizer}, A {init}, {split} tokens: r* (quartiles over tokens), and the exponent of the rms of w in "
            f"the rank, r = {ranks[0]}..{ranks[-1]}, under each rule: measured ± s.e. (law)",
            ["layer", "r*", *config.rules],
            table,
        )
