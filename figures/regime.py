"""Crossing ranks and takeover over a real model's depth, and predicted lines through measured points: sims.regime."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import matplotlib.pyplot as plt
import pandas as pd
import tyro

from figures import style
from rora_theory.io import frames
from rora_theory.measure import plots

FINISHED = "the file of a finished run"


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
    manifest, rows = style.read_frame(config.run, "regime")
    init, every = config.init or rows["init"].iloc[0], set(rows["module"])
    style.check_among("--init", init, rows["init"])
    if unknown := [name for name in config.modules if name not in every]:
        style.fail(f"--modules has {unknown[0]}; accepted are the run's, such as {rows['module'].iloc[0]}")

    def own(table: pd.DataFrame) -> pd.DataFrame:
        chosen = table[(table["split"] == config.split) & (table["init"] == init)]
        return chosen.assign(kind=chosen["module"].str.split(".").str[-1])

    rows, crossings = own(rows), own(frames.read_csv(config.run / "crossing_ranks.csv", accepted=FINISHED))
    if rows.empty or crossings.empty:
        style.fail(f"{config.run}: has no row of split {config.split}; accepted is --split with one that it has")
    out = config.out or config.run
    rate = manifest["config"]["lr"]
    path = config.run / "takeover.csv"
    takeover = own(frames.read_csv(path, accepted=FINISHED)) if path.exists() else None
    return [
        *_depth(crossings, config.split, out),
        *(_takeover(takeover, rate, config.split, out) if takeover is not None and len(takeover) else ()),
        *_rms(rows, config, init, out),
    ]


def _depth(rows: pd.DataFrame, split: str, out: Path) -> list[Path]:
    """Draw the crossing rank of each layer, with a panel for each type of module."""
    tokens = ", ".join(map(str, sorted(set(rows["tokens"]))))
    figure = plots.plot_regime(
        rows, f"{tokens} {plots.REGIME_SPLITS[split]} tokens a module; line: $r^*$ of all of them together"
    )
    return style.save(figure, out, "regime_depth")


def _takeover(rows: pd.DataFrame, learning_rate: float, split: str, out: Path) -> list[Path]:
    """A panel a type of module: steps after which A leads under Adam, a line a rank; dashes: signs begin to turn."""
    kinds, ranks = (list(dict.fromkeys(rows[name])) for name in ("kind", "rank"))
    figure, axes = plots.layer_panels(kinds, "steps $t_A$ until A leads")
    for axis, kind in zip(axes, kinds, strict=True):
        own = rows[rows["kind"] == kind].sort_values("layer")
        turns = own[own["rank"] == ranks[0]]
        lines = [(f"r = {rank}", "takeover", own[own["rank"] == rank]) for rank in ranks]
        lines += [("5% of the signs of $G A^T$ have turned", "turn_5", turns)]
        for index, (label, column, line) in enumerate(lines):
            axis.plot(
                line["layer"],
                line[column] / learning_rate,
                color="0.5" if column == "turn_5" else style.COLOURS[index],
                linestyle="--" if column == "turn_5" else "-",
                marker="" if column == "turn_5" else style.MARKERS[index],
                markersize=2,
                label=label,
            )
    title = f"Adam, A {rows['init'].iloc[0]}, {plots.REGIME_SPLITS[split]} tokens; "
    title += f"steps at rate {learning_rate:g} and a constant gradient"
    style.legend(figure, style.named(axes), title)
    return style.save(figure, out, "regime_takeover")


def _rms(rows: pd.DataFrame, config: Config, init: str, out: Path) -> list[Path]:
    """A row an optimizer, a panel a module: the law's lines of every rule, the points of the one that was stepped."""
    every, optimizers, rules = (list(dict.fromkeys(rows[name])) for name in ("module", "optimizer", "rule"))
    modules = config.modules or _default(every)
    figure, axes = plt.subplots(
        len(optimizers),
        len(modules),
        figsize=(max(3.4, 0.6 + 1.6 * len(modules)), 0.7 + 1.6 * len(optimizers)),
        sharex=True,
        sharey="row",
        squeeze=False,
    )
    measured = rows["measured"][rows["module"].isin(modules)].notna().any()
    for line, optimizer in zip(axes, optimizers, strict=True):
        for axis, module in zip(line, modules, strict=True):
            for position, rule in enumerate(rules):
                label, colour, marker = style.look(rule, position)
                where = {"module": module, "optimizer": optimizer, "rule": rule}
                own = frames.where(rows, where).sort_values("rank")
                first = own["predicted"].iloc[0]
                axis.plot(own["rank"], own["predicted"] / first, color=colour, label=label)
                seen = own[own["measured"].notna()]
                if len(seen):
                    axis.errorbar(
                        seen["rank"],
                        seen["measured"] / first,
                        yerr=seen["standard_error"] / first,
                        color=colour,
                        marker=marker,
                        markersize=2.5,
                        linestyle="none",
                    )
            axis.set(yscale="log")
            style.whole_ticks(axis, rows["rank"], most=5)
            if optimizer == optimizers[0]:
                axis.set_title(module.removeprefix("model.layers."))
            if optimizer == optimizers[-1]:
                axis.set_xlabel("rank $r$")
        line[0].set_ylabel(f"{style.OPTIMIZERS[optimizer]}: rms of $w$,\nin units of $r = {min(rows['rank'])}$")
    shown = "lines: the law" + (", points: adapters drawn and stepped, ± s.e." if measured else "")
    style.legend(figure, style.named(axes.flat), f"{plots.REGIME_SPLITS[config.split]} tokens, A {init}; {shown}")
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
