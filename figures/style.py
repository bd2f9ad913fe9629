"""Style and output of figures: colour-blind safe, in print size, as PNG and SVG."""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import matplotlib
import tyro

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rora_theory.defaults import MODEL_NAMES
from rora_theory.plots import (  # noqa: F401 (figures take them from here)
    BAND_COLOUR,
    COLOURS,
    DOTTED,
    MARKERS,
    OPTIMIZERS,
    STYLE,
    band_handle,
    integer_ticks,
    legend,
    named,
    save,
)
from rora_theory.runs import files, frames
from rora_theory.runs.reading import check_manifest
from sims.common import answers, cli
from sims.common.cli import fail

if TYPE_CHECKING:
    import pandas as pd

Options = TypeVar("Options")

WIDTH = 4.6
"""Width of most figures in inches, and of the widest: a phone shows their letters at 9 pixels or more."""

NARROW = 3.8
"""Width in inches of figures with long labels, which a phone then shows in a readable size."""

CLOSEST_TICKS = 1.6
"""Smallest ratio of two labelled values of G."""

RUN_FOLDERS = tyro.conf.arg(metavar="PATH [PATH ...]", help_behavior_hint="(required)")
"""Option of one or more run folders. Figures refuse an empty list, which the parser accepts."""

METHODS = {
    "base": ("no adapter", 6),
    "lora": (r"LoRA, $\alpha/r$", 0),
    "rora": (r"RoRA, $\alpha/\sqrt{r}$", 1),
    "dora": (r"DoRA, $\alpha/r$", 2),
    "dora-rora": (r"DoRA, $\alpha/\sqrt{r}$", 3),
    "quarter": (r"LoRA, $\alpha/r^{1/4}$", 4),
    "prefix": ("prefix tuning", 5),
    "series": ("series adapter", 10),
    "parallel": ("parallel adapter", 11),
    "full": ("full fine-tuning", 12),
}
"""Label of each method and named scaling rule, and its position in the palette."""
KAPPAS = {1.0: "lora", 0.5: "rora", 0.25: "quarter"}
INITS = {"kaiming_uniform": "uniform (PEFT's default)", "normal": "standard normal"}
"""Labels of distributions of A, if they differ from the name."""


