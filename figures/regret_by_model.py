"""Regret of every policy in public sweeps, a dot for each model: a run of rora evidence."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tyro

from figures import style
from rora_theory.evidence.policies import LEFT_OUT
from rora_theory.evidence.sources import SOURCES

FLOOR = 1e-5
"""Smallest regret drawn, in nats per token."""

LABELS = {
    "keep the rate": "keep the rate",
    "first step": "rate / G",
    "square root": r"rate $\cdot\ G^{-1/2}$",
    "G^-0.75": r"rate $\cdot\ G^{-3/4}$",
    "step with cross-talk": "first step's size",
    "displacement law": "displacement law",
    "law with cross-talk": "displacement law\nwith cross-talk",
    "advice": "rora transfer",
    LEFT_OUT: "rora transfer,\nmodel left out",
}
"""Labels of the policies, in the order of their rows."""


@dataclass(frozen=True)
class RegretByModelOptions:
    run: Annotated[Path, tyro.conf.Positional]
    """Run folder of sims.evidence"""
    out: Path | None = None
    """Folder for regret_by_model.png and .svg; the run folder by default"""


def draw_regret_by_model(config: RegretByModelOptions) -> Sequence[Path]:
    """Draw the regret of every policy that carries a best rate to another rank: a dot for each model, and the mean.

    A source with several models has a dot for each model, its mean over the pairs of ranks; a source with one model has
    a dot for each pair. Pairs with a best rate that is only a bound are left out. Policies that agree on all pairs of a
    source share a row.
    """
    _, costs = style.read_frame(config.run, "evidence")
    costs = costs[(costs["old_place"] == "inside") & (costs["place"] == "inside")]
    if costs.empty:
        style.fail(f"{config.run} has no pair of best rates inside their grids. Choose a run that has one.")
    panels = [
        (SOURCES[name].title if name in SOURCES else name, policy_rows(rows))
        for name, rows in costs.groupby("source", sort=False)
    ]
    heights = [len(rows) + 1 for _, rows in panels]
    generator = np.random.default_rng(0)
    size = (style.NARROW, 0.9 + 0.26 * sum(heights))
    figure, axes = plt.subplots(len(panels), 1, figsize=size, height_ratios=heights, sharex=True, squeeze=False)
    for axis, (title, rows) in zip(axes.flat, panels, strict=True):
        for position, (_, values, mean) in enumerate(rows):
            # A shuffled offset separates the dots without looking like a trend.
            offsets = generator.permutation(np.linspace(-0.22, 0.22, len(values)))
            spread = offsets if len(values) > 1 else np.zeros(1)
            shown = np.clip(np.sort(values), FLOOR, None)
            axis.plot(
                shown,
                position + spread,
                ".",
                color=style.COLOURS[0],
                markersize=3,
                alpha=0.7,
                label="one model or pair",
            )
            axis.plot(max(mean, FLOOR), position, "D", color=style.COLOURS[1], markersize=4.5, label="mean over pairs")
        axis.set_yticks(range(len(rows)), [label for label, _, _ in rows])
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.set_title(title, loc="left")
        axis.tick_params(axis="y", length=0)
        axis.grid(visible=False, axis="y")
    axes.flat[-1].set(xscale="log", xlabel="regret in nats per token")
    axes.flat[-1].set_xlim(left=FLOOR * 0.7)
    style.legend(figure, style.named(axes.flat), f"regrets below {FLOOR:g} are drawn there")
    return style.save(figure, config.out or config.run, "regret_by_model")


def policy_rows(costs: pd.DataFrame) -> list[tuple[str, np.ndarray, float]]:
    """Return the label, the dots and the mean of each group of policies that agree on all pairs."""
    by_values: dict[tuple[float, ...], list[str]] = {}
    order = list(LABELS)
    policies = sorted(costs["policy"].unique(), key=lambda name: order.index(name) if name in order else len(order))
    for policy in policies:
        members = costs[costs["policy"] == policy]
        by_values.setdefault(tuple(np.round(members["regret"].to_numpy(float), 12)), []).append(policy)
    rows = []
    for values, names in by_values.items():
        members = costs[costs["policy"] == names[0]]
        if members["model"].nunique() > 1:
            dots = members.groupby("model")["regret"].mean().to_numpy(float)
        else:
            dots = np.array(values)
        label = LABELS.get(names[0], names[0])
        label += "\n(and any power of G)" if len(names) > 2 else ""
        rows.append((label, dots[np.isfinite(dots)], float(np.mean(values))))
    return rows


if __name__ == "__main__":
    style.command(draw_regret_by_model, RegretByModelOptions, __doc__)
