"""Generated numbers in pages: the text of each mark, and the report of a wrong one."""

import json

import fill
import pytest

from rora_theory import Setting, transfer

RATES = """rank,rule,gain,rate,error,policy
1,0.25,64.0,0.0012,0.1,keep the rate
8,lora,64.0,0.035,0.2,"root, then keep"
128,rora,724.0773439350247,0.0349999999999999996,,keep the rate
,rora,,2.5,0.3,r* | full
"""


@pytest.fixture(autouse=True)
def published(monkeypatch, tmp_path):
    """Write a small published run."""
    monkeypatch.setattr(fill, "PUBLISHED", tmp_path)
    fill.load_rows.cache_clear()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "rates.csv").write_text(RATES)
    (tmp_path / "run" / "a.json").write_text(
        json.dumps({"seconds": 2.4, "config": {"seeds": [0, 1]}, "sides": {"here": {"gb": 1.5}, "peer": {"gb": 2}}})
    )
    (tmp_path / "run" / "empty.csv").write_text("rank,rate\n")
    (tmp_path / "run" / "notes.md").write_text("# Notes\n")
    for steps in (100, 30):
        (tmp_path / f"steps_{steps}").mkdir()
        (tmp_path / f"steps_{steps}" / "slopes.csv").write_text(f"rule,slope\nlora,{steps / 1000}\n")
    yield
    fill.load_rows.cache_clear()


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("run/rates.csv rank=8: {rate:.3f} ± {error:.1f}", "0.035 ± 0.2"),
        ("run/rates.csv rank=8,16 rule=lora: {rate:g}", "0.035"),
        ("run/rates.csv gain=724.0773: {rank:d} ({gain:.0f})", "128 (724)"),
        ("run/rates.csv rank=: {rate}", "2.5"),
        ("run/rates.csv rule=rora rank!=: {rank}", "128"),
        ("run/rates.csv rank=: {policy}", r"r\* | full"),
        ("run/rates.csv rule=0.25: {policy}", "keep the rate"),
        ('run/rates.csv policy="root, then keep": {rank}', "8"),
        ('run/rates.csv policy!="keep the rate","r* | full": {rank}', "8"),
        ("run/rates.csv rank=8: {gain:.1f/5e-1} halves", "128.0 halves"),
        ("run/rates.csv rank=8: ± {error:.2f*1.96}", "± 0.39"),
        ("run/rates.csv rank=8: {rule}", "alpha / r"),
        ("run/rates.csv rank=1: {rule}", r"alpha / r^0.25"),
        ("run/a.json: {seconds:.0f} s, seed {config.seeds.1}", "2 s, seed 1"),
        ("run/a.json#sides.peer: {gb:.1f}", "2.0"),
        ("steps_*/slopes.csv folder=steps_30: {slope:+.2f}", "+0.03"),
    ],
)
def test_number(body, text) -> None:
    assert fill.number(body) == text


def test_ties_do_not_depend_on_the_last_bits() -> None:
    """Twelve digits count: 0.1250000000004 is a tie, 0.125000000001 is not."""
    formats = [fill.format_row("{x:.2f}", {"x": x}) for x in (0.125, 0.125 + 1e-16, 0.125 - 1e-16, 0.125 + 4e-13)]
    assert formats == ["0.12"] * 4
    assert fill.format_row("{x:.2f}", {"x": 0.125 + 1e-12}) == "0.13"


def test_table() -> None:
    body = 'run/rates.csv rank!=: rank "G"=gain:.0f "rate (s.e.)"={rate:.2g} ({error:.1f}) "policy"=policy'
    assert fill.table(body).split("\n") == [
        "",
        "| rank | G | rate (s.e.) | policy |",
        "|---|---|---|---|",
        "| 1 | 64 | 0.0012 (0.1) | keep the rate |",
        "| 8 | 64 | 0.035 (0.2) | root, then keep |",
        "| 128 | 724 |  | keep the rate |",
        "",
    ]


PROGRAM = """
import os, sys
print("one\\nmore\\n\\ntwo\\n \\n", *sys.argv[1:], os.environ["COLUMNS"], "±\\n")
sys.exit("error: no" if "fails" in sys.argv else 0)
"""


def test_output_is_the_chosen_paragraphs_of_a_command(monkeypatch, tmp_path) -> None:
    """The command is that of this folder, and its lines are not those of the terminal."""
    monkeypatch.setattr(fill, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "sims").mkdir()
    (tmp_path / "sims" / "transfer.py").write_text(PROGRAM)
    last = " --to-rank 8 80 ±"
    texts = [fill.output(f"{paragraphs} rora transfer --to-rank 8") for paragraphs in ("1-1", "2-3", "1-3")]
    expected = ("one\nmore", f"two\n\n{last}", f"one\nmore\n\ntwo\n\n{last}")
    assert texts == [f"\n```text\n{text}\n```\n" for text in expected]
    for body, problem in (
        ("1-4 rora transfer", "3 paragraphs"),
        ("1-1 rora transfer fails", "^error: no$"),
        ("1-1 python transfer", "FIRST-LAST"),
        ("1-x rora transfer", "FIRST-LAST"),
        ("x-1 rora transfer", "FIRST-LAST"),
    ):
        with pytest.raises(fill.MarkError, match=problem):
            fill.output(body)


