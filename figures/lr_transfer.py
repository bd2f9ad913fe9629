"""Best learning rate against the rank, and loss against rate at the largest rank: a run of sims.lr_transfer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy as np
import tyro

from figures import style

TRAINED = {"both": ("-", True), "B": ((0, (3, 2)), False)}
"""Line and whether the marker is filled."""
CEILING = 3
"""Losses above this times the median are not drawn."""


@dataclass(frozen=True)
class Config:
    """Which run to draw."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder of sims.lr_transfer."""
    out: Path | None = None
    """Folder for lr_transfer.png and .svg; by default the run folder."""


def draw(config: Config) -> Sequence[Path]:
    """A column an optimizer: above the best rates with their slopes, below the losses at the largest rank."""
    manifest, rows = style.read_run(config.run, "lr_transfer")
    bests, slopes = (style.read_table(config.run / name, needed=True) for name in ("best.csv", "slopes.csv"))
    optimizers = [name for name in style.OPTIMIZERS if any(row["optimizer"] == name for row in bests)]
    rules = list(dict.fromkeys(row["rule"] for row in bests))
    figure, axes = plt.subplots(2, len(optimizers), figsize=(1.0 + 2.8 * len(optimizers), 6.4), squeeze=False)
    left_out = 0
    for column, optimizer in enumerate(optimizers):
        for position, rule in enumerate(rules):
            label, colour, marker = style.look(rule, position)
            for trained, (dashes, filled) in TRAINED.items():
                look: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": dashes}
                look["markerfacecolor"] = colour if filled else "white"
                key = (optimizer, trained, rule)
                slope = next((row for row in slopes if _key(row) == key), None)
                text = label if slope is None else f"{label}: {float(slope['slope']):+.3f}{_error(slope)}"
                text += "" if filled else ", A frozen"
                _best(axes[0, column], [row for row in bests if _key(row) == key], look, text)
                if filled:
                    left_out += _losses(
                        axes[1, column], [row for row in rows if _key(row) == key], manifest, look, label
                    )
        above, below = axes[:, column]
        above.set(
            title=f"{style.OPTIMIZERS[optimizer]}: best rate and its slope in $r$", xlabel="rank $r$", yscale="log"
        )
        style.whole_ticks(above, (int(row["rank"]) for row in bests))
        above.legend(frameon=False, fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.2))
        top = max(int(row["rank"]) for row in rows if row["optimizer"] == optimizer)
        below.set(title=f"r = {top}, both factors trained", xlabel="learning rate", xscale="log")
        if not is_matrix(manifest):
            below.set_yscale("log")
    axes[0, 0].set_ylabel("best learning rate")
    axes[1, 0].set_ylabel("held-out loss" + (" (nats a token)" if is_matrix(manifest) else ""))
    words = f"bars: ± one s.e. over {' and '.join(sorted({row['error_over'] for row in bests if row['error_over']}))}"
    if left_out:
        words += f"; below: rates that diverged, or whose loss is more than {CEILING} times the median's, are left out"
    edge = plt.Line2D([], [], color="black", marker="x", markersize=6, linestyle="none")
    handles = style.named(axes[1])
    handles |= {"best rate at the grid's edge": edge} if any(row["edge"] for row in bests) else {}
    style.legend(figure, handles, words)
    return style.save(figure, config.out or config.run, "lr_transfer")


def is_matrix(manifest: dict[str, Any]) -> bool:
    """Whether the runs are a real model's."""
    return "matrix" in manifest["config"]


def _best(axis: plt.Axes, rows: list[dict[str, str]], look: dict[str, Any], label: str) -> None:
    """Best rates with errors; those at the grid's edge are crossed."""
    if not rows:
        return
    ranks, rates = ([kind(row[name]) for row in rows] for name, kind in (("rank", int), ("best_rate", float)))
    errors = [float(row["log2_error"] or 0) for row in rows]
    spread = [
        [rate - rate * 2**-error for rate, error in zip(rates, errors, strict=True)],
        [rate * 2**error - rate for rate, error in zip(rates, errors, strict=True)],
    ]
    axis.errorbar(ranks, rates, yerr=spread, label=label, **look)
    edge = [(rank, rate) for rank, rate, row in zip(ranks, rates, rows, strict=True) if row["edge"]]
    if edge:
        axis.plot(*zip(*edge, strict=True), "x", color="black", markersize=6)


def _losses(
    axis: plt.Axes, rows: list[dict[str, str]], manifest: dict[str, Any], look: dict[str, Any], label: str
) -> int:
    """Mean loss ± s.e. over seeds at the largest rank; returns how many rates have no point."""
    if not rows:
        return 0
    top = max(int(row["rank"]) for row in rows)
    judge = "loss_train" if manifest.get("judge") == "train" else "loss_held_out"
    found: dict[float, list[float]] = {}
    for row in rows:
        if int(row["rank"]) == top:
            found.setdefault(float(row["learning_rate"]), []).append(float(row[judge] or "inf"))
    finite = [float(np.mean(values)) for values in found.values() if np.isfinite(values).all()]
    ceiling = CEILING * float(np.median(finite or [1.0]))
    kept = [rate for rate in sorted(found) if np.isfinite(found[rate]).all() and np.mean(found[rate]) <= ceiling]
    error = [
        float(np.std(found[rate], ddof=1) / math.sqrt(len(found[rate]))) if len(found[rate]) > 1 else 0.0
        for rate in kept
    ]
    axis.errorbar(kept, [float(np.mean(found[rate])) for rate in kept], yerr=error, label=label, **look)
    return len(found) - len(kept)


def _key(row: dict[str, str]) -> tuple[str, str, str]:
    return row["optimizer"], row["trained"], row["rule"]


def _error(row: dict[str, str]) -> str:
    return f" ± {float(row['standard_error']):.3f}" if row["standard_error"] else ""


if __name__ == "__main__":
    style.command(draw, Config, __doc__)
