"""Extension of griffe: the mathematics of docstrings, reStructuredText's `math`, in the delimiters of the pages.

It runs before Markdown, which would otherwise take underscores for emphasis and shorten double backslashes.
"""

import re
from typing import Any

import griffe

INLINE = re.compile(r":math:`([^`]*)`")
BLOCK = re.compile(
    r"^(?P<indent> *)\.\. math::(?P<first>[^\n]*)(?P<more>(?:\n(?P=indent) +\S[^\n]*|\n *(?=\n(?P=indent) {2,}\S))*)",
    re.M,
)


class DocstringMath(griffe.Extension):
    """Rewrite the docstring of every object."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = with_delimiters(obj.docstring.value)


def with_delimiters(text: str) -> str:
    r"""Replace `:math:` roles by `\(...\)` and `math` directives by `\[...\]`."""
    text = BLOCK.sub(_block, text)
    return INLINE.sub(lambda role: rf"\({' '.join(role[1].split())}\)", text)


def _block(directive: re.Match[str]) -> str:
    latex = " ".join((directive["first"] + directive["more"]).split())
    latex = rf"\begin{{aligned}} {latex} \end{{aligned}}" if "&" in latex else latex
    return rf"{directive['indent']}\[{latex}\]"
