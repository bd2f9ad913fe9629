"""Links, descriptions, tables and mathematics of the built site."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

for package in ("mkdocs", "mathjax", "PIL"):
    pytest.importorskip(package, reason="the extra docs")

import docstring_math  # noqa: E402
import hooks  # noqa: E402
from mkdocs.commands.build import build  # noqa: E402
from mkdocs.config import load_config  # noqa: E402

ROOT = Path(__file__).parents[2]
HOST = "https://host/project/"


@pytest.mark.parametrize(
    ("source", "link", "expected"),
    [
        ("a.md", "../results/published/run/x.png", "published/run/x.png"),
        ("results/a.md", "../../results/published/run/tables.md", "../published/run/tables.md"),
        ("results/a.md", "../results/published/x.png", "../results/published/x.png"),  # stays inside of docs
        ("a.md", "../CONTRIBUTING.md", "https://host/project/blob/main/CONTRIBUTING.md"),
        ("how-to/a.md", "../notebooks/three-rates.ipynb", "../notebooks/three-rates.md"),
        ("notebooks/a.md", "three-rates.ipynb", "three-rates.ipynb"),  # the download
        ("how-to/a.md", "../faq.md#x", "../faq.md#x"),
        ("a.md", "https://example.org/../x", "https://example.org/../x"),
    ],
)
def test_links_that_leave_the_documents(source, link, expected) -> None:
    assert hooks.link_to_site(f"a [b]({link}) c", source, HOST) == f"a [b]({expected}) c"


def test_a_page_is_described_by_its_first_paragraph() -> None:
    page = "# Title\n\n**Set `alpha`** to <!-- n x.csv: {y} -->3<!-- / -->\n[now](x.md).\n\nMore.\n"
    assert hooks.describe(page) == "Set alpha to 3 now."
    assert hooks.describe("# Title\n\n```\nx\n```\n") == ""


def test_the_tables_of_a_run_are_a_page_below_one_title() -> None:
    path = hooks.PUBLISHED / "horizon" / "tables.md"
    page = hooks.tables_page(path)
    assert page.startswith("---\nsearch: {exclude: true}\n---\n# Tables of the run horizon\n")
    titles = [line for line in page.splitlines() if line.startswith("# ")]
    assert len(titles) == 1
    assert [line for line in path.read_text().splitlines() if line.startswith("|")] == [
        line for line in page.splitlines() if line.startswith("|")
    ]


def test_a_table_breaks_no_number_and_gives_sentences_room() -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="a.md"))
    sentence = "the power was chosen after the runs of SmolLM2-135M"
    html = hooks.on_page_content(f"<td>0.001 ± 0.002</td><td>3.1e-04 to 5</td><td>{sentence}</td>", page=page)
    assert html == (
        '<td><span class="number">0.001 ± 0.002</span></td><td><span class="number">3.1e-04</span> to 5</td>'
        f'<td class="long">{sentence}</td>'
    )


def test_mathematics_of_docstrings() -> None:
    text = "With :math:`a_i\n b_i`:\n\n.. math:: x_1 &= 1 \\\\\n   x_2 &= 2\n\nText.\n\n  .. math:: y\n\nEnd"
    assert docstring_math.with_delimiters(text) == (
        "With \\(a_i b_i\\):\n\n\\[\\begin{aligned} x_1 &= 1 \\\\ x_2 &= 2 \\end{aligned}\\]\n\nText.\n\n"
        "  \\[y\\]\n\nEnd"
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of mkdocs
def test_the_built_site(tmp_path) -> None:
    """Titles agree with the navigation, search finds common words, and pages have what search engines read."""
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), plugins=["search"])
    build(config)
    documents = json.loads((tmp_path / "search" / "search_index.json").read_text())["docs"]
    titles = [entry["title"].lower() for entry in documents]
    for words in ("install", "cite", "batch size", "glossary"):
        assert any(words in title for title in titles), words
    assert not any("published/" in entry["location"] for entry in documents)
    page = (tmp_path / "how-to" / "change-the-rank" / "index.html").read_text()
    assert f'<link rel="canonical" href="{config.site_url}how-to/change-the-rank/">' in page
    assert '<meta name="description" content="With AdamW' in page
    assert 'rel="prev"' in page
    assert 'rel="next"' in page
    assert f"<loc>{config.site_url}how-to/change-the-rank/</loc>" in (tmp_path / "sitemap.xml").read_text()
    tables = (tmp_path / "published" / "horizon" / "tables" / "index.html").read_text()
    assert "<table>" in tables
    gallery = (tmp_path / "gallery" / "index.html").read_text()
    images = [part.partition(">")[0] for part in gallery.split("<img ")[1:]]
    figures = [part for part in images if "thumbnails/" in part]
    assert len(figures) == len(list(hooks.PUBLISHED.rglob("*.png")))
    assert all('loading="lazy"' in part for part in images)
    for path in hooks.PUBLISHED.rglob("*.png"):
        name = path.relative_to(hooks.PUBLISHED).with_suffix(".webp")
        assert 0 < (tmp_path / "thumbnails" / name).stat().st_size < path.stat().st_size
