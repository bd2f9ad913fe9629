"""Cost of policies that carry a learning rate to another setting, in nats per token: a run of sims.horizon."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tyro
from matplotlib.axes import Axes

from figures import style
from rora_theory.io import frames
from rora_theory.scaling import check_positive
from rora_theory.validation.ranges import Count, check_ranges
from rora_theory.validation.rules import check_list

FLOOR = 1e-4
"""Smallest regret drawn, in nats per token: far below the resolution of any grid."""
POLICIES = {
    "keep the rate": "keep the rate",
    "first step": "law of the first step",
    "square root": "divide by the root",
    "constant gradient": "constant gradient",
    "displacement": "displacement law",
}
"""Policies drawn, and their labels."""


@dataclass(frozen=True)
class Config:
    """Run to draw, and changes to show."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder of sims.horizon"""
    strengths: tuple[float, float] = (64.0, 724.0)
    """Tuned and new value of G = gamma r"""
    steps: Count = 64
    """Number of steps of the runs compared"""
    out: Path | None = None
    """Folder for regret_by_policy.png and .svg; the run folder by default"""

    def __post_init__(self) -> None:
        check_ranges(self)
        check_list("--strengths", self.strengths, check_positive)


def draw(config: Config) -> Sequence[Path]:
    """Draw the cost of each policy for the learning rate in nats per token, one panel for each change of G."""
    style.read_frame(config.run, "horizon")
    costs = frames.read_csv(config.run / "regret.csv")
    # Changes of G alone, between the two chosen values.
    costs = costs[(costs["old_steps"] == config.steps) & (costs["steps"] == config.steps)]
    for name, strength in zip(("old_strength", "strength"), config.strengths, strict=True):
        costs = costs[costs[name].sub(strength).abs() < 1e-6 * strength]
    costs = costs[costs["policy"].isin(POLICIES)]
    if costs.empty:
        change = " to ".join(f"{strength:g}" for strength in config.strengths)
        style.fail(f"{config.run}: regret.csv has no change of G = gamma r from {change} after {config.steps} steps")
    # A panel for each pair of settings.
    changes = list(costs.groupby(["old_rank", "old_strength", "rank", "strength"], sort=True))
    columns = min(len(changes), 3)
    rows = -(-len(changes) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.2 * columns, 0.5 + 1.5 * rows), sharex=True, sharey=True, squeeze=False
    )
    for position, ((old_rank, old_strength, rank, strength), policies) in enumerate(changes):
        title = f"r = {old_rank:g}, G = {old_strength:g} to r = {rank:g}, G = {strength:g}"
        draw_change(axes.flat[position], policies, title)
    for empty in axes.flat[len(changes) :]:
        empty.set_visible(False)
    figure.supxlabel(f"regret in nats per token after {config.steps} steps", fontsize=8)
    return style.save(figure, config.out or config.run, "regret_by_policy")


def draw_change(axes: Axes, policies: pd.DataFrame, title: str) -> None:
    """Draw the regret of each policy with its standard error, and the range over the tuned optimum's interval."""
    by_policy = policies.set_index("policy").reindex([name for name in POLICIES if name in set(policies["policy"])])
    for position, row in enumerate(by_policy.itertuples()):
        # The band: regret at the ends of the 95% interval of the tuned optimum.
        low, high = max(row.low, FLOOR), max(row.high, FLOOR)
        axes.barh(position, high - low, left=low, height=0.8, color=style.BAND_COLOUR)
        # Logarithmic axis: values below the floor are drawn at it.
        value, error = max(row.regret, FLOOR), row.standard_error
        bar = None if np.isnan(error) else [[min(error, value - FLOOR)], [error]]
        marker = ">" if row.is_lower_bound else "o"
        axes.errorbar(value, position, xerr=bar, marker=marker, color=style.COLOURS[position], linestyle="none")
    axes.set_yticks(range(len(by_policy)), [POLICIES[name] for name in by_policy.index])
    axes.invert_yaxis()
    axes.set(xscale="log", xlim=(FLOOR, 1.0))
    axes.set_title(title, loc="left")


if __name__ == "__main__":
    style.command(draw, Config, __doc__)
