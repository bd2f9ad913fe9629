"""Plots of measurements, and the look that they share with the plots of saved runs.

`plot_check` and `plot_regime` draw a whole result, as ``check.plot()`` and ``regime.plot()`` do. `plot_losses` draws
the loss against the learning rate. The ``draw_*`` functions add one line to given axes. All return or use Matplotlib's
objects, which the caller saves or shows. Matplotlib is imported when something is drawn.
"""

import io
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rora_theory.errors import InputError

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure
    import pandas

# The palette of Okabe and Ito, which all common kinds of colour vision distinguish; markers differ too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
BAND_COLOUR = "#dddddd"
DOTTED = (0, (1, 1.5))
"""Line style of the last of several steps."""

OPTIMIZERS = {"sgd": "SGD", "momentum": "momentum", "adam": "Adam", "adamw": "AdamW"}
"""Labels of optimizers."""

STYLE: Any = {
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "legend.title_fontsize": 8.5,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "errorbar.capsize": 1.5,
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "rora",
    "svg.fonttype": "none",
}
"""Matplotlib's settings in all plots."""

MODEL_LINES = {"hidden": "final hidden state", "logits": "logits"}
"""Labels of the changes of the whole model in a coordinate check."""

CHECK_SPLITS = {"train": "training batch", "held_out": "held-out batch"}
"""Labels of a coordinate check's splits."""

REGIME_SPLITS = {"train": "training", "heldout": "held-out"}
"""Labels of a regime's splits."""

QUARTILES = ("lower_quartile", "upper_quartile")
"""Columns of the quartiles over tokens."""

MAX_COLUMNS = 3
"""Maximum number of panels in a row, so that a phone can show them."""


def plot_check(sizes: "pandas.DataFrame", slopes: "pandas.DataFrame", band: float) -> "matplotlib.figure.Figure":
    """Plot a coordinate check: how much the model's outputs change against the rank, and the slopes.

    Each split has a row. The left panel has the sizes after the first step and after the last one, with the standard
    error over seeds. The right panel has the log-log slope after every step, with half its 95% interval, and the band
    within which it counts as flat.

    Args:
      sizes: Frame with the columns rank, seed, quantity, split, module, step and value.
      slopes: Frame with the columns quantity, split, module, step, slope and half_width.
      band: Largest absolute slope that counts as flat.

    Returns:
      The figure.
    """
    import matplotlib.pyplot as plt

    sizes = sizes[sizes["module"] == "model"]
    # Splits and quantities that were measured.
    splits = [split for split in CHECK_SPLITS if (sizes["split"] == split).any()]
    lines = [name for name in MODEL_LINES if (sizes["quantity"] == name).any()]
    steps = sorted({int(step) for step in sizes["step"]})
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(splits), 2, figsize=(6.0, 0.8 + 1.9 * len(splits)), sharex="col", sharey="col", squeeze=False
        )
        for (size_axis, slope_axis), split in zip(axes, splits, strict=True):
            slope_axis.axhspan(-band, band, color=BAND_COLOUR, zorder=0)
            for position, quantity in enumerate(lines):
                look: dict[str, Any] = {"colour": COLOURS[position], "marker": MARKERS[position]}
                rows = sizes[(sizes["split"] == split) & (sizes["quantity"] == quantity)]
                # The first step is solid, the last one dotted with open markers.
                for step in dict.fromkeys((steps[0], steps[-1])):
                    draw_sizes(size_axis, rows[rows["step"] == step], is_first=step == steps[0], **look)
                is_line = (slopes["split"] == split) & (slopes["quantity"] == quantity) & (slopes["module"] == "model")
                draw_slopes(slope_axis, slopes[is_line], label=MODEL_LINES[quantity], **look)
            size_axis.set_yscale("log")
            size_axis.set_ylabel(f"rms of the change,\n{CHECK_SPLITS[split]}")
            slope_axis.set_ylabel("slope in $r$")
            integer_ticks(size_axis, sizes["rank"], max_count=7)
            integer_ticks(slope_axis, steps, max_count=7)
        axes[-1, 0].set_xlabel("rank $r$")
        axes[-1, 1].set_xlabel("step")
        # One legend for both columns; steps and the band have handles of their own.
        handles = named(axes.flat) | step_handles(steps) | {f"flat: within ±{band:g}": band_handle()}
        seeds = sizes["seed"].nunique()
        legend(figure, handles, f"mean with standard error over {seeds} draws of A; slope ± half its 95% interval")
    return figure


