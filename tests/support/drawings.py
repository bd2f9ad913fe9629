"""Draw figures with their layout, without writing files."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from figures import style
from support.commands import options_class


@contextlib.contextmanager
def captured() -> Iterator[dict[str, Figure]]:
    """Yield the figures drawn inside the context, by name and laid out, without drawing or writing files."""
    figures: dict[str, Figure] = {}

    def capture(figure: Figure, folder: Path, name: str) -> list[Path]:
        figure.get_layout_engine().execute(figure)
        figures[name] = figure
        return [folder / f"{name}.png", folder / f"{name}.svg"]

    with pytest.MonkeyPatch.context() as patch, plt.rc_context(style.STYLE | {"figure.max_open_warning": 0}):
        patch.setattr(style, "save", capture)
        yield figures
    for figure in figures.values():
        plt.close(figure)


def draw(module: ModuleType, folder: Path, options: dict[str, Any] | None) -> Any:
    """Call a figure's function by its name; None as options means that it reads no run."""
    draw_figure, config = getattr(module, f"draw_{module.__name__.rpartition('.')[2]}"), options_class(module)
    if options is None:
        return draw_figure(config())
    takes_several = "runs" in {field.name for field in dataclasses.fields(config)}
    return draw_figure(config(**({"runs": (folder,)} if takes_several else {"run": folder}), **options))


def words(module: ModuleType, folder: Path, **options: Any) -> dict[str, str]:
    """Draw the figures of a run, and return the text of each by its name, with line breaks as spaces."""
    with captured() as figures:
        draw(module, folder, options)
    texts = {name: [text.get_text() for text in figure.findobj(Text)] for name, figure in figures.items()}
    return {name: " ".join(" ".join(lines).split()) for name, lines in texts.items()}


def names(module: ModuleType, folder: Path) -> set[str]:
    """Draw the figures of a run, and return their names."""
    return set(words(module, folder))
