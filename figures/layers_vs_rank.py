"""Plot the measured and predicted rms of w against the rank in real layers, as published in `real_layers`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import tyro

from figures import style
from rora_theory.runs import frames

SPLITS = {"train": "training", "heldout": "held-out"}


@dataclass(frozen=True)
class LayersVsRankOptions:
    run: Annotated[Path, tyro.conf.Positional]
    """Run folder with drawn adapters in real layers, such as results/published/real_layers."""
    split: str = "heldout"
    """Tokens at which the layers are measured: train or heldout."""
    out: Path | None = None
    """Folder for layers_vs_rank.png and .svg; by default the run folder."""


def draw_layers_vs_rank(config: LayersVsRankOptions) -> Sequence[Path]:
    """Draw the measured and predicted size of the first update against the rank, one panel for each optimizer.

    Each rule's curve is divided by its value at the smallest rank.
    """
    _, rows = style.read_frame(config.run, "layer_sweep")
    rows = rows[rows["split"] == config.split]
    if config.split not in SPLITS or rows.empty:
        style.fail(f"--split must be train or heldout, got {config.split!r}")
    layers, optimizers, rules = (list(dict.fromkeys(rows[name])) for name in ("layer", "optimizer", "rule"))
    figure, axes = plt.subplots(
        len(optimizers), 1, figsize=(3.4, 0.6 + 2.1 * len(optimizers)), sharex=True, squeeze=False
    )
    # A panel for each optimizer, a colour for each rule, a line for each layer.
    for axis, optimizer in zip(axes[:, 0], optimizers, strict=True):
        for position, rule in enumerate(rules):
            label, colour, marker = style.look(rule, position)
            for layer in layers:
                selection = {"layer": layer, "optimizer": optimizer, "rule": rule}
                chosen = frames.where(rows, selection).sort_values("rank")
                # Layers differ in size by orders of magnitude: divide each by its value at the first rank.
                first = chosen["exact"].iloc[0]
                # The law as a line, the measurement as points.
                axis.plot(chosen["rank"], chosen["exact"] / first, color=colour, linewidth=0.7)
                axis.errorbar(
                    chosen["rank"],
                    chosen["estimate"] / first,
                    yerr=chosen["standard_error"] / first,
                    color=colour,
                    marker=marker,
                    markersize=2.2,
                    linestyle="none",
                    label=label if layer == layers[0] else None,
                )
        axis.axhline(1, color="black", linewidth=0.6)
        axis.set(yscale="log", ylabel="rms of $w$,\nrelative to the first rank", title=style.OPTIMIZERS[optimizer])
        style.integer_ticks(axis, rows["rank"])
    axes[-1, 0].set_xlabel("rank $r$")
    style.legend(
        figure,
        style.named(axes.flat),
        f"{len(layers)} layers, {SPLITS[config.split]} tokens; points: measured, with one standard error, lines: the "
        "law",
    )
    return style.save(figure, config.out or config.run, "layers_vs_rank")


if __name__ == "__main__":
    style.command(draw_layers_vs_rank, LayersVsRankOptions, __doc__)
