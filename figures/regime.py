"""Plot crossing ranks and distances over a model's depth, and predicted against measured sizes, from sims.regime."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import matplotlib.pyplot as plt
import pandas as pd
import tyro

from figures import style
from rora_theory import plots
from rora_theory.runs import frames

FINISHED = "the file of a finished run"


@dataclass(frozen=True)
class RegimeOptions:
    run: Annotated[Path, tyro.conf.Positional]
    """Run folder of sims.regime."""
    split: Literal["train", "heldout"] = "heldout"
    """Tokens at which the modules are measured."""
    init: str | None = None
    """Initialisation of the adapters; by default the first one of the run."""
    modules: tuple[str, ...] = ()
    """Full names of the modules in regime_rms; by default the first and last layer of the first and last type."""
    out: Path | None = None
    """Folder for regime_depth, regime_crossing_distance and regime_rms (.png and .svg); by default the run folder."""


def draw_regime(config: RegimeOptions) -> Sequence[Path]:
    """Draw the figures; those of crossing distances and sizes only if the run measured them."""
    # Without --exact or --rows a run has crossing ranks, but no sizes of steps.
    manifest, crossings = style.read_frame(config.run, "regime", "crossing_ranks.csv")
    rows = frames.read_csv(config.run / "results.csv", accepted=FINISHED)
    init, run_modules = config.init or crossings["init"].iloc[0], set(crossings["module"])
    style.check_among("--init", init, crossings["init"])
    if unknown := [name for name in config.modules if name not in run_modules]:
        style.fail(f"--modules must be modules of the run, such as {crossings['module'].iloc[0]}, got {unknown[0]}")

    # Rows of one split and init, with the type of each module.
    def select(table: pd.DataFrame) -> pd.DataFrame:
        chosen = table[(table["split"] == config.split) & (table["init"] == init)]
        return chosen.assign(kind=chosen["module"].str.split(".").str[-1])

    rows, crossings = select(rows), select(crossings)
    if crossings.empty:
        style.fail(f"{config.run}: has no row of split {config.split}. Choose another --split.")
    out = config.out or config.run
    rate = manifest["config"]["lr"]
    path = config.run / "crossing_distances.csv"
    distances = select(frames.read_csv(path, accepted=FINISHED)) if path.exists() else None
    return [
        *_depth(crossings, config.split, out),
        *(
            _draw_crossing_distances(distances, rate, config.split, out)
            if distances is not None and len(distances)
            else ()
        ),
        *(_rms(rows, config, init, out) if len(rows) else ()),
    ]


def _depth(rows: pd.DataFrame, split: str, out: Path) -> list[Path]:
    """Draw crossing ranks against depth with the quartiles over tokens, one panel for each type of module."""
    tokens = ", ".join(map(str, sorted(set(rows["tokens"]))))
    figure = plots.plot_regime(
        rows, f"{tokens} {plots.REGIME_SPLITS[split]} tokens a module; line: $r^*$ of all of them together"
    )
    return style.save(figure, out, "regime_depth")


def _draw_crossing_distances(rows: pd.DataFrame, learning_rate: float, split: str, out: Path) -> list[Path]:
    """Draw the steps after which A dominates under Adam, one panel for each type of module and one line for each rank.

    Dashes show where the signs begin to turn, if the run was exact.
    """
    kinds, ranks = (list(dict.fromkeys(rows[name])) for name in ("kind", "rank"))
    figure, axes = plots.layer_panels(kinds, "steps $t_A$ until\nA dominates")
    for axis, kind in zip(axes, kinds, strict=True):
        # A line for each rank, and one for the signs, which are the same at every rank.
        selected = rows[rows["kind"] == kind].sort_values("layer")
        turns = selected[selected["rank"] == ranks[0]]
        lines = [(f"r = {rank}", "crossing_distance", selected[selected["rank"] == rank]) for rank in ranks]
        if "turn_5" in turns and turns["turn_5"].notna().any():
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
    plots.label_short_axis(axes[0])
    init = rows["init"].iloc[0]
    title = f"Adam, A {style.INITS.get(init, init)}, {plots.REGIME_SPLITS[split]} tokens; "
    title += f"steps at rate {learning_rate:g} and a constant gradient"
    style.legend(figure, style.named(axes), title)
    return style.save(figure, out, "regime_crossing_distance")


def _rms(rows: pd.DataFrame, config: RegimeOptions, init: str, out: Path) -> list[Path]:
    """Draw the size of the first update against the rank: laws as lines, measured sizes (if any) as points.

    Rows are modules, columns optimizers.
    """
    all_modules, optimizers, rules = (list(dict.fromkeys(rows[name])) for name in ("module", "optimizer", "rule"))
    modules = config.modules or _default(all_modules)
    figure, axes = plt.subplots(
        len(modules),
        len(optimizers),
        figsize=(style.WIDTH, 0.8 + 1.6 * len(modules)),
        sharex=True,
        sharey="col",
        squeeze=False,
    )
    measured = rows["measured"][rows["module"].isin(modules)].notna().any()
    # A row of panels for each module, a column for each optimizer, a line for each rule.
    for line, module in zip(axes, modules, strict=True):
        for axis, optimizer in zip(line, optimizers, strict=True):
            for position, rule in enumerate(rules):
                label, colour, marker = style.look(rule, position)
                selection = {"module": module, "optimizer": optimizer, "rule": rule}
                selected = frames.where(rows, selection).sort_values("rank")
                # Divide by the law at the smallest rank, so that all modules share an axis.
                first = selected["predicted"].iloc[0]
                axis.plot(selected["rank"], selected["predicted"] / first, color=colour, label=label)
                # Only one rule was measured: the others differ from it by a known factor.
                measured_rows = selected[selected["measured"].notna()]
                if len(measured_rows):
                    axis.errorbar(
                        measured_rows["rank"],
                        measured_rows["measured"] / first,
                        yerr=measured_rows["standard_error"] / first,
                        color=colour,
                        marker=marker,
                        markersize=2.5,
                        linestyle="none",
                    )
            # Labels below the last row, as all panels share their axes.
            axis.set(yscale="log")
            style.integer_ticks(axis, rows["rank"], max_count=5)
            axis.set_title(f"{style.OPTIMIZERS[optimizer]}, {short_name(module)}")
            if module == modules[-1]:
                axis.set_xlabel("rank $r$")
        line[0].set_ylabel(f"rms of $w$,\nin units of $r = {min(rows['rank'])}$")
    shown = "lines: the law" + (", points: adapters drawn and stepped" if measured else "")
    style.legend(
        figure,
        style.named(axes.flat),
        f"{plots.REGIME_SPLITS[config.split]} tokens, A {style.INITS.get(init, init)}; {shown}",
    )
    return style.save(figure, out, "regime_rms")


def short_name(module: str) -> str:
    """Return the layer and the type of a module, as in ``layer 29, q_proj``."""
    layer = next((part for part in module.split(".") if part.isdigit()), None)
    kind = module.rpartition(".")[2]
    return kind if layer is None else f"layer {layer}, {kind}"


def _default(modules: list[str]) -> tuple[str, ...]:
    """Return the modules of the first and last layer of the first and the last type."""
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in modules))
    chosen = []
    for kind in (kinds[0], kinds[-1]):
        selected = [name for name in modules if name.rpartition(".")[2] == kind]
        chosen += [selected[0], selected[-1]]
    return tuple(dict.fromkeys(chosen))


if __name__ == "__main__":
    style.command(draw_regime, RegimeOptions, __doc__)
