"""The gallery of published figures, from their folders' manifests, the code that draws them and pages that use them.

Nothing is listed by hand: a figure that is published is in the gallery, under the page of the documents that shows
its run (or, where none does, speaks of its command) most often.
"""

import ast
import dataclasses
import html
import importlib
import itertools
import json
import re
import shlex
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

from sims import __main__ as main
from sims.common import options

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ROOT / "results" / "published"
names = cache(main.names)
PAGES = [path for room in ("results", "how-to", "explanation") for path in sorted((ROOT / "docs" / room).glob("*.md"))]


BEFORE = {"regime": {"mask": "--no-mask"}}
"""Settings that came later, and the option of today that does what a run did whose manifest does not have them."""


class Drawing(NamedTuple):
    """Where a figure comes from.

    Attributes:
      command: of ``rora figures``.
      caption: what the command and the function that draws say of it.
    """

    command: str
    caption: str


@dataclasses.dataclass(frozen=True)
class Figure:
    """A published figure: its PNG, the run's manifest, and what draws it."""

    path: Path
    manifest: dict[str, Any]
    drawing: Drawing

    @property
    def run(self) -> Path:
        return self.path.parent

    @cached_property
    def experiment(self) -> str:
        """The command of the run: the one whose name begins the experiment's."""
        return max((name for name in names("sims") if self.manifest["experiment"].startswith(name)), key=len)

    @property
    def redraw(self) -> list[str]:
        """The command line that draws it again, with the options that the manifest's ``figures`` keeps of it."""
        fields = {field.name for field in dataclasses.fields(_config("figures", self.drawing.command))}
        place = self.run.relative_to(ROOT).as_posix()
        words = [place] if fields & {"run", "runs"} else ["--out", place]
        return [
            "rora",
            "figures",
            self.drawing.command,
            *words,
            *self.manifest.get("figures", {}).get(self.path.stem, []),
        ]

    @cached_property
    def commands(self) -> list[list[str]]:
        """The command lines of the run, in today's options."""
        given = self.manifest.get("command")
        every = [given] if given else [part["command"] for part in self.manifest.get("runs", [])]
        config, came = self.manifest.get("config", {}), BEFORE.get(self.experiment, {})
        later = [option for setting, option in came.items() if setting not in config]
        found = [["rora", self.experiment, *_todays(self.experiment, words), *later] for words in every]
        return [words for i, words in enumerate(found) if words not in found[:i]]


def figures() -> list[Figure]:
    """Every published figure.

    Raises:
      ValueError: one without a manifest beside it, or that no command of ``rora figures`` draws.
    """
    found = []
    for path in sorted(PUBLISHED.glob("**/*.png")):
        manifest = path.parent / "manifest.json"
        if not manifest.exists():
            raise ValueError(f"{path}: has no manifest.json beside it; accepted are figures of a run")
        drawn = [each for pattern, each in _drawings() if pattern.fullmatch(path.stem)]
        if not drawn:
            raise ValueError(f"{path}: no command of rora figures draws it; accepted are {', '.join(names('figures'))}")
        found.append(Figure(path, json.loads(manifest.read_text()), drawn[0]))
    return found


def markdown() -> str:
    """The gallery: a part a page of the documents, in it the runs, and of a run its commands and figures."""
    parts: dict[Path, dict[Path, list[Figure]]] = {}
    for figure in figures():
        parts.setdefault(_page_of(figure), {}).setdefault(figure.run, []).append(figure)
    pages = [page for page in PAGES if page in parts]
    lines = ["", '<p class="gallery-filter"><label>Show the figures of <select id="gallery-filter">']
    lines += ['<option value="">all questions</option>']
    lines += [f'<option value="{page.stem}">{html.escape(_title(page))}</option>' for page in pages]
    lines += ["</select></label></p>", ""]
    for page in pages:
        link = page.relative_to(ROOT / "docs").as_posix()
        lines += [f'<section class="gallery" data-question="{page.stem}" markdown>', ""]
        lines += [f"## {_title(page)}", "", f"{_lead(page)} [Read on]({link}).", ""]
        for run, own in parts[page].items():
            lines += [f"### {run.relative_to(PUBLISHED).as_posix()}", "", *_run(own[0])]
            for figure in own:
                lines += _shown(figure)
            drawn = dict.fromkeys(shlex.join(figure.redraw) for figure in own)
            lines += ["Drawn by", "", "```", *drawn, "```", ""]
        lines += ["</section>", ""]
    return "\n".join(lines)


