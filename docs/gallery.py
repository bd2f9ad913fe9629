"""The gallery of published figures and the list of published runs, made from the manifests, the code and the pages.

Every published figure appears under the page that shows its run most often, or that names its command most often if
no page shows the run.
"""

import ast
import json
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from rora_theory.defaults import MODEL_NAMES

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ROOT / "results" / "published"
REPOSITORY_PATH = "../results/published"
"""The published runs as the pages of `docs` link to them."""
NAMES = MODEL_NAMES | {
    "pretrain_small/model": "ours, 1.0M weights",
    "SMALL/model": "ours, 1.0M weights",
    "small_checkpoint_5500/model": "ours, 1.0M weights, after 5,500 of 8,000 steps",
    "pretrain_medium/model": "ours, 2.9M weights",
    "MEDIUM/model": "ours, 2.9M weights",
}
"""Names of models in words; our own are folders below that of the runs."""
TITLES = {
    "accuracy": "Accuracies after 64 steps",
    "accuracy_pruned": "Accuracies after 64 steps, model pruned to half",
    "coordinate_check": "Coordinate check",
    "evidence": "Public runs",
    "horizon": "Constant rate, 16 to 256 steps",
    "horizon_gemma": "Constant rate in Gemma 3 270M",
    "lr_transfer": "Controlled problem",
    "medium_model": "Second small model over G",
    "small_more": "Small model at other ranks",
    "lr_transfer_smollm2": "Best rates of a language model",
    "rank_sweep": "Ranks and rates, 32 steps",
    "rank_sweep_pruned": "Ranks and rates, 32 steps, model pruned to half",
    "real_layers": "Nine modules with drawn adapters",
    "small_models": "A small model, five seeds",
    "regime": "Crossing ranks, all tokens",
    "regime_gemma": "Crossing ranks in Gemma 3 270M",
    "regime_held_out": "Crossing ranks, held-out tokens",
    "training_dynamics": "Teacher and student",
    "variance_sweep": "First step, simulated",
}
"""Titles of the runs that have figures, by folder."""
SIMULATIONS = {"variance_sweep", "training_dynamics", "lr_transfer"}
PAGES = [path for folder in ("results", "how-to", "explanation") for path in sorted(ROOT.glob(f"docs/{folder}/*.md"))]


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
      FileNotFoundError: If a figure has no manifest beside it.
      ValueError: If no command of `rora figures` draws it.
    """
    published = []
    for path in sorted(PUBLISHED.glob("**/*.png")):
        # A figure over several seeds lies above their run folders, which differ in the seed alone.
        run = next(iter(sorted(path.parent.glob("seed_*"))), path.parent)
        manifest = json.loads((run / "manifest.json").read_text())
        drawings = [drawing for pattern, *drawing in _drawings() if re.fullmatch(pattern, path.stem)]
        if not drawings:
            commands = sorted({command for _, command, _ in _drawings()})
            raise ValueError(f"No command of rora figures draws {path}; it has {', '.join(commands)}")
        published.append(Figure(path, manifest, *drawings[0]))
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
        heading = f"## [{title}]({page.relative_to(ROOT / 'docs').as_posix()})"
        lines += [f'<section class="gallery" data-question="{page.stem}" markdown>', "", heading, ""]
        for run, run_figures in sections[page].items():
            folder = run.relative_to(PUBLISHED).as_posix()
            lines += [f"### {TITLES.get(folder, folder)}", ""]
            lines += [f"{describe(run_figures[0].manifest)} {_links(run)}.", ""]
            for path, _, _, caption in run_figures:
                image = f"{REPOSITORY_PATH}/{folder}/{path.name}"
                # A page that shows the figure says what is seen in it.
                alternative = _alternative_texts().get(f"{folder}/{path.name}", caption.rstrip("."))
                lines += [f"[![{alternative}]({image})]({image})", "", caption, ""]
        lines += ["</section>", ""]
    return "\n".join(lines)


def runs_markdown() -> str:
    """Return a table of every published run: experiment, model, files, and the page of its tables."""
    lines = ["", "| folder | command | model | files |", "|---|---|---|---|"]
    for path in sorted(PUBLISHED.rglob("manifest.json")):
        manifest = json.loads(path.read_text())
        run = path.parent.relative_to(PUBLISHED).as_posix()
        lines.append(f"| `{run}` | `rora {manifest['experiment']}` | {model_of(manifest)} | {_links(path.parent)} |")
    return "\n".join([*lines, ""])


def describe(manifest: dict[str, Any]) -> str:
    """Return a sentence on a run: its model and its command."""
    return f"{model_of(manifest)}, `rora {manifest['experiment']}`:"


def model_of(manifest: dict[str, Any]) -> str:
    """Return the name of a run's model in words."""
    if manifest["experiment"] in SIMULATIONS and "matrix" not in manifest["config"]:
        return "simulation"
    if manifest["experiment"] == "pretrain":
        return f"ours, {manifest['parameters'] / 1e6:.1f}M weights"
    if manifest["experiment"] == "evidence":
        return "public models"
    models = [manifest["config"].get("model"), *manifest["config"].get("models", [])]
    return next((NAMES[model] for model in models if model in NAMES), NAMES["smollm2-135m"])


