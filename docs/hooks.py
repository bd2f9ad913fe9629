"""Hooks of MkDocs: published runs as files of the site, typeset mathematics, notebooks as pages, and small images.

Sources link to files outside of `docs` by their place in the repository (`../../results/published/...`), so that the
links also work where the repository is browsed. Here they become links of the site.
"""

import base64
import io
import json
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel
from PIL import Image

from rora_theory.advice import best_rate, constants

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ROOT / "results" / "published"

SERVED_SUFFIXES = {".png", ".csv", ".jsonl"}
"""Files of a published run that the site serves, beside its manifest and its tables."""
THUMBNAIL_WIDTH = 480

CALCULATOR_CONSTANTS = "assets/constants.json"
"""File of the calculator's constants, which the package has."""

MATHJAX = ("tex-chtml.js", "output/chtml/fonts/woff-v2")
"""The script that typesets mathematics in a browser, and the folder of its fonts."""
MATHJAX_SETTINGS = """<script>
window.MathJax = {
  tex: {inlineMath: [["\\\\(", "\\\\)"]], displayMath: [["\\\\[", "\\\\]"]]},
  options: {enableMenu: false, ignoreHtmlClass: ".*|", processHtmlClass: "arithmatex"},
};
</script>"""

CELL = re.compile(r"<td>([^<]*)</td>")
UNBROKEN = re.compile(r"[-+]?[\d.,]+(?:e[-+]?\d+)?(?: ± [\d.,]+)?")
"""A number, with half its interval: a browser would break a line after the hyphen of an exponent and at ±."""
LONG_CELL = 40
"""Number of characters from which on a cell of a table gets a wide column."""
OUTSIDE_LINK = re.compile(r"(\]\()((?:\.\./)+)((?!\.\.)[^)\s]+)(?=[)\s])")


def on_files(files: Files, *, config: Any) -> Files:
    """Add the published runs, the script for mathematics, thumbnails and notebooks as pages."""
    for file in list(files):
        path = Path(file.src_uri)
        if path.suffix == ".ipynb":
            page, images = notebook_page(json.loads(file.content_string), path.stem)
            files.append(File.generated(config, path.with_suffix(".md").as_posix(), content=page))
            for name, image in images.items():
                files.append(File.generated(config, (path.parent / name).as_posix(), content=image))
    for path in sorted(PUBLISHED.rglob("*")):
        name = f"published/{path.relative_to(PUBLISHED).as_posix()}"
        if path.name == "tables.md":
            content = tables_page(path)
            files.append(File.generated(config, name, content=content, inclusion=InclusionLevel.NOT_IN_NAV))
        elif (path.suffix in SERVED_SUFFIXES or path.name == "manifest.json") and "cells" not in path.parts:
            files.append(File(name, str(PUBLISHED.parent), config.site_dir, config.use_directory_urls))
        if path.suffix == ".png":
            thumbnail = f"thumbnails/{path.relative_to(PUBLISHED).with_suffix('.webp').as_posix()}"
            files.append(File.generated(config, thumbnail, content=thumbnail_of(path)))
    files.append(File.generated(config, CALCULATOR_CONSTANTS, content=json.dumps(calculator_constants())))
    mathjax = Path(str(resources.files("mathjax"))) / "static" / "mathjax" / "es5"
    for script in (mathjax / name for name in MATHJAX):
        for path in [script] if script.is_file() else sorted(script.iterdir()):
            name = f"assets/mathjax/{path.relative_to(mathjax).as_posix()}"
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def calculator_constants() -> dict[str, Any]:
    """Return the constants of the advice that the calculator uses: value and spread by name."""

    def pairs(named: Mapping[str, constants.Constant]) -> dict[str, list[float]]:
        return {name: [constant.value, constant.spread] for name, constant in named.items()}

    return {
        "laws": pairs(constants.CONSTANTS),
        "schedules": pairs(constants.SCHEDULE_FACTORS),
        "quantile": best_rate.QUANTILE,
        "evidence": {name: dict(entry) for name, entry in constants.EVIDENCE.items()},
    }


def tables_page(path: Path) -> str:
    """Return the tables of a published run as a page that the site's search leaves out."""
    run = path.parent.relative_to(PUBLISHED).as_posix()
    text = re.sub(r"^#", "##", path.read_text(), flags=re.MULTILINE)
    return f"---\nsearch: {{exclude: true}}\n---\n# Tables of the run {run}\n\n{text}"