def test_columns_that_some_rows_lack_are_empty_cells() -> None:
    (fill.PUBLISHED / "run" / "rows.json").write_text(json.dumps([{"a": 1}, {"a": 2, "b": {"c": 0.5}}]))
    assert fill.table("run/rows.json: a b.c").splitlines()[3:] == ["| 1 |  |", "| 2 | 0.5 |"]
    assert fill.number("run/rows.json b.c=: {a}") == "1"


def test_cells_do_not_end_at_bars() -> None:
    assert fill.table("run/rates.csv rank=: policy").splitlines()[-1] == r"| r\* \| full |"


def test_rows_of_several_files_are_sorted_by_the_numbers_in_their_names() -> None:
    lines = fill.table("steps_*/slopes.csv: folder slope:.2f").splitlines()[3:]
    assert lines == ["| steps_30 | 0.03 |", "| steps_100 | 0.10 |"]


@pytest.mark.parametrize(
    ("mark", "problem"),
    [
        ("n run/rates.csv rank=8: {error:.1f} -->0.3<!-- / -->", "is '0.3', the files give '0.2'"),
        ("n run/rates.csv rank=9: {rate} --><!-- / -->", "select no row"),
        ("n run/rates.csv gain=724.08: {rate} --><!-- / -->", "select no row"),
        ("n run/rates.csv gain=64: {rate} --><!-- / -->", "select 2 rows"),
        ("n run/rates.csv rank=128: {error} --><!-- / -->", "column error is missing"),
        ("n run/rates.csv rank=8: {loss} --><!-- / -->", "no column 'loss'"),
        ("n run/rates.csv width=8: {rate} --><!-- / -->", "no column 'width'"),
        ("n run/rates.csv rank=8: {rule:.2f} --><!-- / -->", "'{rule:.2f}'"),
        ("n run/rates.csv rank=8: {rate} {error --><!-- / -->", "'{rate} {error'"),
        ("n run/rates.csv rank=8: {rate:.1f/0} --><!-- / -->", "'{rate:.1f/0}'"),
        ("n run/empty.csv: {rate} --><!-- / -->", "run/empty.csv has no rows"),
        ("n run/rates.csv rank=8: rate --><!-- / -->", "a number is FILE"),
        ("n run/rates.csv rank loss: {rate} --><!-- / -->", "not a condition: rank"),
        ("n run/other.csv rank=8: {rate} --><!-- / -->", "no file run/other.csv"),
        ("n run/a.json#sides.third: {gb} --><!-- / -->", "no key 'third'"),
        ("n run/rates.csv rank=8: {rate} -->0.035", "not a whole mark"),
        ("n run/rates.csv rank=8: {rate}-->0.035<!-- / --> and <!-- n x: {y} --><!-- / -->", "not a whole mark"),
        ("n run/rates.csv rank=8: {rate} -->0.035<!-- n a: {b} --><!-- / -->", "not a whole mark"),
        ("table run/rates.csv rank --><!-- / -->", "lines of its own"),
    ],
)
def test_wrong_marks_are_reported(mark, problem) -> None:
    page = f"It was <!-- {mark} of it.\n"
    filled, problems = fill.fill(page, "page.md")
    assert problem in "\n".join(problems)
    assert all(line.startswith("page.md: ") for line in problems)
    if "the files give" not in problem:
        assert filled == page


@pytest.mark.parametrize(
    ("mark", "problem"),
    [
        ("run/rates.csv rank=8", "names no column"),
        ("run/rates.csv rank=8 ?", "neither a condition nor a column: ?"),
        ("run/missing.csv rank", "no file run/missing.csv"),
        ("run/notes.md rank", "rows come from .csv and .json files"),
    ],
)
def test_wrong_tables_are_reported(mark, problem) -> None:
    assert problem in "".join(fill.fill(f"# Title\n\n<!-- table {mark} -->\n<!-- / -->\n", "page.md")[1])


def test_a_number_that_begins_a_line_would_end_its_paragraph() -> None:
    mark = "<!-- n run/rates.csv rank=8: {rate} -->0.035<!-- / -->"
    for page in (f"The rate was\n{mark} here.", f"- It was\n  {mark} here."):
        assert "begins a line" in "".join(fill.fill(page, "page.md")[1])
    for page in (f"The rate was {mark}\nhere.", f"The rate was:\n\n{mark}", f"| a |\n{mark}", f"# Title\n{mark}", mark):
        assert fill.fill(page, "page.md") == (page, [])


def test_packaged_values_are_copied_with_all_digits() -> None:
    entry = {"row": "run/rates.csv rank=128", "columns": {"gain": 724.0, "rule": "rora"}}
    lost = {"row": "run/rates.csv rank=9", "columns": {"gain": 1.0}}
    filled, problems = fill.fill_packaged(json.dumps({"a": entry, "lost": lost}), "data.json")
    assert json.loads(filled) == {
        "a": entry | {"columns": {"gain": 724.0773439350247, "rule": "rora"}},
        "lost": lost,
    }
    assert ["data.json: a: is {" in problems[0], "data.json: lost: error: " in problems[1]] == [True, True]
    assert fill.fill_packaged(filled, "data.json")[1] == problems[1:]


