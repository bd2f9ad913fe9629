"""How figures look and where they go: colour-blind safe, print size, PNG and SVG."""

import contextlib
import io
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from rora_theory.errors import InputError
from rora_theory.io import files, frames
from rora_theory.measure.plots import (  # noqa: F401 (figures take them from here)
    BAND_COLOUR,
    COLOURS,
    MARKERS,
    OPTIMIZERS,
    STYLE,
    band_handle,
    legend,
    named,
    whole_ticks,
)
from rora_theory.runs import seals
from rora_theory.runs.reading import check_manifest
from sims.common import answers, cli
from sims.common.cli import fail

if TYPE_CHECKING:
    import pandas as pd

Config = TypeVar("Config")

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
"""Label, and place in the palette, of every method and every scaling rule that has a name."""
KAPPAS = {1.0: "lora", 0.5: "rora", 0.25: "quarter"}


def look(name: str, position: int = 0) -> tuple[str, str, str]:
    """Label, colour and marker of a method or a scaling rule: the same in every figure.

    Args:
      name: of a method, of a rule, or an exponent kappa; ``rslora`` and 0.5 are RoRA, 1 is LoRA.
      position: which of the figure's lines it is, for the colour of one that has no name.
    """
    try:
        name = KAPPAS.get(float(name), name)
        unnamed = r"constant $\gamma$" if float(name) == 0 else rf"$\alpha/r^{{{name}}}$"
    except ValueError:
        unnamed = name
    name = "rora" if name == "rslora" else name
    label, index = METHODS.get(name, (unnamed, (2, 3, 5, 6)[position % 4]))
    # From the palette's second round on a colour has another marker.
    return label, COLOURS[index % len(COLOURS)], MARKERS[(index + index // len(COLOURS)) % len(MARKERS)]


def panels(count: int, *, sharex: bool = False) -> tuple[Figure, list[Any]]:
    """Return a figure of ``count`` panels: up to two in a row, more below each other, so that a phone can show them."""
    below = count > 2
    size = (4.6, 0.5 + 2.5 * count) if below else (0.6 + 3.3 * count, 3.0)
    figure, axes = plt.subplots(*((count, 1) if below else (1, count)), figsize=size, squeeze=False, sharex=sharex)
    return figure, axes.ravel().tolist()


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write ``folder/name.png`` (200 dpi) and ``.svg``, without dates, so that equal data give equal files.

    The SVG file is the same on any processor with the same version of matplotlib.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    figure.savefig(paths[0], dpi=200, metadata={"Software": None})
    figure.set_layout_engine("none")  # as laid out for the first, which takes longer than to draw
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    paths[1].write_text(_rounded(drawn.getvalue()), "utf-8")
    plt.close(figure)
    return paths


_COORDINATES = re.compile(r'\b(?:d|x|y|width|height)="[^"]*"|\b(?:translate|rotate)\([^)]*\)')
_DECIMAL = re.compile(r"-?\d+\.\d+")
_HASH = re.compile(r'(?<=["#])([a-z]+)[0-9a-f]{10}(?=[")])')


def _rounded(svg: str) -> str:
    """An SVG file with coordinates to 0.01 points, so that rounding errors of another processor do not change it.

    Names of clip paths and markers are hashes of unrounded coordinates: they are numbered instead.
    """
    svg = _COORDINATES.sub(lambda part: _DECIMAL.sub(_hundredths, part[0]), svg)
    names: dict[str, str] = {}
    return _HASH.sub(lambda name: names.setdefault(name[0], f"{name[1]}{len(names)}"), svg)


def _hundredths(number: re.Match[str]) -> str:
    return f"{round(float(number[0]), 2) + 0.0:.2f}".rstrip("0").rstrip(".")  # + 0.0: no negative zero


OF_A_RUN = "the file of a run folder"


def read_manifest(folder: Path, experiment: str | None = None) -> dict[str, Any]:
    """A run's manifest; a missing, damaged or changed file or another experiment's ends the command."""
    check_as_written(folder)
    manifest = files.read_json(folder / "manifest.json", accepted=OF_A_RUN)
    check_manifest(folder / "manifest.json", manifest)
    if experiment is not None and manifest.get("experiment") != experiment:
        fail(f"{folder}: is a run of {manifest.get('experiment')}; accepted is a run of {experiment}")
    return manifest


def read_frame(folder: Path, experiment: str | None = None) -> tuple[dict[str, Any], "pd.DataFrame"]:
    """Manifest and table of a run folder; a missing, damaged or changed one ends the command: one line, status 2."""
    manifest = read_manifest(folder, experiment)
    found = frames.read_csv(folder / "results.csv", accepted=OF_A_RUN)
    if found.empty:
        fail(f"{folder}/results.csv: has no rows; accepted is a run with at least one finished cell")
    return manifest, found


def check_among(option: str, value: Any, values: Iterable[Any]) -> None:
    """End the command where an option is given, and a run has no such value."""
    known = [one if isinstance(one, str) else f"{one:g}" for one in sorted(set(values))]
    word = value if isinstance(value, str | None) else f"{value:g}"
    if value is not None and word not in known:
        fail(f"{option} is {word}; accepted are those that are there: {', '.join(known)}")


def seeds_of(manifest: dict[str, Any]) -> int:
    """Return the number of seeds of a run."""
    return len(manifest["config"]["seeds"])


def check_as_written(folder: Path, within: str = "") -> None:
    """End the command where a file of a run, or of the folder ``within`` it, is not the one it wrote."""
    problem = seals.describe_problem(folder, within)
    if problem is not None:
        fail(f"{problem}; accepted is the file as the run wrote it, which its command makes again")


def command(draw: Callable[[Config], Sequence[Path]], config: type[Config], description: str | None) -> None:
    """A figure's command line: options from its dataclass, which has the folder ``out``."""

    def run() -> None:
        found = cli.parse(config, description=description or "")
        if (out := getattr(found, "out", None)) is not None:
            check_own(out)
        main(draw, found)

    cli.run(run)


def check_own(folder: Path) -> None:
    """Refuse to draw into a folder of others.

    Raises:
      InputError: one that is neither new or empty nor a run's, and has a file that is not one of a figure's two (.png
        and .svg) or of a table's (.md and .csv).
    """
    if not folder.exists():
        return
    manifest = folder / "manifest.json"
    if manifest.exists() and "experiment" in files.read_json(manifest, accepted="a run's manifest"):
        return
    twins = {".png": ".svg", ".svg": ".png", ".md": ".csv", ".csv": ".md"}
    for path in sorted(folder.iterdir()):
        if path.suffix not in twins or not path.with_suffix(twins[path.suffix]).exists():
            raise InputError(
                f"{folder}: holds {path.name}, which no figure wrote; accepted is a folder that is new or empty, a "
                "run's, or one of figures"
            )


def main(draw: Callable[..., Sequence[Path]], *arguments: Any) -> None:
    """Draw with this package's style and print the files' paths.

    Raises:
      InputError: If a setting that the figure reads is missing from the run's manifest, or has the wrong type.
    """
    run = getattr(arguments[0], "run", None) if arguments else None
    with plt.rc_context(STYLE), contextlib.nullcontext() if run is None else files.naming_damage(run):
        answers.list_files(draw(*arguments))
