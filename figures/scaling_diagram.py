"""Draw the adapters of LoRA and RoRA, which differ in their scaling (Fig. 2 of the paper).

python -m figures.scaling_diagram --out FOLDER
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyArrowPatch, Polygon, Rectangle

from figures import style
from rora_theory.scaling import check_integer, scaling_factor
from rora_theory.validation.ranges import Count, Positive, check_ranges
from rora_theory.validation.rules import check_list

FROZEN, TRAINED, LINE = "#d9d9d9", "#F0E442", "#444444"


@dataclass(frozen=True)
class ScalingDiagramOptions:
    alpha: Positive = 64.0
    """Numerator of the scaling."""
    rank: Count = 32
    """Rank that is marked in the curve and used in the schemes."""
    ranks: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    """Ranks of the curve."""
    out: Path = Path("results/scaling_diagram")
    """Folder for scaling_diagram.png and .svg."""

    def __post_init__(self) -> None:
        check_ranges(self)
        check_list("ranks", self.ranks, check_integer)


def draw_scaling_diagram(config: ScalingDiagramOptions) -> Sequence[Path]:
    """Draw the adapters of LoRA and RoRA, and gamma against the rank for both rules."""
    gammas = {
        rule: [scaling_factor(rule, alpha=config.alpha, rank=rank) for rank in (*config.ranks, config.rank)]
        for rule in ("lora", "rora")
    }
    figure, axes = plt.subplot_mosaic([[*gammas], ["curve"] * 2], figsize=(4.6, 5.0), height_ratios=(1, 0.9))
    for rule in gammas:
        draw_scheme(axes[rule], rule, config, gammas[rule][-1])
    draw_scaling_curve(axes["curve"], config, {rule: values[:-1] for rule, values in gammas.items()})
    return style.save(figure, config.out, "scaling_diagram")


def draw_scheme(axis: Any, rule: str, config: ScalingDiagramOptions, gamma: float) -> None:
    """Draw the path of x through the frozen W, and the path through A, B and gamma, to their sum."""
    _, colour, _ = style.look(rule)
    name, formula = {"lora": ("LoRA", r"\alpha/r"), "rora": ("RoRA", r"\alpha/\sqrt{r}")}[rule]
    axis.set(xlim=(0, 10), ylim=(0, 10.6), aspect="equal")
    axis.axis("off")
    axis.set_title(name, color=colour, fontweight="bold")
    axis.text(5, 0.3, "$x$", ha="center", va="center")
    # The path of x through the frozen weight.
    axis.add_patch(Rectangle((0.4, 3.0), 3.8, 3.4, facecolor=FROZEN, edgecolor=LINE, linewidth=0.8))
    axis.text(2.3, 4.7, "$W_0$\nfrozen", ha="center", va="center")
    # The path through A, which narrows to the rank r, and B, which widens again.
    for points, label, y in (
        (((5.6, 2.5), (9.4, 2.5), (8.3, 3.9), (6.7, 3.9)), "$A$", 3.2),
        (((6.7, 4.3), (8.3, 4.3), (9.4, 5.7), (5.6, 5.7)), "$B$", 5.0),
    ):
        axis.add_patch(Polygon(points, facecolor=TRAINED, edgecolor=LINE, linewidth=0.8))
        axis.text(7.5, y, label, ha="center", va="center")
    axis.text(8.75, 4.1, "$r$", ha="left", va="center")
    # The scaling gamma, in which the rules differ.
    axis.add_patch(Rectangle((5.7, 6.35), 3.6, 1.35, facecolor="white", edgecolor=colour, linewidth=1.4))
    axis.text(7.5, 7.02, rf"$\times\ \gamma = {formula}$", ha="center", va="center", color=colour)
    # Arrows from x along both paths to their sum.
    for start, end, bend in (
        ((4.7, 0.7), (2.3, 3.0), 0.15),
        ((5.3, 0.7), (7.5, 2.5), -0.15),
        ((7.5, 5.7), (7.5, 6.35), 0.0),
        ((2.3, 6.4), (4.7, 8.7), -0.15),
        ((7.5, 7.7), (5.3, 8.7), 0.15),
    ):
        style_of = f"arc3,rad={bend}"
        arrow = FancyArrowPatch(start, end, connectionstyle=style_of, arrowstyle="-|>", mutation_scale=7, color=LINE)
        arrow.set_linewidth(0.8)
        axis.add_patch(arrow)
    axis.text(5, 9.0, r"$+$", ha="center", va="center")
    axis.text(5, 10.1, r"$W_0 x + \gamma B A x$", ha="center", va="center")
    text = rf"$\alpha$ = {config.alpha:g}, $r$ = {config.rank}: $\gamma$ = {gamma:.3g}"
    axis.text(5, -0.75, text, ha="center", va="center", color=colour)


def draw_scaling_curve(axis: Any, config: ScalingDiagramOptions, gammas: dict[str, list[float]]) -> None:
    """Draw gamma against the rank on logarithmic axes, with the slopes."""
    for rule, values in gammas.items():
        label, colour, marker = style.look(rule)
        axis.plot(config.ranks, values, color=colour, marker=marker, label=label)
        # The slope of each line is the exponent of its rule.
        slope = np.polyfit(np.log(config.ranks), np.log(values), 1)[0] if len(config.ranks) > 1 else np.nan
        axis.annotate(
            f"slope {slope:+.2g}",
            (config.ranks[-len(config.ranks) // 4], values[-len(config.ranks) // 4]),
            xytext=(3, 6),
            textcoords="offset points",
            color=colour,
        )
    axis.axvline(config.rank, color="#999999", linestyle=":", linewidth=0.8, label=f"$r$ = {config.rank}")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xticks(config.ranks, [str(rank) for rank in config.ranks])
    # Powers of four within the drawn range.
    ticks = [2.0**power for power in range(-10, 20, 2)]
    low, high = min(map(min, gammas.values())), max(map(max, gammas.values()))
    shown = [tick for tick in ticks if low / 2 <= tick <= high * 2]
    axis.set_yticks(shown, [f"{tick:g}" for tick in shown])
    axis.minorticks_off()
    axis.set(xlabel="rank $r$", ylabel=rf"scaling $\gamma$ at $\alpha$ = {config.alpha:g}")
    axis.legend(frameon=False, loc="lower left")


if __name__ == "__main__":
    style.command(draw_scaling_diagram, ScalingDiagramOptions, __doc__)
