"""Crossing ranks and takeover over a real model's depth, and predicted lines through measured points: sims.regime."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import matplotlib.pyplot as plt
import tyro
from matplotlib.ticker import MaxNLocator

from figures import style

SPLITS = {"train": "training", "heldout": "held-out"}


@dataclass(frozen=True)
class Config:
    """Which run to draw."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder of sims.regime."""
    split: Literal["train", "heldout"] = "heldout"
    """Tokens the modules are read at."""
    init: str | None = None
    """Init of the adapters; by default the run's first."""
    modules: tuple[str, ...] = ()
    """Modules whose rms to draw, by full name; by default the first and last layer's of the first and last type."""
    out: Path | None = None
    """Folder for regime_depth, regime_takeover and regime_rms (.png and .svg); by default the run folder."""


def draw(config: Config) -> Sequence[Path]:
    """The figures; takeover where the run measured it."""
    manifest, rows = style.read_run(config.run, "regime")
    crossings = style.read_table(config.run / "crossing_ranks.csv", needed=True)
    init = config.init or rows[0]["init"]
    rows = [row for row in rows if row["split"] == config.split and row["init"] == init]
    crossings = [row for row in crossings if row["split"] == config.split and row["init"] == init]
    if not rows or not crossings:
        style.fail(f"{config.run}: has no row of split {config.split} and init {init}; accepted are those of the run")
    out = config.out or config.run
    used = manifest["config"]
    rate = used["lr"] if "lr" in used else used["learning_rate"]  # its name in earlier runs
    takeover = style.read_table(config.run / "takeover.csv")
    takeover = [row for row in takeover if row["split"] == config.split and row["init"] == init]
    return [
        *_depth(crossings, config.split, out),
        *(_takeover(takeover, rate, config.split, out) if takeover else ()),
        *_rms(rows, config, init, out),
    ]


def _kind(row: dict[str, str]) -> str:
    return row["module"].rpartition(".")[2]


def _depth(rows: list[dict[str, str]], split: str, out: Path) -> list[Path]:
    """A panel a type of module: r* of each layer, band between the quartiles over tokens."""
    kinds = list(dict.fromkeys(map(_kind, rows)))
    optimizers = list(dict.fromkeys(row["optimizer"] for row in rows))
    figure, axes = _panels(kinds)
    for axis, kind in zip(axes[0], kinds, strict=True):
        for index, optimizer in enumerate(optimizers):
            own = sorted(
                (row for row in rows if (_kind(row), row["optimizer"]) == (kind, optimizer)),
                key=lambda row: int(row["layer"]),
            )
            layers = [int(row["layer"]) for row in own]
            colour = style.COLOURS[index]
            low, high = ([float(row[name]) for row in own] for name in ("lower_quartile", "upper_quartile"))
            axis.fill_between(layers, low, high, color=colour, alpha=0.2, linewidth=0)
            axis.plot(
                layers,
                [float(row["crossing_rank"]) for row in own],
                color=colour,
                marker=style.MARKERS[index],
                markersize=2,
                label=style.OPTIMIZERS[optimizer],
            )
    axes[0, 0].set_ylabel("crossing rank $r^*$")
    tokens = ", ".join(sorted({row["tokens"] for row in rows}))
    handles = style.named(axes.flat)
    for optimizer, handle in list(handles.items()):
        handles[f"{optimizer}, quartiles over tokens"] = plt.Rectangle(
            (0, 0), 1, 1, color=handle.get_color(), alpha=0.2, linewidth=0
        )
    style.legend(figure, handles, f"{tokens} {SPLITS[split]} tokens a module; line: $r^*$ of all of them together")
    return style.save(figure, out, "regime_depth")


