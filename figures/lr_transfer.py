"""Plot best learning rates against the rank and losses at the largest rank, from a run of sims.lr_transfer."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tyro

from figures import style
from rora_theory.runs import frames

TRAINED: dict[str, tuple[Any, bool]] = {"both": ("-", True), "B": ((0, (3, 2)), False)}
"""Line style of the trained factors, and whether the marker is filled."""
MAX_LOSS_RATIO = 3
"""Largest drawn loss, as a multiple of the median loss."""


@dataclass(frozen=True)
class LrTransferOptions:
    run: Annotated[Path, tyro.conf.Positional]
    """Run folder of sims.lr_transfer."""
    out: Path | None = None
    """Folder for lr_transfer.png and .svg; by default the run folder."""


def draw_lr_transfer(config: LrTransferOptions) -> Sequence[Path]:
    """Draw best rates against the rank (above) and losses at the largest rank (below); columns are optimizers."""
    manifest, rows = style.read_frame(config.run, "lr_transfer")
    best_rate_table = frames.read_csv(config.run / "best.csv", accepted="the file of a finished run")
    optimizers = [name for name in style.OPTIMIZERS if name in set(best_rate_table["optimizer"])]
    rules = list(dict.fromkeys(best_rate_table["rule"]))
    figure, axes = plt.subplots(2, len(optimizers), figsize=(max(3.8, 0.4 + 2.1 * len(optimizers)), 5.8), squeeze=False)
    left_out = 0
    # A column for each optimizer, a line for each rule, dashed if A is frozen.
    for column, optimizer in enumerate(optimizers):
        for position, rule in enumerate(rules):
            label, colour, marker = style.look(rule, position)
            for trained, (dashes, filled) in TRAINED.items():
                look: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": dashes}
                look["markerfacecolor"] = colour if filled else "white"
                # Below, only runs that train both factors.
                best_rows, loss_rows = (_select(table, optimizer, trained, rule) for table in (best_rate_table, rows))
                _best(axes[0, column], best_rows, look)
                if filled:
                    left_out += _losses(axes[1, column], loss_rows, manifest, look, label)
        # Axes: best rates above, losses at the largest rank below.
        above, below = axes[:, column]
        above.set(title=f"{style.OPTIMIZERS[optimizer]}: best rate", xlabel="rank $r$", yscale="log")
        style.integer_ticks(above, best_rate_table["rank"])
        top = rows["rank"][rows["optimizer"] == optimizer].max()
        below.set(title=f"loss at r = {top}", xlabel="learning rate", xscale="log")
        if not is_matrix(manifest):
            below.set_yscale("log")
    axes[0, 0].set_ylabel("best learning rate")
    axes[1, 0].set_ylabel("held-out loss" + (" (nats per token)" if is_matrix(manifest) else ""))
    # Legend, with what is left out.
    caption = f"bars: one standard error over {' and '.join(sorted(set(best_rate_table['error_over'].dropna())))}"
    if left_out:
        caption += f"; below: rates that diverged or have a loss above {MAX_LOSS_RATIO} times the median are left out"
    edge = plt.Line2D([], [], color="black", marker="x", markersize=6, linestyle="none")
    handles = style.named(axes[1])
    if (best_rate_table["trained"] != "both").any():
        handles["A frozen"] = plt.Line2D(
            [], [], color="black", linestyle=TRAINED["B"][0], marker="o", markerfacecolor="white"
        )
    handles |= {"best rate at the grid's edge": edge} if best_rate_table["edge"].notna().any() else {}
    style.legend(figure, handles, caption)
    return style.save(figure, config.out or config.run, "lr_transfer")


def is_matrix(manifest: dict[str, Any]) -> bool:
    """Return whether the runs are of a language model."""
    return "matrix" in manifest["config"]


def _best(axis: plt.Axes, rows: pd.DataFrame, look: dict[str, Any]) -> None:
    """Draw best rates with errors, and a cross at the edge of the grid."""
    if rows.empty:
        return
    rates, factors = rows["best_rate"], 2 ** rows["log2_error"].fillna(0)
    spread = [rates - rates / factors, rates * factors - rates]
    axis.errorbar(rows["rank"], rates, yerr=spread, **look)
    edge = rows[rows["edge"].notna()]
    if len(edge):
        style.cross_out(axis, edge["rank"], edge["best_rate"])


def _losses(axis: plt.Axes, rows: pd.DataFrame, manifest: dict[str, Any], look: dict[str, Any], label: str) -> int:
    """Draw the mean loss over seeds at the largest rank.

    Returns:
      The number of rates that are left out.
    """
    if rows.empty:
        return 0
    judge = "loss_train" if manifest.get("judge") == "train" else "loss_held_out"
    of_rate = rows[rows["rank"] == rows["rank"].max()].groupby("learning_rate")[judge]
    mean = of_rate.agg(lambda seeds: np.mean(seeds.fillna(np.inf)))
    finite = np.isfinite(mean)
    is_drawn = finite & (mean <= MAX_LOSS_RATIO * (mean[finite].median() if finite.any() else 1.0))
    axis.errorbar(mean.index[is_drawn], mean[is_drawn], yerr=of_rate.sem().fillna(0)[is_drawn], label=label, **look)
    return int((~is_drawn).sum())


def _select(table: pd.DataFrame, *key: str) -> pd.DataFrame:
    """Return the rows of an optimizer, of trained factors, and of a rule."""
    return frames.where(table, dict(zip(("optimizer", "trained", "rule"), key, strict=True)))


if __name__ == "__main__":
    style.command(draw_lr_transfer, LrTransferOptions, __doc__)
