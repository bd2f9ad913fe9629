"""What adapters of several ranks add to a model, against the rank: a run of sims.coordinate_check."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy as np
import tyro

from figures import style
from rora_theory import files

SHORT = {
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "o",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
}
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
    slopes = style.read_table(config.run / "slopes.csv", needed=True)
    folder = config.out or config.run
    if not (config.run / "results.csv").exists():
        print(
            f"{config.run}: has no results.csv, each seed's own sizes: coordinate_check is not drawn", file=sys.stderr
        )
        manifest = files.read_json(config.run / "manifest.json")
        return style.save(exponents(manifest, slopes), folder, "coordinate_check_slopes")
    manifest, rows = style.read_run(config.run, "coordinate_check")
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
    text = f"{style.OPTIMIZERS[optimizer]}:\n{style.look(rule)[0]}"
    text += "" if init == "kaiming_uniform" else f",\nA {init}"
    return text + ("\n(control: must fail)" if control == "1" else "")


def sizes(manifest: dict[str, Any], rows: list[dict[str, str]]) -> plt.Figure:
    """Output of every module against the rank: a column a case, a row a split; first and last step."""
    cases = list(dict.fromkeys(case_of(row) for row in rows))
    modules = [module for module in SHORT if any(row["module"] == module for row in rows)]
    steps = sorted({int(row["step"]) for row in rows})
    shown: dict[int, Any] = {steps[0]: "-", steps[-1]: (0, (1, 1.5))}
    figure, axes = plt.subplots(
        2, len(cases), figsize=(max(3.4, 0.9 + 1.35 * len(cases)), 4.2), sharex=True, sharey=True, squeeze=False
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
            style.whole_ticks(axis, (int(row["rank"]) for row in rows), most=5)
            axis.set_yscale("log")
            if split == "train":
                axis.set_title(name(case))
            else:
                axis.set_xlabel("rank $r$")
        axis_row[0].set_ylabel(f"rms of adapter's output,\n{label}")
    handles = style.named(axes.flat)
    for step, dashes in shown.items():
        face = "black" if step == steps[0] else "white"
        handles[f"step {step}"] = plt.Line2D([], [], color="black", linestyle=dashes, marker="o", markerfacecolor=face)
    style.legend(
        figure,
        handles,
        f"{manifest['config']['model']}, {manifest['config']['batches']} batch; mean ± s.e. over "
        f"{manifest['config']['seeds']} seeds; rules meet at r = {manifest['config']['reference_rank']}",
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
        2, len(cases), figsize=(max(3.4, 0.9 + 1.35 * len(cases)), 4.2), sharex=True, sharey=True, squeeze=False
    )
    for axis_row, (split, label) in zip(axes, SPLITS.items(), strict=True):
        for axis, case in zip(axis_row, cases, strict=True):
            axis.axhspan(-band, band, color=style.BAND_COLOUR, zorder=0)
            for position, (quantity, module, text) in enumerate(lines):
                points = [
                    row
                    for row in slopes
                    if case_of(row) == case
                    and (row["quantity"], row["module"], row["split"]) == (quantity, module, split)
                    and row["slope"]
                ]
                axis.errorbar(
                    [int(row["step"]) for row in points],
                    [float(row["slope"]) for row in points],
                    yerr=[float(row["half_width"]) for row in points],
                    color=style.COLOURS[position] if module != "model" else "black",
                    marker=style.MARKERS[position % len(style.MARKERS)],
                    markerfacecolor="white" if quantity == "logits" else None,
                    linestyle=(0, (2, 2)) if quantity == "logits" else "-",
                    label=text,
                )
            style.whole_ticks(axis, (int(row["step"]) for row in slopes if int(row["step"]) > 0), most=5)
            if split == "train":
                axis.set_title(name(case))
            else:
                axis.set_xlabel("step")
        axis_row[0].set_ylabel(f"slope in $r$, {label}")
    handles = style.named(axes.flat) | {f"flat: within ±{band:g}": style.band_handle()}
    style.legend(
        figure,
        handles,
        f"{manifest['config']['model']}, {manifest['config']['batches']} batch; log-log slope ± half its 95% "
        f"interval over {manifest['config']['seeds']} seeds",
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
