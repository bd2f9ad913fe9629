"""The gallery of published figures, made from the manifests, the code that draws them and the pages that use them.

Every published figure appears under the page that shows its run most often, or that names its command most often if
no page shows the run.
"""

import ast
import json
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ROOT / "results" / "published"
PAGES = [
    path for folder in ("results", "how-to", "explanation") for path in sorted((ROOT / "docs" / folder).glob("*.md"))
]


class Figure(NamedTuple):
    """A published figure.

    Attributes:
      path: Path of the PNG file, in the folder of the run that it shows.
      manifest: Manifest of the run.
      command: Name of the command of `rora figures` that draws it.
      caption: First paragraph of the docstring of the function that draws it.
    """

    path: Path
    manifest: dict[str, Any]
    command: str
    caption: str


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
        drawings = [drawing for pattern, *drawing in _drawings() if re.fullmatch(pattern, path.stem)]
        if not drawings:
            commands = sorted({command for _, command, _ in _drawings()})
            raise ValueError(f"No command of rora figures draws {path}; it has {', '.join(commands)}")
        published.append(Figure(path, json.loads(manifest.read_text()), *drawings[0]))
    return published


def markdown() -> str:
    """Return the gallery: a section for each page, in it each run with its data and figures."""
    # Group the figures by page, then by run.
    sections: dict[Path, dict[Path, list[Figure]]] = {}
    for figure in figures():
        sections.setdefault(_page_of(figure), {}).setdefault(figure.path.parent, []).append(figure)
    lines = [""]
    for page in (page for page in PAGES if page in sections):
        title = page.read_text().split("\n")[0].removeprefix("# ")
        lines += [f'<section class="gallery" data-question="{page.stem}" markdown>', ""]
        lines += [f"## [{title}]({page.relative_to(ROOT / 'docs').as_posix()})", ""]
        for run, run_figures in sections[page].items():
            folder = run.relative_to(PUBLISHED).as_posix()
            data = [name for name in ("results.csv", "metrics.jsonl", "manifest.json") if (run / name).exists()]
            lines += [f"### {folder}", "", ", ".join(f"[{name}](published/{folder}/{name})" for name in data), ""]
            for path, _, _, caption in run_figures:
                image = f"published/{folder}/{path.name}"
                lines += [f"[![{path.stem.replace('_', ' ')}]({image})]({image})", "", caption, ""]
            lines += _missing_record(run_figures[0].manifest)
        lines += ["</section>", ""]
    return "\n".join(lines)


def _missing_record(manifest: dict[str, Any]) -> list[str]:
    """Return a sentence with what a manifest does not record, if it records no command."""
    if manifest.get("command") or manifest["sessions"]:
        return []
    keys = {"command": "command", "versions": "packages", "revision": "git_revision", "date": "end"}
    *words, last = [word for word, key in keys.items() if key not in manifest]
    missing = f"{', '.join(words)} or {last}" if words else last
    return [f"The manifest has the settings but no {missing}.", ""]


@cache
def _drawings() -> list[tuple[str, str, str]]:
    """Return each call that saves a figure: a regular expression of its names, the command and the caption."""
    drawings = []
    for path in sorted((ROOT / "figures").glob("*.py")):
        tree = ast.parse(path.read_text())
        functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        for function in functions.values():
            for call in ast.walk(function):
                if not (isinstance(call, ast.Call) and ast.unparse(call.func) == "style.save"):
                    continue
                # The caption comes from the function whose result is saved, or else from the one that saves it.
                figure, _, name = call.args
                owner = functions.get(ast.unparse(figure.func), function) if isinstance(figure, ast.Call) else function
                drawings.append((_pattern(name), path.stem, _caption(ast.get_docstring(owner) or "")))
    # Whole names precede patterns.
    return sorted(drawings, key=lambda drawing: ".*" in drawing[0])


def _pattern(name: ast.expr) -> str:
    """Return a regular expression for a string or an f-string."""
    parts = name.values if isinstance(name, ast.JoinedStr) else [name]
    return "".join(re.escape(str(part.value)) if isinstance(part, ast.Constant) else ".*" for part in parts)


def _caption(docstring: str) -> str:
    """Return the first paragraph of a docstring, without its leading verb."""
    summary = " ".join(docstring.partition("\n\n")[0].split())
    return re.sub(r"^Draw (?:the )?(.)", lambda start: start[1].upper(), summary).replace("*", r"\*")


def _page_of(figure: Figure) -> Path:
    """Return the page that shows a figure's run, or names its command, most often."""
    run = figure.path.parent.relative_to(PUBLISHED).as_posix()
    for words in (rf"published/{run}\b", rf"(rora|sims)[ .]{figure.manifest['experiment']}\b"):
        counts = {page: len(re.findall(words, page.read_text())) for page in PAGES}
        page = max(PAGES, key=lambda page: counts[page])
        if counts[page]:
            return page
    raise ValueError(f"No page of the documents shows {figure.path}")
