"""Links of the pages work where the repository is browsed: they name files in it, and pass through no symbolic link."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def headings(path: Path) -> set[str]:
    """Return the anchors of a page's headings, and those set in HTML."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    names = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", name) for name in names]
    anchors = [re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", name.lower()).strip()) for name in plain]
    return {*anchors, *re.findall(r'id="([^"]+)"', text)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_name_files_of_the_repository(page) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name) if name else page
        assert path.exists(), target
        steps = [part for part in [path, *path.parents] if ROOT in part.absolute().parents]
        assert not any(part.is_symlink() for part in steps), f"{target} passes through a symbolic link"
        if anchor and path.suffix == ".md":
            assert anchor in headings(path), target
