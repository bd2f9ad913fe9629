"""Plot |dw| against the rank on logarithmic axes, one row for each overlap and one column for each optimizer."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import tyro

from figures import style
from rora_theory.runs import frames


@dataclass(frozen=True)
class NormVsRankOptions:
    run: Annotated[Path, tyro.conf.Positional]
    """Run folder of sims.variance_sweep."""
    out: Path | None = None
    """Folder for norm_vs_rank.png and .svg; by default the run folder."""


def draw_norm_vs_rank(config: NormVsRankOptions) -> Sequence[Path]:
    """Draw |w| against the rank: simulations as points, the exact law as lines, the paper's Eq. 11 as dashes."""
    manifest, rows = style.read_frame(config.run, "variance_sweep")
    rows = rows[rows["quantity"] == "norm"]
    overlaps, rules = (list(dict.fromkeys(rows[name])) for name in ("overlap", "rule"))
    panels = list(dict.fromkeys(zip(rows["optimizer"], rows["init"], strict=True)))
    figure, axes = plt.subplots(
        len(overlaps),
        len(panels),
        figsize=(max(3.0, 0.6 + 2.0 * len(panels)), 0.8 + 1.7 * len(overlaps)),
        sharex=True,
        sharey="col",
        squeeze=False,
    )
    # A row of panels for each overlap, a column for each optimizer and init, a line for each rule.
    for axis_row, overlap in zip(axes, overlaps, strict=True):
        for axis, (optimizer, init) in zip(axis_row, panels, strict=True):
            for position, rule in enumerate(rules):
                selection = {"optimizer": optimizer, "init": init, "overlap": overlap, "rule": rule}
                chosen = frames.where(rows, selection).sort_values("rank")
                label, colour, marker = style.look(rule, position)
                # The exact law, the paper's formula where it has one, and the simulation.
                axis.plot(chosen["rank"], chosen["exact"], color=colour)
                if chosen["paper"].notna().all():
                    axis.plot(chosen["rank"], chosen["paper"], color=colour, linestyle=(0, (4, 3)), linewidth=0.9)
                axis.errorbar(
                    chosen["rank"],
                    chosen["estimate"],
                    yerr=chosen["standard_error"],
                    color=colour,
                    marker=marker,
                    linestyle="none",
                    label=label,
                )
            init_text = f", A {style.INITS.get(init, init)}" if len({name for _, name in panels}) > 1 else ""
            axis.set(yscale="log", title=f"{style.OPTIMIZERS[optimizer]}{init_text}, overlap {overlap:g}")
            style.integer_ticks(axis, rows["rank"], max_count=5)
        axis_row[0].set_ylabel(r"rms of $\|w\|_2$")
    # Labels of the outer axes, and one legend.
    for axis in axes[-1]:
        axis.set_xlabel("rank $r$")
    handles = style.named(axes.flat) | {"exact law": plt.Line2D([], [], color="black")}
    if rows["paper"].notna().any():
        handles["paper, Eq. 11 (SGD)"] = plt.Line2D([], [], color="black", linestyle=(0, (4, 3)), linewidth=0.9)
    settings = manifest["config"]
    style.legend(
        figure,
        handles,
        rf"points: simulated, bars: one standard error; $p_{{in}}$ = {settings['p_in']}, "
        rf"$p_{{out}}$ = {settings['p_out']}, $\alpha$ = {settings['alpha']:g}, $\eta$ = {settings['lr']:g}",
    )
    return style.save(figure, config.out or config.run, "norm_vs_rank")


if __name__ == "__main__":
    style.command(draw_norm_vs_rank, NormVsRankOptions, __doc__)
