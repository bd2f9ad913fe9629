"""RMS of w against the rank in real layers, from a run of sims.variance_sweep --layer-data: law and measurement."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import tyro

from figures import style

SPLITS = {"train": "training", "heldout": "held-out"}


@dataclass(frozen=True)
class Config:
    """Which run to draw."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder of sims.variance_sweep --layer-data."""
    split: str = "heldout"
    """Tokens the layer is read at: train or heldout."""
    out: Path | None = None
    """Folder for layers_vs_rank.png and .svg; by default the run folder."""


def draw(config: Config) -> Sequence[Path]:
    """One panel a layer and optimizer; each rule's curve is divided by its value at the smallest rank."""
    _, rows = style.read_run(config.run, "variance_sweep_layers")
    rows = [row for row in rows if row["split"] == config.split]
    if config.split not in SPLITS or not rows:
        style.fail(f"--split is {config.split!r}; accepted are train and heldout")
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    optimizers = list(dict.fromkeys(row["optimizer"] for row in rows))
    rules = list(dict.fromkeys(row["rule"] for row in rows))
    figure, axes = plt.subplots(
        len(optimizers), 1, figsize=(3.4, 0.6 + 2.1 * len(optimizers)), sharex=True, squeeze=False
    )
    for axis, optimizer in zip(axes[:, 0], optimizers, strict=True):
        for position, rule in enumerate(rules):
            label, colour, marker = style.look(rule, position)
            for layer in layers:
                key = (layer, optimizer, rule)
                chosen = [row for row in rows if (row["layer"], row["optimizer"], row["rule"]) == key]
                chosen.sort(key=lambda row: int(row["rank"]))
                ranks = [int(row["rank"]) for row in chosen]
                first = float(chosen[0]["exact"])
                axis.plot(ranks, [float(row["exact"]) / first for row in chosen], color=colour, linewidth=0.7)
                axis.errorbar(
                    ranks,
                    [float(row["estimate"]) / first for row in chosen],
                    yerr=[float(row["standard_error"]) / first for row in chosen],
                    color=colour,
                    marker=marker,
                    markersize=2.2,
                    linestyle="none",
                    label=label if layer == layers[0] else None,
                )
        axis.axhline(1, color="black", linewidth=0.6)
        axis.set(yscale="log", ylabel="rms of $w$ relative to the first rank", title=style.OPTIMIZERS[optimizer])
        style.whole_ticks(axis, (int(row["rank"]) for row in rows))
    axes[-1, 0].set_xlabel("rank $r$")
    style.legend(
        figure,
        style.named(axes.flat),
        f"{len(layers)} layers, {SPLITS[config.split]} tokens; points: measured ± s.e., lines: the law",
    )
    return style.save(figure, config.out or config.run, "layers_vs_rank")


if __name__ == "__main__":
    style.command(draw, Config, __doc__)