def plot_regime(crossings: "pandas.DataFrame", title: str = "") -> "matplotlib.figure.Figure":
    """Plot the crossing rank of every module over the model's layers, with the quartiles over tokens.

    Each type of module has a panel, and each optimizer a line.

    Args:
      crossings: Rows of one split and one initialisation with the columns layer, module, optimizer, crossing_rank,
        lower_quartile and upper_quartile.

    Returns:
      The figure.

    Raises:
      InputError: If there are no rows.
    """
    import matplotlib.pyplot as plt

    if crossings.empty:
        raise InputError("crossings must have at least one row, got none")
    types = module_types(crossings["module"].unique())
    crossings = crossings.assign(type=crossings["module"].map(types))
    with plt.rc_context(STYLE):
        # A panel for each type of module, a line for each optimizer.
        names = list(dict.fromkeys(crossings["type"]))
        figure, axes = layer_panels(names, "crossing rank $r^*$")
        for axis, name in zip(axes, names, strict=True):
            for position, optimizer in enumerate(dict.fromkeys(crossings["optimizer"])):
                rows = crossings[(crossings["type"] == name) & (crossings["optimizer"] == optimizer)]
                draw_crossings(axis, rows, colour=COLOURS[position], marker=MARKERS[position], label=optimizer)
        label_short_axis(axes[0])
        handles = named(axes)
        # The bands have no labels, so a rectangle stands for the quartiles of each optimizer.
        for optimizer, handle in list(handles.items()):
            handles[f"{optimizer}, quartiles over tokens"] = plt.Rectangle(
                (0, 0), 1, 1, color=handle.get_color(), alpha=0.2, linewidth=0
            )
        legend(figure, handles, title)
    return figure