def _links(run: Path) -> str:
    names = ("tables.md", "results.csv", "metrics.jsonl", "manifest.json")
    paths = [run / name for name in names if (run / name).exists()]
    # An analysis over several seeds lies above their run folders.
    paths = paths or [*sorted(run.glob("*.csv")), *sorted(run.glob("seed_*/manifest.json"))]
    links = []
    for path in paths:
        text = path.stem if path.parent == run else f"{path.stem} of {path.parent.name.replace('_', ' ')}"
        links.append(f"[{text}]({REPOSITORY_PATH}/{path.relative_to(PUBLISHED).as_posix()})")
    return ", ".join(links)


@cache
def _alternative_texts() -> dict[str, str]:
    """Return the alternative texts of the figures that a page shows, by their paths below `results/published`."""
    texts = {}
    for page in [ROOT / "README.md", *PAGES]:
        for text, path in re.findall(r"!\[([^]]+)\]\([./]*results/published/([^)]+)\)", page.read_text()):
            texts[path] = " ".join(text.split())
    return texts


@cache
def _drawings() -> list[tuple[str, str, str]]:
    """Return each call that saves a figure: a regular expression of its names, the command and the caption."""
    drawings = []
    for path in sorted((ROOT / "figures").glob("*.py")):
        tree = ast.parse(path.read_text())
        functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        calls = [
            (node, owner) for owner in functions.values() for node in ast.walk(owner) if isinstance(node, ast.Call)
        ]
        for call, owner in calls:
            if ast.unparse(call.func) == "style.save":
                figure, _, name = call.args
                # The caption comes from the function whose result is saved, or else from the one that saves it.
                drawing = functions.get(ast.unparse(figure).partition("(")[0], owner)
                # The values in an f-string may be anything.
                pattern = re.sub(r"\{[^}]*\}", ".*", ast.unparse(name).strip("f'"))
                drawings.append((pattern, path.stem, _caption(ast.get_docstring(drawing) or "")))
    # Whole names precede patterns.
    return sorted(drawings, key=lambda drawing: ".*" in drawing[0])


def _caption(docstring: str) -> str:
    """Return the first paragraph of a docstring, without its leading verb."""
    summary = " ".join(docstring.partition("\n\n")[0].split())
    return re.sub(r"^Draw (?:the )?(.)", lambda start: start[1].upper(), summary).replace("*", r"\*")


def _page_of(figure: Figure) -> Path:
    """Return the page that shows a figure's run, has its numbers, or names its command, most often."""
    run = figure.path.parent.relative_to(PUBLISHED).as_posix()
    command = rf"(rora|sims)[ .]{figure.manifest['experiment']}\b"
    for words in (rf"published/{run}\b", rf"<!-- (n|table) {run}/", command):
        counts = {page: len(re.findall(words, page.read_text())) for page in PAGES}
        page = max(PAGES, key=lambda page: counts[page])
        if counts[page]:
            return page
    raise ValueError(f"No page of the documents shows {figure.path}")