def _takeover(rows: list[dict[str, str]], learning_rate: float, split: str, out: Path) -> list[Path]:
    """A panel a type of module: steps after which A leads under Adam, a line a rank; dashes: signs begin to turn."""
    kinds = list(dict.fromkeys(map(_kind, rows)))
    ranks = list(dict.fromkeys(row["rank"] for row in rows))
    figure, axes = _panels(kinds)
    for axis, kind in zip(axes[0], kinds, strict=True):
        own = sorted((row for row in rows if _kind(row) == kind), key=lambda row: int(row["layer"]))
        turns = [row for row in own if row["rank"] == ranks[0]]
        lines = [(f"r = {rank}", "takeover", [row for row in own if row["rank"] == rank]) for rank in ranks]
        lines += [("5% of the signs of $G A^T$ have turned", "turn_5", turns)]
        for index, (label, column, line) in enumerate(lines):
            axis.plot(
                [int(row["layer"]) for row in line],
                [float(row[column]) / learning_rate for row in line],
                color="0.5" if column == "turn_5" else style.COLOURS[index],
                linestyle="--" if column == "turn_5" else "-",
                marker="" if column == "turn_5" else style.MARKERS[index],
                markersize=2,
                label=label,
            )
    axes[0, 0].set_ylabel("steps $t_A$ until A leads")
    title = (
        f"Adam, A {rows[0]['init']}, {SPLITS[split]} tokens; steps at rate {learning_rate:g} and a constant gradient"
    )
    style.legend(figure, style.named(axes.flat), title)
    return style.save(figure, out, "regime_takeover")


def _panels(kinds: list[str]) -> tuple[plt.Figure, Any]:
    """A panel a type of module, its layers along the axis, the other axis logarithmic."""
    figure, axes = plt.subplots(
        1, len(kinds), figsize=(max(3.4, 0.5 + 1.35 * len(kinds)), 2.3), sharex=True, sharey=True, squeeze=False
    )
    for axis, kind in zip(axes[0], kinds, strict=True):
        axis.set(yscale="log", title=kind, xlabel="layer")
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    return figure, axes


def _rms(rows: list[dict[str, str]], config: Config, init: str, out: Path) -> list[Path]:
    """A row an optimizer, a panel a module: the law's lines of every rule, the points of the one that was stepped."""
    every = list(dict.fromkeys(row["module"] for row in rows))
    modules = config.modules or _default(every)
    unknown = [name for name in modules if name not in every]
    if unknown:
        style.fail(f"--modules has {unknown[0]}; accepted are the run's, such as {every[0]}")
    optimizers = list(dict.fromkeys(row["optimizer"] for row in rows))
    rules = list(dict.fromkeys(row["rule"] for row in rows))
    figure, axes = plt.subplots(
        len(optimizers),
        len(modules),
        figsize=(max(3.4, 0.6 + 1.6 * len(modules)), 0.7 + 1.6 * len(optimizers)),
        sharex=True,
        sharey="row",
        squeeze=False,
    )
    measured = any(row["measured"] for row in rows if row["module"] in modules)
    for line, optimizer in zip(axes, optimizers, strict=True):
        for axis, module in zip(line, modules, strict=True):
            for position, rule in enumerate(rules):
                label, colour, marker = style.look(rule, position)
                key = (module, optimizer, rule)
                own = sorted(
                    (row for row in rows if (row["module"], row["optimizer"], row["rule"]) == key),
                    key=lambda row: int(row["rank"]),
                )
                first = float(own[0]["predicted"])
                ranks = [int(row["rank"]) for row in own]
                axis.plot(ranks, [float(row["predicted"]) / first for row in own], color=colour, label=label)
                seen = [row for row in own if row["measured"]]
                if seen:
                    axis.errorbar(
                        [int(row["rank"]) for row in seen],
                        [float(row["measured"]) / first for row in seen],
                        yerr=[float(row["standard_error"]) / first for row in seen],
                        color=colour,
                        marker=marker,
                        markersize=2.5,
                        linestyle="none",
                    )
            axis.set(yscale="log")
            style.whole_ticks(axis, (int(row["rank"]) for row in rows), most=5)
            if optimizer == optimizers[0]:
                axis.set_title(module.removeprefix("model.layers."))
            if optimizer == optimizers[-1]:
                axis.set_xlabel("rank $r$")
        line[0].set_ylabel(f"{style.OPTIMIZERS[optimizer]}: rms of $w$,\nin units of $r = {ranks[0]}$")
    shown = "lines: the law" + (", points: adapters drawn and stepped, ± s.e." if measured else "")
    style.legend(figure, style.named(axes.flat), f"{SPLITS[config.split]} tokens, A {init}; {shown}")
    return style.save(figure, out, "regime_rms")


def _default(modules: list[str]) -> tuple[str, ...]:
    """First and last layer's module of the first and the last type."""
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in modules))
    chosen = []
    for kind in (kinds[0], kinds[-1]):
        own = [name for name in modules if name.rpartition(".")[2] == kind]
        chosen += [own[0], own[-1]]
    return tuple(dict.fromkeys(chosen))


if __name__ == "__main__":
    style.command(draw, Config, __doc__)