def look(name: str, position: int = 0) -> tuple[str, str, str]:
    """Return the label, colour and marker of a method or a scaling rule, which are the same in every figure.

    Args:
      name: Name of a method or a rule, or an exponent kappa; ``rslora`` and 0.5 are RoRA, 1 is LoRA.
      position: Index of the line in the figure, which selects the colour of a rule without a name.
    """
    try:
        name = KAPPAS.get(float(name), name)
        unnamed = r"constant $\gamma$" if float(name) == 0 else rf"$\alpha/r^{{{name}}}$"
    except ValueError:
        unnamed = name
    name = "rora" if name == "rslora" else name
    label, index = METHODS.get(name, (unnamed, (2, 3, 5, 6)[position % 4]))
    # Markers shift by one in each round through the palette.
    return label, COLOURS[index % len(COLOURS)], MARKERS[(index + index // len(COLOURS)) % len(MARKERS)]


def panels(count: int, *, sharex: bool = False) -> tuple[Figure, list[Any]]:
    """Return a figure of ``count`` panels below each other, which a phone can show."""
    size = (WIDTH, 0.5 + 2.5 * count)
    figure, axes = plt.subplots(count, 1, figsize=size, squeeze=False, sharex=sharex)
    return figure, axes.ravel().tolist()


def read_folders(runs: Sequence[Path], name: str) -> "list[tuple[str, pd.DataFrame]]":
    """Return a label and a table of every run folder.

    The label is the model with a schedule that is not constant, or the folder where these repeat.
    """
    if not runs:
        fail("runs must be one or more run folders of sims.sweep, got none")
    configs = [read_frame(run, "sweep")[0]["config"] for run in runs]
    schedules = [config["settings"]["schedule"] for config in configs]
    labels = [
        ", ".join(MODEL_NAMES.get(model, model) for model in config["models"])
        + (f", {schedule}" if schedule != "constant" else "")
        for config, schedule in zip(configs, schedules, strict=True)
    ]
    labels = labels if len(set(labels)) == len(labels) else [run.name for run in runs]
    return list(zip(labels, (read_table(run, name) for run in runs), strict=True))


def read_table(run: Path, name: str) -> "pd.DataFrame":
    """Read a table of a run folder of sims.sweep. A missing table ends the command."""
    if not (run / name).exists():
        fail(f"{run} has no {name}. Run sims.sweep into it again with --regime.")
    return frames.read_csv(run / name)


def plain_ticks(axes: plt.Axes, gains: "pd.Series") -> None:
    """Label a logarithmic axis with the values of G that were run, without exponents."""
    values = apart(gains.round(6))
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.minorticks_off()


def apart(values: Iterable[float]) -> list[float]:
    """Return values in ascending order, without those whose label would touch the one before on a logarithmic axis."""
    chosen: list[float] = []
    for value in sorted(set(values)):
        if not chosen or value >= CLOSEST_TICKS * chosen[-1]:
            chosen.append(value)
    return chosen


def cross_out(axes: Axes, x: Any, y: Any) -> None:
    """Cross out points that are bounds only, since a best rate lies at the end of its grid."""
    axes.plot(x, y, "x", color="black", markersize=6)


RUN_FILE = "the file of a run folder"


def read_run_manifest(folder: Path, experiment: str | None = None) -> dict[str, Any]:
    """Read a run's manifest. A missing or damaged file, or another experiment, ends the command."""
    manifest = files.read_json(folder / "manifest.json", accepted=RUN_FILE)
    check_manifest(folder / "manifest.json", manifest)
    if experiment is not None and manifest.get("experiment") != experiment:
        fail(f"{folder}: must be a run of {experiment}, got a run of {manifest.get('experiment')}")
    return manifest


def read_frame(
    folder: Path, experiment: str | None = None, name: str = "results.csv"
) -> tuple[dict[str, Any], "pd.DataFrame"]:
    """Read the manifest and a table of a run folder. A missing, damaged or empty file ends the command."""
    manifest = read_run_manifest(folder, experiment)
    table = frames.read_csv(folder / name, accepted=RUN_FILE)
    if table.empty:
        fail(f"{folder}/{name}: has no rows. Choose a run with at least one finished cell.")
    return manifest, table


def check_among(option: str, value: Any, values: Iterable[Any]) -> None:
    """End the command if an option is given and the run does not have its value.

    Args:
      option: Name of the option.
      value: Value of the option; None if it is not given.
      values: Values of the run.
    """
    available = [entry if isinstance(entry, str) else f"{entry:g}" for entry in sorted(set(values))]
    text = value if isinstance(value, str | None) else f"{value:g}"
    if value is not None and text not in available:
        fail(f"{option} must be one of the run's values {', '.join(available)}, got {text}")


def seeds_of(manifest: dict[str, Any]) -> int:
    """Return the number of seeds of a run."""
    return len(manifest["config"]["seeds"])


def command(draw: Callable[[Options], Sequence[Path]], config: type[Options], description: str | None) -> None:
    """Run the command line of a figure, whose options are the fields of a dataclass with a folder ``out``."""
    cli.command(config, lambda options: main(draw, options), description)()


def main(draw: Callable[..., Sequence[Path]], *arguments: Any) -> None:
    """Draw a figure in the style of this package and print the paths of its files.

    Raises:
      InputError: If a setting that the figure reads is missing from the run's manifest, or has the wrong type.
    """
    run = getattr(arguments[0], "run", None) if arguments else None
    with plt.rc_context(STYLE), contextlib.nullcontext() if run is None else files.naming_damage(run):
        answers.print_paths(draw(*arguments))