def thumbnail_of(path: Path) -> bytes:
    """Return an image in at most `THUMBNAIL_WIDTH` pixels of width, as WebP."""
    with Image.open(path) as image:
        image.thumbnail((THUMBNAIL_WIDTH, 10 * THUMBNAIL_WIDTH))
        content = io.BytesIO()
        image.convert("RGB").save(content, "WEBP", quality=80)
    return content.getvalue()


def notebook_page(notebook: dict[str, Any], stem: str) -> tuple[str, dict[str, bytes]]:
    """Return a notebook's Markdown, and its figures by file name."""
    parts: list[str] = []
    images: dict[str, bytes] = {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"]).strip()
        if cell["cell_type"] != "code":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            if output["output_type"] == "stream":
                parts.append(f"```text\n{''.join(output['text']).rstrip()}\n```")
            else:
                name = f"{stem}-{len(images) + 1}.png"
                images[name] = base64.b64decode(output["data"]["image/png"])
                parts.append(f"![Figure {len(images)}]({name})")
    # The download follows the title and its first paragraph.
    parts[0] += f"\n\nThis page is a [notebook]({stem}.ipynb), which you can download."
    return "\n\n".join(parts) + "\n", images


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Describe a page by its first paragraph, and turn links to the repository into links of the site."""
    page.meta.setdefault("description", describe(markdown) or config.site_description)
    return link_to_site(markdown, page.file.src_uri, config.repo_url)


def describe(markdown: str) -> str:
    """Return the first paragraph after a page's title as plain text."""
    body = re.sub(r"<!--.*?-->", "", markdown.partition("\n# ")[2] if markdown.startswith("---") else markdown)
    paragraphs = [" ".join(part.split()) for part in body.split("\n\n")[1:]]
    first = next((part for part in paragraphs if re.match(r"[\w*\"]", part)), "")
    return re.sub(r"[*`]|\[([^]]*)\]\([^)]*\)", r"\1", first)


def link_to_site(markdown: str, source: str, repo_url: str) -> str:
    """Replace the links of a page that leave `docs`.

    Args:
      markdown: Text of the page.
      source: Path of the page below `docs`.
      repo_url: Address of the repository, for files that the site does not serve.
    """
    depth = len(PurePosixPath(source).parts) - 1

    def replacement(link: re.Match[str]) -> str:
        opening, up, path = link.groups()
        if path.endswith(".ipynb") and up.count("../") <= depth:
            return f"{opening}{up}{path.removesuffix('.ipynb')}.md"
        if up.count("../") != depth + 1:
            return link[0]
        if path.startswith("results/published/"):
            return f"{opening}{'../' * depth}{path.removeprefix('results/')}"
        return f"{opening}{repo_url.rstrip('/')}/blob/main/{path}"

    return OUTSIDE_LINK.sub(replacement, markdown)


def on_page_content(html: str, *, page: Any, **_: Any) -> str:
    """Load images when they are scrolled to, and show thumbnails in the gallery."""
    html = html.replace("<img ", '<img loading="lazy" ')
    html = CELL.sub(_cell, html)
    if page.file.src_uri == "gallery.md":
        html = re.sub(r'(<img [^>]*src="[./]*)published/([^"]*)\.png"', r'\1thumbnails/\2.webp"', html)
    return html


def _cell(cell: re.Match[str]) -> str:
    """Keep the numbers of a cell on one line, and give a sentence a wide column."""
    text = UNBROKEN.sub(
        lambda number: f'<span class="number">{number[0]}</span>' if len(number[0]) > 4 else number[0], cell[1]
    )
    return f'<td class="long">{text}</td>' if len(cell[1]) > LONG_CELL else f"<td>{text}</td>"


def on_post_page(output: str, *, page: Any, **_: Any) -> str:
    """Load the script for mathematics on pages that have some, and keep the theme from asking the code host."""
    output = output.replace(' data-md-component="source"', "")
    if 'class="arithmatex"' not in output:
        return output
    up = "../" * page.url.count("/")
    script = f'{MATHJAX_SETTINGS}\n<script async src="{up}assets/mathjax/{MATHJAX[0]}"></script>'
    return output.replace("</body>", f"{script}\n</body>")
