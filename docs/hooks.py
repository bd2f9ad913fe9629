"""The mathematics of docstrings, ``:math:`` and ``.. math::``, as MathML, which browsers draw without a script."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

INLINE = re.compile(r":math:<code>(.*?)</code>", re.DOTALL)
BLOCK = re.compile(
    r"<p>\.\. math::\s*(.*?)</p>(?:\s*<div class=\"[^\"]*highlight[^\"]*\"><pre>(.*?)</pre></div>)?", re.DOTALL
)
TAG = re.compile(r"<[^>]+>")


def on_page_content(content: str, **_: Any) -> str:
    """MkDocs' hook: called with each page's HTML."""
    content = BLOCK.sub(lambda found: _mathml(found[1] + " " + (found[2] or ""), "block"), content)
    return INLINE.sub(lambda found: _mathml(found[1], "inline"), content)


def _mathml(markup: str, display: str) -> str:
    latex = " ".join(html.unescape(TAG.sub("", markup)).split())
    if display == "block" and "&" in latex:
        latex = r"\begin{aligned}" + latex + r"\end{aligned}"
    mathml = convert(latex, display=display)
    return f'<div class="math">{mathml}</div>' if display == "block" else mathml