def _run(figure: Figure) -> list[str]:
    """Of a run its data and its commands."""
    place = f"published/{figure.run.relative_to(PUBLISHED).as_posix()}"
    data = [name for name in ("results.csv", "metrics.jsonl", "manifest.json") if (figure.run / name).exists()]
    lines = [f"Data: {', '.join(f'[{name}]({place}/{name})' for name in data)}.", ""]
    block = ["```", *map(shlex.join, figure.commands), "```", ""]
    if len(figure.commands) > 1:
        summary = f"The run: {len(figure.commands)} commands into one folder"
        return [*lines, f"<details markdown><summary>{summary}</summary>", "", *block, "</details>", ""]
    kept = {"command": "command", "versions": "packages", "revision": "git_revision", "date": "end"}
    lost = [word for word, key in kept.items() if key not in figure.manifest]
    alone = f"The manifest has the settings alone; not kept: {', '.join(lost)}."
    return [*lines, *(block if figure.commands else [alone, ""])]


def _shown(figure: Figure) -> list[str]:
    image = f"published/{figure.path.relative_to(PUBLISHED).as_posix()}"
    alt = f"{figure.path.stem} of {figure.run.name}".replace("_", " ")
    return [f"[![{alt}]({image})]({image})", "", figure.drawing.caption, ""]


@cache
def _drawings() -> list[tuple[re.Pattern[str], Drawing]]:
    """What each name of a saved figure is drawn by; names in full before patterns."""
    found = []
    for command in names("figures"):
        tree = ast.parse((ROOT / "figures" / f"{command}.py").read_text())
        functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        for function in functions.values():
            for call in ast.walk(function):
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "style.save":
                    drawn = call.args[0]
                    owner = (
                        functions.get(ast.unparse(drawn.func), function) if isinstance(drawn, ast.Call) else function
                    )
                    caption = " ".join(map(_sentence, (ast.get_docstring(tree), ast.get_docstring(owner))))
                    found.append((re.compile(_pattern(call.args[2])), Drawing(command, caption)))
    return sorted(found, key=lambda pair: ".*" in pair[0].pattern)


def _pattern(name: ast.expr) -> str:
    parts = name.values if isinstance(name, ast.JoinedStr) else [name]
    return "".join(re.escape(part.value) if isinstance(part, ast.Constant) else ".*" for part in parts)


def _sentence(text: str | None) -> str:
    """The first paragraph, as a sentence."""
    found = " ".join((text or "").split("\n\n")[0].split()).rstrip(":")
    return (found if found.endswith(".") else f"{found}.").replace("*", r"\*")


def _page_of(figure: Figure) -> Path:
    run = figure.run.relative_to(PUBLISHED).as_posix()
    for words in (rf"published/{run}\b", rf"(rora|sims)[ .]{figure.experiment}\b"):
        often = {page: len(re.findall(words, page.read_text())) for page in PAGES}
        page = max(PAGES, key=lambda each: often[each])
        if often[page]:
            return page
    raise ValueError(f"{figure.path}: no page of the documents speaks of it")


def _title(page: Path) -> str:
    return page.read_text().split("\n")[0].removeprefix("# ")


def _lead(page: Path) -> str:
    """The page's first paragraph that is no block of code, or what it says in bold there; without links, which are from
    where the page is."""
    paragraphs = re.sub("<!--.*?-->|^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE).split("\n\n")
    text = next(" ".join(each.split()) for each in paragraphs[1:] if each.strip())
    bold = re.match(r"\*\*.+?\*\*", text)
    return re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", bold[0] if bold else text)


def _config(package: str, name: str) -> Any:
    return importlib.import_module(f"{package}.{name}").Config


def _todays(experiment: str, words: Sequence[str]) -> list[str]:
    """A kept command line without its folder: spellings of earlier versions as the command has them now, and without
    options that it has no more."""
    known = options.of(_config("sims", experiment))
    found: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        option = word.removeprefix("--")
        if word == "--out":
            rest.pop(0)
            continue
        if word.startswith("--") and option not in known:
            option = next((new for new in options.RENAMED.get(option, ()) if new in known), "")
        if not option:
            rest = list(itertools.dropwhile(lambda each: not each.startswith("--"), rest))
            continue
        if known.get(option) is bool and rest[:1] in (["True"], ["False"]):
            option = option if rest.pop(0) == "True" else f"no-{option}"
        found.append(f"--{option}" if word.startswith("--") else word)
    return found
