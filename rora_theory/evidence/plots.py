"""Figures of the evidence: best rate against rank, regret by policy, and loss by phase of the run."""

from typing import TYPE_CHECKING, Any

import numpy as np

from rora_theory.errors import InputError
from rora_theory.evidence.policies import LEFT_OUT, advised_range
from rora_theory.evidence.sources import SOURCES
from rora_theory.plots import BAND_COLOUR, COLOURS, DOTTED, MARKERS, STYLE, integer_ticks, legend, named

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure
    import pandas as pd

WIDTH = 3.8
"""Width of every figure in inches, at which a phone shows its letters in a readable size."""

FLOOR = 1e-5
"""Smallest regret drawn, in nats per token."""

PALETTE = COLOURS[:-1]
"""Colours of the models: all but black, which is the law's."""

LAW: dict[str, Any] = {"color": "black", "linewidth": 2.0, "zorder": 5}
"""Look of the line of `rora_theory.transfer`."""

LABELS = {
    "keep the rate": "keep the rate",
    "1/G": "rate / G",
    "G^-0.5": r"rate $\cdot\ G^{-1/2}$",
    "G^-0.75": r"rate $\cdot\ G^{-3/4}$",
    "first step": "first step's size",
    "displacement law": "displacement law",
    "law with cross-talk": "displacement law\nwith cross-talk",
    "rora transfer": "rora transfer",
    LEFT_OUT: "rora transfer,\nmodel left out",
}
"""Labels of the policies, in the order of their rows."""


