"""What adapters of several ranks add to a model, against the rank: a run of sims.coordinate_check."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy as np
import tyro

from figures import style

SHORT = {
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "o",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
}
OPTIMIZERS = {"sgd": "SGD", "momentum": "momentum", "adam": "Adam", "adamw": "AdamW"}
RULES = {"lora": r"$\alpha/r$", "rora": r"$\alpha/\sqrt{r}$", "rslora": r"$\alpha/\sqrt{r}$"}
SPLITS = {"train": "trained on", "held_out": "held out"}


@dataclass(frozen=True)
class Config:
    """Which run to draw."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder of sims.coordinate_check."""
    out: Path | None = None
    """Folder for the figures; by default the run folder."""


def draw(config: Config) -> Sequence[Path]:
    """Two figures: coordinate_check (sizes against the rank), coordinate_check_slopes (slopes against the step)."""
    manifest, rows = style.read_run(config.run, "coordinate_check")
    path = config.run / "slopes.csv"
    try:
        with path.open(newline="") as file:
            slopes = list(csv.DictReader(file))
    except OSError as error:
        style.fail(f"{path}: cannot be read ({error.strerror}); accepted is the file of a finished run")
    folder = config.out or config.run
    return [
        *style.save(sizes(manifest, rows), folder, "coordinate_check"),
        *style.save(exponents(manifest, slopes), folder, "coordinate_check_slopes"),
    ]


def case_of(row: dict[str, str]) -> tuple[str, str, str, str]:
    """Optimizer, rule, init, control."""
    return row["optimizer"], row["rule"], row["init"], row["control"]


def name(case: tuple[str, str, str, str]) -> str:
    """A case as a panel's title."""
    optimizer, rule, init, control = case
    text = f"{OPTIMIZERS[optimizer]}, " + RULES.get(rule, rf"$\kappa={rule}$")
    text += "" if init == "kaiming_uniform" else f",\nA {init}"
    return text + ("\n(control: must fail)" if control == "1" else "")


def sizes(manifest: dict[str, Any], rows: list[dict[str, str]]) -> plt.Figure:
    """Output of every module against the rank: a column a case, a row a split; first and last step."""
    cases = list(dict.fromkeys(case_of(row) for row in rows))
    modules = [module for module in SHORT if any(row["module"] == module for row in rows)]
    steps = sorted({int(row["step"]) for row in rows})
    shown: dict[int, Any] = {steps[0]: "-", steps[-1]: (0, (1, 1.5))}
    figure, axes = plt.subplots(
        2, len(cases), figsize=(0.9 + 1.35 * len(cases), 4.2), sharex=True, sharey=True, squeeze=False
    )
    for axis_row, (split, label) in zip(axes, SPLITS.items(), strict=True):
        for axis, case in zip(axis_row, cases, strict=True):
            for position, module in enumerate(modules):
                colour, marker = style.COLOURS[position], style.MARKERS[position]
                for step, dashes in shown.items():
                    ranks, middle, error = _over_seeds(rows, case, split, module, step)
                    axis.errorbar(
                        ranks,
                        middle,
                        yerr=error,
                        color=colour,
                        marker=marker,
                        linestyle=dashes,
                        markerfacecolor=colour if step == steps[0] else "white",
                        label=SHORT[module] if step == steps[0] else None,
                    )
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            if split == "train":
                axis.set_title(name(case))
            else:
                axis.set_xlabel("rank $r$")
        axis_row[0].set_ylabel(f"rms of adapter's output,\n{label}")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    for step, dashes in shown.items():
        face = "black" if step == steps[0] else "white"
        handles.append(plt.Line2D([], [], color="black", linestyle=dashes, marker="o", markerfacecolor=face))
        labels.append(f"step {step}")
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=len(labels),
        frameon=False,
        title=f"{manifest['config']['model']}, {manifest['config']['batches']} batch; mean ± s.e. over "
        f"{manifest['config']['seeds']} seeds; rules meet at r = {manifest['config']['reference_rank']}",
        title_fontsize=7,
    )
    return figure


def exponents(manifest: dict[str, Any], slopes: list[dict[str, str]]) -> plt.Figure:
    """Slope against the step: a column a case, a row a split, a line a module; the model's own in black."""
    cases = list(dict.fromkeys(case_of(row) for row in slopes))
    modules = [module for module in SHORT if any(row["module"] == module for row in slopes)]
    lines = [("output", module, SHORT[module]) for module in modules]
    lines += [("hidden", "model", "final hidden state"), ("logits", "model", "logits")]
    band = float(manifest["config"]["band"])
    figure, axes = plt.subplots(
        2, len(cases), figsize=(0.9 + 1.35 * len(cases), 4.2), sharex=True, sharey=True, squeeze=False
    )
    for axis_row, (split, label) in zip(axes, SPLITS.items(), strict=True):
        for axis, case in zip(axis_row, cases, strict=True):
            axis.axhspan(-band, band, color="#dddddd", zorder=0)
            for position, (quantity, module, text) in enumerate(lines):
                points = [
                    row
                    for row in slopes
                    if case_of(row) == case
                    and (row["quantity"], row["module"], row["split"]) == (quantity, module, split)
                    and row["slope"]
                ]
                # Points of one step stand side by side.
                shift = 1.04 ** (position - len(lines) / 2)
                axis.errorbar(
                    [int(row["step"]) * shift for row in points],
                    [float(row["slope"]) for row in points],
                    yerr=[float(row["half_width"]) for row in points],
                    color=style.COLOURS[position] if module != "model" else "black",
                    marker=style.MARKERS[position % len(style.MARKERS)],
                    markerfacecolor="white" if quantity == "logits" else None,
                    linestyle=(0, (2, 2)) if quantity == "logits" else "-",
                    label=text,
                )
            axis.set_xscale("log")
            if split == "train":
                axis.set_title(name(case))
            else:
                axis.set_xlabel("step")
        axis_row[0].set_ylabel(f"slope in $r$, {label}")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=len(labels),
        frameon=False,
        title=f"{manifest['config']['model']}, {manifest['config']['batches']} batch; log-log slope ± half its 95% "
        f"interval over {manifest['config']['seeds']} seeds; grey: within ±{band:g}",
        title_fontsize=7,
    )
    return figure


def _over_seeds(
    rows: list[dict[str, str]], case: tuple[str, str, str, str], split: str, module: str, step: int
) -> tuple[list[int], list[float], list[float]]:
    """Ranks, means and standard errors of a module's output."""
    found: dict[int, list[float]] = {}
    for row in rows:
        value = float(row["value"])
        wanted = (split, module, "output", str(step))
        if (row["split"], row["module"], row["quantity"], row["step"]) == wanted and case_of(row) == case:
            found.setdefault(int(row["rank"]), []).append(value if math.isfinite(value) else math.nan)
    ranks = sorted(found)
    middle = [float(np.mean(found[rank])) for rank in ranks]
    error = [
        float(np.std(found[rank], ddof=1) / math.sqrt(len(found[rank]))) if len(found[rank]) > 1 else 0.0
        for rank in ranks
    ]
    return ranks, middle, error


if __name__ == "__main__":
    style.command(draw, Config, __doc__)