def plot_losses(losses: Mapping[str, Mapping[float, float | Sequence[float]]]) -> "matplotlib.figure.Figure":
    """Plot the loss against the learning rate, on a logarithmic axis.

    Args:
      losses: Losses by the name of a line and by learning rate: a number, or one number for each seed. A cross at the
        upper edge marks a learning rate whose loss is not finite.

    Returns:
      The figure.

    Raises:
      InputError: If there are no losses.
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    if not any(losses.values()):
        raise InputError("losses must have at least one learning rate, got none")
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(3.6, 2.7))
        for position, (name, by_rate) in enumerate(losses.items()):
            colour = COLOURS[position % len(COLOURS)]
            draw_losses(axis, by_rate, colour=colour, marker=MARKERS[position % len(MARKERS)], label=name)
        axis.set(xscale="log", xlabel="learning rate", ylabel="held-out loss, nats per token")
        # Two labels for each decade: the default labels every minor tick of a short axis, and they overlap.
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axis.minorticks_off()
        if any(losses):
            axis.legend(frameon=False)
    return figure


def draw_sizes(
    axis: "matplotlib.axes.Axes",
    rows: "pandas.DataFrame",
    *,
    colour: str,
    marker: str,
    is_first: bool = True,
    label: str | None = None,
) -> None:
    """Draw sizes against the rank: the mean over seeds with its standard error.

    Args:
      rows: Frame with the columns rank and value. A rank with a non-finite value has no mean.
      is_first: Whether it is the first step, which is solid; a later step is dotted with open markers.
    """
    values = rows.groupby("rank")["value"]
    axis.errorbar(
        list(values.groups),
        values.agg(lambda seeds: seeds.mean(skipna=False)),
        yerr=values.sem(),
        color=colour,
        marker=marker,
        linestyle="-" if is_first else DOTTED,
        markerfacecolor=colour if is_first else "white",
        label=label,
    )


def draw_slopes(
    axis: "matplotlib.axes.Axes",
    rows: "pandas.DataFrame",
    *,
    colour: str,
    marker: str,
    is_open: bool = False,
    label: str | None = None,
) -> None:
    """Draw slopes in the rank against the step, with half their 95% interval.

    Args:
      rows: Frame with the columns step, slope and half_width; rows without a slope are left out.
      is_open: Whether the line is dashed and has open markers.
    """
    rows = rows[rows["slope"].notna()] if "slope" in rows else rows.iloc[:0].assign(slope=[], half_width=[])
    axis.errorbar(
        rows["step"],
        rows["slope"],
        yerr=rows["half_width"],
        color=colour,
        marker=marker,
        markerfacecolor="white" if is_open else None,
        linestyle=(0, (2, 2)) if is_open else "-",
        label=label,
    )


def draw_crossings(
    axis: "matplotlib.axes.Axes", rows: "pandas.DataFrame", *, colour: str, marker: str, label: str
) -> None:
    """Draw the crossing rank over the layers, with a band between the quartiles over tokens.

    Args:
      rows: Frame with the columns layer, crossing_rank, lower_quartile and upper_quartile.
      colour: Colour of line and band.
      label: Optimizer, by name or in words.
    """
    rows = rows.sort_values("layer").astype(dict.fromkeys(("crossing_rank", *QUARTILES), float))
    axis.fill_between(rows["layer"], *(rows[name] for name in QUARTILES), color=colour, alpha=0.2, linewidth=0)
    axis.plot(
        rows["layer"],
        rows["crossing_rank"],
        color=colour,
        marker=marker,
        markersize=2,
        label=OPTIMIZERS.get(label, label),
    )


def draw_losses(
    axis: "matplotlib.axes.Axes",
    losses: Mapping[float, float | Sequence[float]],
    *,
    colour: str,
    marker: str,
    label: str | None = None,
) -> None:
    """Draw losses against the learning rate: the mean over seeds, with its standard error where there are several.

    Args:
      losses: Loss by learning rate: a number, or one number for each seed. Where one is not finite, a cross at the
        upper edge marks the learning rate.
    """
    by_rate = {rate: np.atleast_1d(np.asarray(losses[rate], np.float64)) for rate in sorted(losses)}
    # Mean and error only where no seed diverged.
    finite = {rate: values for rate, values in by_rate.items() if np.isfinite(values).all()}
    errors = [values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0 for values in finite.values()]
    axis.errorbar(
        list(finite),
        [float(values.mean()) for values in finite.values()],
        yerr=errors if any(errors) else None,
        color=colour,
        marker=marker,
        label=label or None,
    )
    diverged = [rate for rate in by_rate if rate not in finite]
    # x in data coordinates, y in those of the axes: 1 is the upper edge.
    axis.plot(diverged, [1.0] * len(diverged), "x", color=colour, clip_on=False, transform=axis.get_xaxis_transform())


def layer_panels(names: Sequence[str], label: str) -> tuple["matplotlib.figure.Figure", list["matplotlib.axes.Axes"]]:
    """Return a figure with a panel for each type of module: layers along x, a logarithmic y.

    Args:
      names: Titles of the panels.
      label: Label of the y axis.
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    # As many columns as fit on a page, and empty panels removed.
    columns = min(len(names), MAX_COLUMNS)
    rows = -(-len(names) // columns)
    size = (max(3.4, 0.5 + 1.35 * columns), 0.5 + 1.8 * rows)
    figure, grid = plt.subplots(rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False)
    axes = grid.ravel().tolist()
    for axis in axes[len(names) :]:
        axis.remove()
    for position, (axis, name) in enumerate(zip(axes, names, strict=False)):
        axis.set(yscale="log", title=name)
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        if position % columns == 0:
            axis.set_ylabel(label)
        # Panels share ticks with those below them, which an incomplete last row does not have.
        is_lowest = position + columns >= len(names)
        axis.tick_params(labelbottom=is_lowest)
        axis.set_xlabel("layer" if is_lowest else "")
    return figure, axes[: len(names)]


def label_short_axis(axis: "matplotlib.axes.Axes") -> None:
    """Label 1, 2 and 5 of each decade of a logarithmic y axis of at most two and a half decades.

    On such an axis the default labels further multiples in scientific notation, which overlap. Longer axes keep the
    powers of ten. Call this function after drawing, because the data determine the limits of the axis.
    """
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    low, high = axis.get_ylim()
    if high / low <= 10**2.5:
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())


def module_types(names: Iterable[str]) -> dict[str, str]:
    """Return the type of each module: the last part of its name, with more parts where a layer has two of that type.

    Examples:
      >>> module_types(["h.0.attn.c_proj", "h.0.mlp.c_proj", "h.1.attn.c_proj", "h.0.attn.c_attn"]).values()
      dict_values(['attn.c_proj', 'mlp.c_proj', 'attn.c_proj', 'c_attn'])
    """
    inner = {name: re.sub(r"^.*?\.\d+\.", "", name) for name in names}
    # Two names inside a layer may end in the same part.
    ends = Counter(name.rpartition(".")[2] for name in set(inner.values()))
    types = {}
    for name, part in inner.items():
        end = part.rpartition(".")[2]
        types[name] = part if ends[end] > 1 else end
    return types


