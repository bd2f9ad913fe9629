"""The sweep on real layers (``sims.variance_sweep --layer-data``): data fixed, adapters drawn."""

import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from rora_theory import digests
from rora_theory.errors import InputError
from rora_theory.inits import Init
from rora_theory.measure import layer_data, layer_rms
from rora_theory.scaling import Rule, exponent, scaling_factor
from rora_theory.stats.moments import agreement, log_log_fit
from sims.common import tables
from sims.common.cells import Cells
from sims.common.devices import describe, pick
from sims.common.progress import progress_bar
from sims.common.run_folder import RunFolder

if TYPE_CHECKING:
    from sims.variance_sweep import Config

NAME = "variance_sweep_layers"

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
    "epsilon": layer_rms.EPSILON,
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
    crossings = [
        {"layer": layer.name, "split": split, "optimizer": optimizer}
        | layer_rms.crossing(layer, split, optimizer)._asdict()
        for layer in layers
        for split in layer.inputs
        for optimizer in config.optimizers
    ]
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
    figures, draws = layer_rms.measured(
        cell.layer,
        layer_rms.stream_key(config.seed, cell.name),
        rank=cell.rank,
        steps=steps,
        learning_rate=config.learning_rate,
        init=cell.init,
        relative_error=config.relative_error or RELATIVE_ERROR,
        draws=config.draws,
    )
    exact = [
        value
        for step in steps
        for value in layer_rms.exact(
            cell.layer, step, rank=cell.rank, learning_rate=config.learning_rate, init=cell.init
        )
    ]
    return [
        frame | {"estimate": estimate.value, "standard_error": estimate.error, "exact": value, "draws": draws}
        for frame, estimate, value in zip(frames, figures, exact, strict=True)
    ]


def report(config: "Config", rows: list[dict[str, Any]], crossings: list[dict[str, Any]]) -> None:
    """Print how far measurement and law agree, and the exponents by layer."""
    found = agreement(*([row[name] for row in rows] for name in ("estimate", "standard_error", "exact")))
    tables.print_text(
        f"rms of w, {len(rows)} figures: measured/law within {found.largest_gap:.2%}, "
        f"largest |z| {found.largest_score:.2f}, rms z {found.rms_score:.2f}\n"
    )
    ranks = [rank for rank in sorted(config.ranks) if USER_RANKS[0] <= rank <= USER_RANKS[1]]
    if len(ranks) < 2:
        ranks = sorted(config.ranks)
    tables_of: dict[tuple[str, ...], list[list[str]]] = {}
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
            tables_of.setdefault((crossing["optimizer"], init, crossing["split"]), []).append(line)
    for (optimizer, init, split), table in tables_of.items():
        tables.print_table(
            f"{optimizer}, A {init}, {split} tokens: r* (quartiles over tokens), and the exponent of the rms of w in "
            f"the rank, r = {ranks[0]}..{ranks[-1]}, under each rule: measured ± s.e. (law)",
            ["layer", "r*", *config.rules],
            table,
        )
