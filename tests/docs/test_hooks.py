"""The site has a page of all published tables."""

from pathlib import Path

import pytest

for package in ("mkdocs", "latex2mathml"):
    pytest.importorskip(package, reason="the extra docs")

import hooks  # noqa: E402

PUBLISHED = Path(__file__).parents[2] / "results" / "published"


def test_the_page_of_tables_has_those_of_every_published_run() -> None:
    page = hooks.tables_page(PUBLISHED)
    tables = list(PUBLISHED.glob("**/tables.md"))
    assert len(tables) >= 18
    for path in tables:
        assert f"\n## {path.parent.relative_to(PUBLISHED).as_posix()}\n\n{path.read_text()}" in page