def legend(figure: "matplotlib.figure.Figure", handles: dict[str, Any], title: str) -> None:
    """Draw one legend below all panels, in as many columns as fit, with its title folded between words.

    Args:
      figure: Figure with a constrained layout.
      handles: Handles by label.
    """
    width = figure.bbox.width - 20  # the legend's own border
    lines = [""]
    for word in title.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if _text_width(figure, longer) <= width else [*lines, word]
    # Try as many columns as there are labels, then fewer, until the legend fits.
    for columns in range(len(handles), 0, -1):
        drawn = figure.legend(
            handles.values(),
            handles.keys(),
            loc="outside lower center",
            ncols=columns,
            frameon=False,
            title="\n".join(lines),
        )
        drawn.get_title().set_multialignment("center")
        if columns == 1 or drawn.get_window_extent().width <= figure.bbox.width:
            return
        drawn.remove()


def _text_width(figure: "matplotlib.figure.Figure", text: str) -> float:
    """Return the width of a line of a legend's title, in pixels."""
    artist = figure.text(0, 0, text, fontsize=STYLE["legend.title_fontsize"])
    width = artist.get_window_extent().width
    artist.remove()
    return float(width)


def named(axes: Iterable["matplotlib.axes.Axes"]) -> dict[str, Any]:
    """Return the handles of all labelled lines by label."""
    handles: dict[str, Any] = {}
    for axis in axes:
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    return handles


def step_handles(steps: Sequence[int]) -> dict[str, Any]:
    """Return handles for the first and the last of some steps, as `draw_sizes` draws them."""
    from matplotlib.lines import Line2D

    return {
        f"step {step}": Line2D(
            [],
            [],
            color="black",
            linestyle="-" if step == steps[0] else DOTTED,
            marker="o",
            markerfacecolor="black" if step == steps[0] else "white",
        )
        for step in dict.fromkeys((steps[0], steps[-1]))
    }


def band_handle() -> Any:
    """Return the handle of a grey band."""
    from matplotlib.patches import Rectangle

    return Rectangle((0, 0), 1, 1, facecolor=BAND_COLOUR, edgecolor="none")


def integer_ticks(axis: "matplotlib.axes.Axes", values: Iterable[float | np.integer], max_count: int = 7) -> None:
    """Make the x axis logarithmic, with ticks at ranks or steps that were run, as plain integers.

    Args:
      axis: Axes to change.
      values: Ranks, steps or other whole numbers.
      max_count: Maximum number of ticks.
    """
    from matplotlib.ticker import NullLocator

    ticks = sorted({int(value) for value in values if isfinite(value)})
    ticks = ticks[:: -(-len(ticks) // max_count)]
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.xaxis.set_minor_locator(NullLocator())


def save(figure: "matplotlib.figure.Figure", folder: Path, name: str) -> list[Path]:
    """Write a figure as PNG (200 dpi) and SVG without dates, so that equal data give equal files.

    The SVG file is the same on any processor with the same version of matplotlib.

    Args:
      figure: Figure to write; it is closed.
      folder: Folder of the files, which is created.
      name: Name of the files without their suffixes.

    Returns:
      The paths of both files.
    """
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    figure.savefig(paths[0], dpi=200, metadata={"Software": None})
    figure.set_layout_engine("none")  # reuse the layout of the PNG file, which takes longer than drawing
    svg = io.StringIO()
    figure.savefig(svg, format="svg", metadata={"Date": None})
    paths[1].write_text(_rounded(svg.getvalue()), "utf-8")
    plt.close(figure)
    return paths


_COORDINATES = re.compile(r'\b(?:d|x|y|width|height)="[^"]*"|\b(?:translate|rotate)\([^)]*\)')
_DECIMAL = re.compile(r"-?\d+\.\d+")
_HASH = re.compile(r'(?<=["#])([a-z]+)[0-9a-f]{10}(?=[")])')


def _rounded(svg: str) -> str:
    """Round the coordinates of an SVG file to 0.01 points, so that rounding errors of processors do not change it.

    Names of clip paths and markers are hashes of unrounded coordinates, so they are replaced by numbers.
    """
    svg = _COORDINATES.sub(lambda part: _DECIMAL.sub(_hundredths, part[0]), svg)
    names: dict[str, str] = {}
    return _HASH.sub(lambda name: names.setdefault(name[0], f"{name[1]}{len(names)}"), svg)


def _hundredths(number: re.Match[str]) -> str:
    return f"{round(float(number[0]), 2) + 0.0:.2f}".rstrip("0").rstrip(".")  # + 0.0 removes a negative zero
