"""The gallery of published figures, made from the manifests, the code that draws them and the pages that use them.

Every published figure appears under the page that shows its run most often, or that names its command most often if
no page shows the run. The commands of a run and the options that draw its figures again are in its manifest.
"""

import ast
import dataclasses
import json
import re
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

from sims import __main__ as main

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ROOT / "results" / "published"
command_names = cache(main.describe_commands)
PAGES = [
    path for folder in ("results", "how-to", "explanation") for path in sorted((ROOT / "docs" / folder).glob("*.md"))
]


class Drawing(NamedTuple):
    """Command and caption of a figure.

    Attributes:
      command: Name of the command of `rora figures`.
      caption: Docstring of the function that draws.
    """

    command: str
    caption: str


@dataclasses.dataclass(frozen=True)
class Figure:
    """A published figure.

    Attributes:
      path: Path of the PNG file.
      manifest: Manifest of the run that the figure shows.
      drawing: Command and caption of the figure.
    """

    path: Path
    manifest: dict[str, Any]
    drawing: Drawing

    @property
    def run(self) -> Path:
        """Folder of the run."""
        return self.path.parent

    @cached_property
    def experiment(self) -> str:
        """Name of the command that made the run."""
        experiment = self.manifest["experiment"]
        return max((name for name in command_names("sims") if experiment.startswith(name)), key=len)

    @property
    def redraw_options(self) -> list[str]:
        """Options of the command that drew the figure, as recorded in the manifest."""
        return list(self.manifest.get("figures", {}).get(self.path.stem, []))

    @cached_property
    def commands(self) -> list[list[str]]:
        """Distinct command lines that made the run, without its folder."""
        command = self.manifest.get("command")
        recorded = [command] if command else [session["command"] for session in self.manifest["sessions"]]
        lines = [["rora", self.experiment, *_without_folder(words)] for words in recorded]
        return [line for i, line in enumerate(lines) if line not in lines[:i]]


def figures() -> list[Figure]:
    """Return every published figure.

    Raises:
      ValueError: If a figure has no manifest beside it, or no command of `rora figures` draws it.
    """
    published = []
    for path in sorted(PUBLISHED.glob("**/*.png")):
        manifest = path.parent / "manifest.json"
        if not manifest.exists():
            raise ValueError(f"{path} has no manifest.json beside it")
        drawings = [drawing for pattern, drawing in _drawings() if pattern.fullmatch(path.stem)]
        if not drawings:
            raise ValueError(f"No command of rora figures draws {path}; it has {', '.join(command_names('figures'))}")
        published.append(Figure(path, json.loads(manifest.read_text()), drawings[0]))
    return published


def markdown() -> str:
    """Return the gallery: a section for each page, in it each run with its data and figures."""
    # Group the figures by page, then by run.
    sections: dict[Path, dict[Path, list[Figure]]] = {}
    for figure in figures():
        sections.setdefault(_page_of(figure), {}).setdefault(figure.run, []).append(figure)
    pages = [page for page in PAGES if page in sections]
    lines = [""]
    for page in pages:
        link = page.relative_to(ROOT / "docs").as_posix()
        lines += [f'<section class="gallery" data-question="{page.stem}" markdown>', ""]
        lines += [f"## [{_title(page)}]({link})", ""]
        stated_captions: set[str] = set()
        for run, run_figures in sections[page].items():
            lines += [f"### {run.relative_to(PUBLISHED).as_posix()}", "", _data_links(run), ""]
            for figure in run_figures:
                # State a caption once in a section.
                caption = figure.drawing.caption
                lines += _image(figure, "As above." if caption in stated_captions else caption)
                stated_captions.add(caption)
            lines += _missing_record(run_figures[0])
        lines += ["</section>", ""]
    return "\n".join(lines)


def _data_links(run: Path) -> str:
    """Return links to the data of a run."""
    folder = f"published/{run.relative_to(PUBLISHED).as_posix()}"
    names = [name for name in ("results.csv", "metrics.jsonl", "manifest.json") if (run / name).exists()]
    return ", ".join(f"[{name}]({folder}/{name})" for name in names)


def _missing_record(figure: Figure) -> list[str]:
    """Return a sentence with what the manifest of a figure's run does not record, if it records no command."""
    if figure.commands:
        return []
    keys = {"command": "command", "versions": "packages", "revision": "git_revision", "date": "end"}
    missing = [word for word, key in keys.items() if key not in figure.manifest]
    return [f"The manifest of this run records its settings, but not: {', '.join(missing)}.", ""]


def _image(figure: Figure, caption: str) -> list[str]:
    """Return a figure that opens its file, and its caption."""
    image = f"published/{figure.path.relative_to(PUBLISHED).as_posix()}"
    alt = figure.path.stem.replace("_", " ")
    return [f"[![{alt}]({image})]({image})", "", caption, ""]


@cache
def _drawings() -> list[tuple[re.Pattern[str], Drawing]]:
    """Return a pattern of figure names for each call that saves one, with its drawing; full names before patterns."""
    drawings = []
    for command in command_names("figures"):
        tree = ast.parse((ROOT / "figures" / f"{command}.py").read_text())
        functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        for function in functions.values():
            for call in ast.walk(function):
                if not (isinstance(call, ast.Call) and ast.unparse(call.func) == "style.save"):
                    continue
                # The caption comes from the function whose result is saved, or else from the one that saves it.
                figure = call.args[0]
                owner = functions.get(ast.unparse(figure.func), function) if isinstance(figure, ast.Call) else function
                caption = _caption(ast.get_docstring(owner))
                drawings.append((re.compile(_pattern(call.args[2])), Drawing(command, caption)))
    return sorted(drawings, key=lambda pair: ".*" in pair[0].pattern)


def _pattern(name: ast.expr) -> str:
    """Return a regular expression for a string or an f-string."""
    parts = name.values if isinstance(name, ast.JoinedStr) else [name]
    return "".join(re.escape(part.value) if isinstance(part, ast.Constant) else ".*" for part in parts)


def _caption(docstring: str | None) -> str:
    """Return a docstring in one paragraph, without its leading verb."""
    text = " ".join((docstring or "").split())
    return re.sub(r"^Draw (?:the )?(.)", lambda start: start[1].upper(), text).replace("*", r"\*")


def _page_of(figure: Figure) -> Path:
    """Return the page that shows a figure's run, or names its command, most often."""
    run = figure.run.relative_to(PUBLISHED).as_posix()
    for words in (rf"published/{run}\b", rf"(rora|sims)[ .]{figure.experiment}\b"):
        counts = {page: len(re.findall(words, page.read_text())) for page in PAGES}
        page = max(PAGES, key=lambda page: counts[page])
        if counts[page]:
            return page
    raise ValueError(f"No page of the documents shows {figure.path}")


def _title(page: Path) -> str:
    return page.read_text().split("\n")[0].removeprefix("# ")


def _without_folder(words: Sequence[str]) -> list[str]:
    """Return a recorded command line without ``--out`` and its value."""
    return [word for previous, word in zip(("", *words), words, strict=False) if "--out" not in (previous, word)]
