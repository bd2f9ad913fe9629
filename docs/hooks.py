"""Hooks of MkDocs: the mathematics of docstrings as MathML, notebooks as pages, and a page of all published tables.

Browsers draw MathML without a script. A notebook becomes a page of its cells and saved outputs, and is not executed;
mkdocs-jupyter does the same with some forty packages and a script from another server.
"""

import base64
import html
import json
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

INLINE = re.compile(r":math:<code>(.*?)</code>", re.DOTALL)
BLOCK = re.compile(
    r"<p>\.\. math::\s*(.*?)</p>(?:\s*<div class=\"[^\"]*highlight[^\"]*\"><pre>(.*?)</pre></div>)?", re.DOTALL
)
TAG = re.compile(r"<[^>]+>")


def on_files(files: Files, *, config: Any) -> Files:
    """MkDocs' hook: add a page of all published tables, and one with its figures for each notebook.

    The notebook itself is copied for download.
    """
    files.append(File.generated(config, "tables.md", content=tables_page(Path(config.docs_dir) / "published")))
    for file in list(files):
        path = Path(file.src_uri)
        if path.suffix == ".ipynb":
            page, images = notebook_page(json.loads(file.content_string), path.stem)
            files.append(File.generated(config, path.with_suffix(".md").as_posix(), content=page))
            for name, content in images.items():
                files.append(File.generated(config, (path.parent / name).as_posix(), content=content))
    return files


def tables_page(published: Path) -> str:
    """Return a page with the tables of each published run, which the site's search leaves out."""
    sections = [
        f"## {path.parent.relative_to(published).as_posix()}\n\n{path.read_text()}"
        for path in sorted(published.glob("**/tables.md"))
    ]
    heading = "---\nsearch: {exclude: true}\n---\n# Tables of all runs"
    sentence = "A command prints these tables and writes them to its run's `tables.md`."
    return "\n\n".join([heading, sentence, *sections])


def notebook_page(notebook: dict[str, Any], stem: str) -> tuple[str, dict[str, bytes]]:
    """Return a notebook's Markdown, and its figures by file name."""
    parts, images = [], {}
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


def on_page_content(content: str, **_: Any) -> str:
    """Replace the LaTeX in a page's HTML by MathML; MkDocs calls this hook for each page."""
    content = BLOCK.sub(lambda match: _mathml(match[1] + " " + (match[2] or ""), "block"), content)
    return INLINE.sub(lambda match: _mathml(match[1], "inline"), content)


def _mathml(markup: str, display: str) -> str:
    latex = " ".join(html.unescape(TAG.sub("", markup)).split())
    if display == "block" and "&" in latex:
        latex = r"\begin{aligned}" + latex + r"\end{aligned}"
    mathml = convert(latex, display=display)
    return f'<div class="math">{mathml}</div>' if display == "block" else mathml