def plot_best_rates(best: "pd.DataFrame", families: "pd.DataFrame") -> "matplotlib.figure.Figure":
    """Plot the best rate against the rank, a line for each model, with the line and the range of the advice.

    The upper panel has the models with one G = gamma r, the lower one those with alpha = r. Open markers are best rates
    that are only a bound, or known to a grid step.

    Args:
      best: `best_rates.best_rates`.
      families: Table with the columns ``model`` and ``family``.

    Returns:
      The figure.

    Raises:
      InputError: If there are no best rates.
    """
    import matplotlib.pyplot as plt

    if best.empty:
        raise InputError("best must have at least one best rate, got none")
    family_of = dict(zip(families["model"], families["family"], strict=True))
    is_fixed = best.groupby(["source", "model"])["gain"].transform("nunique") == 1
    halves = ((best[is_fixed], "alpha = 32 at every rank"), (best[~is_fixed], "alpha = r"))
    panels = [(rows, title) for rows, title in halves if len(rows)]
    names = list(dict.fromkeys(family_of.get(model, model) for model in best["model"]))
    looks = {
        name: (PALETTE[i % len(PALETTE)], MARKERS[(i + 2 * (i // len(PALETTE))) % len(MARKERS)])
        for i, name in enumerate(names)
    }
    with plt.rc_context(STYLE):
        size = (WIDTH, 0.7 + 2.5 * len(panels))
        figure, axes = plt.subplots(len(panels), 1, figsize=size, sharex=True, squeeze=False)
        for axis, (rows, title) in zip(axes.flat, panels, strict=True):
            _draw_law(axis, rows)
            for (_, model), curve in rows.groupby(["source", "model"], sort=False):
                _draw_model(axis, curve, *looks[family_of.get(model, model)], family_of.get(model, model))
            axis.set(yscale="log", ylabel="best learning rate")
            axis.set_title(title, loc="left")
            integer_ticks(axis, best["rank"], max_count=9)
        axes.flat[-1].set_xlabel("rank $r$")
        legend(
            figure,
            named(axes.flat),
            "thin line: a model; open marker: a bound; thick line: rora transfer; band: its 90% range",
        )
    return figure


def _draw_law(axis: "matplotlib.axes.Axes", rows: "pd.DataFrame") -> None:
    """Draw the rate of the advice from the geometric mean of the best rates inside their grids, and its range."""
    inside = rows[rows["place"] == "inside"]
    inside = inside if len(inside) else rows
    ranks = np.unique(rows["rank"].to_numpy(int))
    gains = {int(rank): float(members["gain"].iloc[0]) for rank, members in rows.groupby("rank")}
    # The reference is the rank in the middle of those with best rates.
    reference = int(sorted(inside["rank"])[len(inside) // 2])
    logs = [
        np.log(row.best_rate / advised_range(reference, gains[reference], int(row.rank), row.gain).best)
        for row in inside.itertuples()
    ]
    level = np.exp(np.mean(logs))
    low, best, high = (
        level * np.array([advised_range(reference, gains[reference], int(r), gains[int(r)]) for r in ranks]).T
    )
    axis.fill_between(ranks, low, high, color=BAND_COLOUR, linewidth=0, zorder=0)
    axis.plot(ranks, best, **LAW)


def _draw_model(axis: "matplotlib.axes.Axes", curve: "pd.DataFrame", colour: str, marker: str, label: str) -> None:
    """Draw the best rates of a model; a line connects those inside their grids."""
    curve = curve.sort_values("rank")
    inside = curve["place"] == "inside"
    axis.plot(curve["rank"], curve["best_rate"], color=colour, linewidth=0.5, alpha=0.5, linestyle=DOTTED)
    axis.plot(
        curve[inside]["rank"], curve[inside]["best_rate"], color=colour, marker=marker, linewidth=0.7, label=label
    )
    bounds = curve[~inside]
    axis.plot(bounds["rank"], bounds["best_rate"], marker, color=colour, fillstyle="none", markeredgewidth=0.6)


def plot_regrets(costs: "pd.DataFrame") -> "matplotlib.figure.Figure":
    """Plot the regret of every policy: a dot for each model or pair, and the mean over pairs.

    A source with several models has a dot for each model, its mean over the pairs of ranks; a source with one model has
    a dot for each pair. Policies that agree on all pairs of a source share a row.

    Args:
      costs: `regrets.regret_table`; pairs with a best rate that is only a bound are left out.

    Returns:
      The figure.

    Raises:
      InputError: If no pair has both best rates inside their grids.
    """
    import matplotlib.pyplot as plt

    costs = costs[(costs["old_place"] == "inside") & (costs["place"] == "inside")]
    if costs.empty:
        raise InputError("costs must have a pair of best rates inside their grids, got none")
    panels = [
        (SOURCES[name].title if name in SOURCES else name, _policy_rows(rows))
        for name, rows in costs.groupby("source", sort=False)
    ]
    heights = [len(rows) + 1 for _, rows in panels]
    generator = np.random.default_rng(0)
    with plt.rc_context(STYLE):
        size = (WIDTH, 0.9 + 0.26 * sum(heights))
        figure, axes = plt.subplots(len(panels), 1, figsize=size, height_ratios=heights, sharex=True, squeeze=False)
        for axis, (title, rows) in zip(axes.flat, panels, strict=True):
            for position, (_, values, mean) in enumerate(rows):
                # A shuffled offset separates the dots without looking like a trend.
                offsets = generator.permutation(np.linspace(-0.22, 0.22, len(values)))
                spread = offsets if len(values) > 1 else np.zeros(1)
                shown = np.clip(np.sort(values), FLOOR, None)
                axis.plot(
                    shown, position + spread, ".", color=COLOURS[0], markersize=3, alpha=0.7, label="one model or pair"
                )
                axis.plot(max(mean, FLOOR), position, "D", color=COLOURS[1], markersize=4.5, label="mean over pairs")
            axis.set_yticks(range(len(rows)), [label for label, _, _ in rows])
            axis.set_ylim(len(rows) - 0.4, -0.6)
            axis.set_title(title, loc="left")
            axis.tick_params(axis="y", length=0)
            axis.grid(visible=False, axis="y")
        axes.flat[-1].set(xscale="log", xlabel="regret in nats per token")
        axes.flat[-1].set_xlim(left=FLOOR * 0.7)
        legend(figure, named(axes.flat), f"regrets below {FLOOR:g} are drawn there")
    return figure


def _policy_rows(costs: "pd.DataFrame") -> list[tuple[str, np.ndarray, float]]:
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


def plot_histories(
    differences: "pd.DataFrame", speeds: "pd.DataFrame", learning_rate: float = 1e-4
) -> "matplotlib.figure.Figure":
    """Plot the loss of every rank minus that of the highest one by phase of the run, and the speed of the descent.

    Args:
      differences: `histories.loss_difference_table`.
      speeds: `histories.speed_table`.
      learning_rate: Learning rate of the upper panels.

    Returns:
      The figure.

    Raises:
      InputError: If there are no differences at the rate.
    """
    import matplotlib.pyplot as plt

    shown = differences[np.isclose(differences["learning_rate"], learning_rate)]
    if shown.empty:
        raise InputError(f"differences must have rows at learning_rate {learning_rate:g}, got none")
    models = sorted(shown["model"].unique(), key=lambda name: -len(shown[shown["model"] == name]))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(len(models) + 1, 1, figsize=(WIDTH, 1.0 + 1.75 * (len(models) + 1)), sharex=True)
        for axis, model in zip(axes, models, strict=False):
            phases = shown[shown["model"] == model].groupby(["first_step", "last_step"], sort=True)
            for position, ((first, last), rows) in enumerate(phases):
                rows = rows.sort_values("rank")
                axis.errorbar(
                    rows["rank"], 1000 * rows["difference"], yerr=1000 * rows["standard_error"],
                    color=COLOURS[position], marker=MARKERS[position], label=f"steps {first} to {last}",
                )  # fmt: skip
            axis.set_title(f"{_short(model)}, rate {learning_rate:g}", loc="left")
            axis.set_ylabel("loss minus that of\nr = 512, $10^{-3}$ nats")
        for position, (model, rows) in enumerate(speeds.groupby("model", sort=False)):
            rows = rows.sort_values("rank")
            errors = np.abs(rows[["low", "high"]].to_numpy(float).T - rows["speed"].to_numpy(float))
            axes[-1].errorbar(
                rows["rank"], rows["speed"], yerr=errors, color=COLOURS[3 + position], marker=MARKERS[3 + position],
                label=f"speed, {_short(model)}",
            )  # fmt: skip
        axes[-1].set_title(f"speed of the descent, rate {float(speeds['learning_rate'].iloc[0]):g}", loc="left")
        axes[-1].set(xlabel="rank $r$", ylabel="relative to r = 512")
        integer_ticks(axes[-1], differences["rank"], max_count=10)
        legend(figure, named(axes), "bars: standard error over steps (speed: 95% interval)")
    return figure


def _short(model: str) -> str:
    return "-".join(model.split("-")[:2])