def test_packaged_ranges_cover_the_selected_rows() -> None:
    (fill.PUBLISHED / "run" / "rates.json").write_text(
        json.dumps([{"rate": rate, "gain": 64.0} for rate in (0.002, 0.035, 0.0012)])
    )
    entry = {"model": "m", "rows": "run/rates.json rate!=0.002", "ranges": {"rate": [0, 0], "gain": [64.0, 64.0]}}
    missing = {"rows": "run/rates.csv", "ranges": {"rank": [1, 1]}}
    filled, problems = fill.fill_packaged(json.dumps({"a": entry, "missing": missing}), "data.json")
    assert json.loads(filled) == {
        "a": entry | {"ranges": {"rate": [0.0012, 0.035], "gain": [64.0, 64.0]}},
        "missing": missing,
    }
    assert ["data.json: a: is {" in problems[0], "data.json: missing: error: " in problems[1]] == [True, True]


def test_packaged_medians_and_numbers_of_distinct_values() -> None:
    distinct = {"rules": {"columns": "rule", "number": 0}, "both": {"columns": "rule policy rank", "number": 0}}
    entry = {"rows": "run/rates.csv", "ranges": {}, "medians": {"rate": 0}, "distinct": distinct}
    filled, problems = fill.fill_packaged(json.dumps({"a": entry}), "data.json")
    assert json.loads(filled)["a"]["medians"] == pytest.approx({"rate": 0.035})
    assert {name: count["number"] for name, count in json.loads(filled)["a"]["distinct"].items()} == {
        "rules": 3,
        "both": 4,
    }
    assert len(problems) == 2
    assert fill.fill_packaged(filled, "data.json") == (filled, [])
    one_row = {"rows": "run/rates.csv rank=8", "distinct": {"rules": {"columns": "rule", "number": 1}}}
    assert fill.fill_packaged(json.dumps({"a": one_row}), "data.json")[1] == []
    for wrong in ({"medians": {"rank": 0}}, {"distinct": {"rules": {"columns": "rules", "number": 0}}}):
        assert "error: " in fill.fill_packaged(json.dumps({"a": entry | wrong}), "data.json")[1][0]


def test_check_reports_and_filling_corrects(monkeypatch, tmp_path, capsys) -> None:
    page = tmp_path / "page.md"
    monkeypatch.setattr(fill, "ROOT", tmp_path)
    monkeypatch.setattr(fill, "documents", lambda: [page])
    page.write_text("It was <!-- n run/rates.csv\n  rank=8: {rate:.2f}\n-->0.4<!-- / --> of it.\n")
    assert fill.main(["--check"]) == 1
    assert "page.md: n run/rates.csv rank=8" in capsys.readouterr().out
    assert "-->0.4<!--" in page.read_text(), "the page is written without --check only"
    assert fill.main([]) == 0
    assert page.read_text() == "It was <!-- n run/rates.csv\n  rank=8: {rate:.2f}\n-->0.04<!-- / --> of it.\n"
    assert fill.main(["--check"]) == 0
    assert fill.main(["--chekc"]) == 2
    capsys.readouterr()
    page.write_text("It was <!-- n run/rates.csv rank=9: {rate} -->0.4<!-- / --> of it.\n")
    assert fill.main([]) == 1
    assert "select no row" in capsys.readouterr().out


def test_the_documents_are_the_constants_the_readme_and_every_page(monkeypatch, tmp_path) -> None:
    (tmp_path / "docs" / "results").mkdir(parents=True)
    pages = [tmp_path / "docs" / name for name in ("a.md", "results/b.md")]
    for path in (*pages, tmp_path / "docs" / "c.css"):
        path.write_text("")
    monkeypatch.setattr(fill, "ROOT", tmp_path)
    assert fill.documents() == [fill.PACKAGED, tmp_path / "README.md", *pages]


def test_a_mark_states_what_the_package_advises() -> None:
    low, rate, high = transfer(Setting(16, 32.0, 2e-4), 128, alpha=256.0).rate_range
    mark = "<!-- advice 16 128 to_alpha=256: {rate:.3g}, {divisor:.2f} ({divisor_low:.2f} to {divisor_high:.2f}) -->"
    text, problems = fill.fill(f"Set {mark}x<!-- / -->.", "page")
    expected = f"{rate:.3g}, {2e-4 / rate:.2f} ({2e-4 / high:.2f} to {2e-4 / low:.2f})"
    assert text == f"Set {mark}{expected}<!-- / -->."
    assert len(problems) == 1
    assert fill.fill(text, "page") == (text, [])
    for body in ("16 128 to_alpha=0: {rate}", "16 128 colour=3: {rate}", "16 128: {weight}", "16 128"):
        _, problems = fill.fill(f"Set <!-- advice {body} -->x<!-- / -->.", "page")
        assert "error" in problems[0]
