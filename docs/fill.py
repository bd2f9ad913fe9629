"""Write numbers and tables of the published runs into the pages, or check those that are there.

    python docs/fill.py            # rewrite every mark in README.md and docs/**/*.md
    python docs/fill.py --check    # exit with status 1 if a mark's text differs from what the files give

A page holds marks, which are HTML comments of one line or several. What stands between a mark and its end is generated.
FILE is a path below `results/published`, without spaces.

A number inside a sentence. The conditions must select exactly one row. The text after the first colon and space is a
Python format string over the row's columns:

    fell as G to the <!-- n horizon/exponents.csv over=strength at=8 step=64: {exponent:+.2f} -->-0.79<!-- / --> and

A table. The mark stands on lines of its own, after an empty line. The conditions select rows, the other words are
columns:

    <!-- table horizon/best.csv step=64 rank!=: rank "G"=strength:g
      "loss (s.e.)"={best_loss:.3f} ({best_loss_error:.3f}) -->
    | rank | G | loss (s.e.) |
    ...
    <!-- / -->

The gallery of figures: `<!-- gallery -->`, on a line of its own. The package's data file
`rora_theory/advice/measured.json` is filled and checked with the pages (`fill_packaged`), and copied for the calculator
(`fill_calculator`).

FILE
    x.csv            The rows of the file. An empty cell is a missing value.
    x.json           A list of objects has a row for each. Any other object is one row; nested keys are joined by dots.
    x.json#a.b       The value at the keys `a`, `b` of the file. In `a.*` each value of `a` is a row, its key in `key`.
    x/*/y.csv        The rows of all files that match; `folder` is the name of the folder that holds a row's file.
    x/tables.md#T    In a table mark alone: the Markdown table below the heading T.
Conditions
    column=value     Numbers compare with a relative tolerance of 1e-6. `column=a,b` accepts either value.
    column!=value    The opposite. `column=` selects rows where the value is missing, `column!=` rows where it is not.
    sort=column      Sort the rows; numbers inside words compare as numbers. The default is the file's order.
    A value with spaces or commas is quoted: policy="keep the rate".
Columns
    name             The heading is the name. `name:format` formats the value.
    "heading"=name   The same under another heading, also with `:format`.
    "heading"={a:.2f} ± {b:.2f}
                     Several columns in one cell. A cell in which a value is missing is empty.
    A colon after the conditions is optional.

Formats are Python's. `:.1f/1e9` divides the value first. They apply to the value rounded to 12 significant digits, so
that a tie does not depend on the processor that wrote the file.
"""

import csv
import difflib
import json
import math
import re
import statistics
import string
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ROOT / "results" / "published"
PACKAGED = ROOT / "rora_theory" / "advice" / "measured.json"
"""Measured numbers that the library uses."""
CALCULATOR = ROOT / "docs" / "assets" / "measured.mjs"
"""The same numbers for the calculator."""

MARK = re.compile(
    r"(?P<opening><!-- (?P<kind>n|table|gallery)\b(?P<body>(?:(?!-->).)*?)\s-->)(?P<text>(?:(?!<!--).)*)<!-- / -->",
    re.DOTALL,
)
"""A well-formed mark with its text and its end."""

OPENING = re.compile(r"<!--\s*(?:n|table|gallery)\b(?P<body>[^>]{0,60})")
"""The beginning of any mark, well-formed or not."""

QUOTED = r'"[^"]*"'
WORD = re.compile(
    rf"(?P<column>[\w.]+)(?P<test>!=|=)(?P<value>(?:{QUOTED}|[^\s:\"])*):?"  # a condition
    rf"|(?P<heading>{QUOTED})=(?P<cell>[^\"]*\}}[^\s\"]*|[^\s\"]+)"  # a column with a heading
    r"|(?P<name>[\w.]+)(?P<format>:\S+)?"  # a column
)
RELATIVE_TOLERANCE = 1e-6
SIGNIFICANT_DIGITS = 12

Row = Mapping[str, Any]


class MarkError(Exception):
    """A mark that cannot be filled."""


class MissingValueError(Exception):
    """A format string names a column whose value is missing."""


def missing_column(name: str, columns: Iterable[str]) -> MarkError:
    """Return an error that lists the columns which are similar, or the first."""
    columns = list(columns)
    listed = difflib.get_close_matches(name, columns, n=5) or columns[:15]
    return MarkError(f"no column {name!r}; there are {len(columns)}, among them {', '.join(listed)}")


class RowFormatter(string.Formatter):
    """Format columns of a row, whose names may contain dots."""

    def get_field(self, field_name: str, _: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return the value of a column."""
        if field_name not in kwargs:
            raise missing_column(field_name, kwargs)
        if kwargs[field_name] is None:
            raise MissingValueError(field_name)
        return kwargs[field_name], field_name

    def format_field(self, value: Any, format_spec: str) -> str:
        """Format a value, a float after rounding that removes differences between processors."""
        format_spec, _, divisor = format_spec.partition("/")
        value = value / float(divisor) if divisor else value
        if isinstance(value, float):
            value, format_spec = float(f"{value:.{SIGNIFICANT_DIGITS}g}"), format_spec or "g"
        text = format(value, format_spec)
        return text.replace("*", "\\*") if isinstance(value, str) else text  # r* is no emphasis


def parse_value(text: str) -> int | float | str | None:
    """Parse a cell of a CSV file as a number if it is one, as None if it is empty."""
    for number in (int, float):
        try:
            value = number(text)
        except ValueError:
            continue
        return None if math.isnan(value) else value
    return text or None


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Join the keys of nested objects and the indices of lists by dots."""
    if not isinstance(value, (dict, list)):
        return {prefix: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {
        name: leaf
        for key, child in items
        for name, leaf in flatten(child, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def json_rows(path: Path, keys: str) -> list[dict[str, Any]]:
    """Return the rows of a JSON file, or of the value at some dotted keys."""
    value = json.loads(path.read_text())
    for key in keys.split(".") if keys else ():
        if key == "*" and isinstance(value, dict):
            value = [{"key": name} | child for name, child in value.items() if isinstance(child, dict)]
        elif isinstance(value, dict) and key in value:
            value = value[key]
        else:
            raise MarkError(f"{path.name} has no key {key!r} of #{keys}")
    return [flatten(row) for row in (value if isinstance(value, list) else [value])]


@cache
def load_rows(source: str) -> tuple[dict[str, Any], ...]:
    """Return the rows of FILE, as the head of this module describes it."""
    pattern, _, part = source.partition("#")
    paths = sorted(PUBLISHED.glob(pattern), key=lambda path: natural_key(path.as_posix()))
    if not paths:
        raise MarkError(f"no file {pattern} below results/published")
    rows: list[dict[str, Any]] = []
    for path in paths:
        if path.suffix == ".csv":
            with path.open(newline="") as lines:
                loaded = [{k: parse_value(v) for k, v in row.items()} for row in csv.DictReader(lines)]
        elif path.suffix == ".json":
            loaded = json_rows(path, part)
        else:
            raise MarkError(f"{pattern}: rows come from .csv and .json files")
        rows += [{"folder": path.parent.name} | row for row in loaded]
    # A column that only some rows have is missing in the others.
    columns = dict.fromkeys(column for row in rows for column in row)
    return tuple(columns | row for row in rows)


def natural_key(value: Any) -> list[Any]:
    """Return a sort key in which numbers, alone or inside words, compare as numbers; missing values come first."""
    if isinstance(value, (int, float)):
        return [(0, value)]
    parts = re.split(r"(\d+)", str("" if value is None else value))
    return [(0, int(part)) if part.isdigit() else (1, part) for part in parts if part]


def equals(value: Any, wanted: str) -> bool:
    """Return whether a value is the one that a condition names."""
    target = parse_value(wanted)
    if isinstance(value, (int, float)) and isinstance(target, (int, float)) and not isinstance(value, bool):
        return math.isclose(value, target, rel_tol=RELATIVE_TOLERANCE)
    return value is target if value is None or target is None else str(value) == wanted


def select(rows: Iterable[Row], conditions: Sequence[re.Match[str]]) -> list[Row]:
    """Return the rows that meet every condition, sorted if one says so."""
    rows = list(rows)
    for condition in conditions:
        column, negated = condition["column"], condition["test"] == "!="
        # "a,b" is one quoted value; a,b are two.
        values = [value.strip('"') for value in re.findall(rf"{QUOTED}|[^,]+", condition["value"])] or [""]
        name = values[0] if column == "sort" else column
        if rows and name not in rows[0]:
            raise missing_column(name, rows[0])
        if column == "sort":
            rows.sort(key=lambda row: natural_key(row[name]))
        else:
            rows = [row for row in rows if any(equals(row[name], value) for value in values) != negated]
    if not rows:
        raise MarkError("the conditions select no row")
    return rows


def parse_words(text: str) -> tuple[list[re.Match[str]], list[re.Match[str]]]:
    """Split the words of a mark into conditions and columns."""
    matches, end = [], 0
    while rest := text[end:].strip():
        end = len(text) - len(text[end:].lstrip())
        match = WORD.match(text, end)
        if match is None or not (match.end() == len(text) or text[match.end()].isspace()):
            raise MarkError(f"neither a condition nor a column: {rest[:40]}")
        matches.append(match)
        end = match.end()
    return [match for match in matches if match["column"]], [match for match in matches if not match["column"]]


def format_row(template: str, row: Row) -> str:
    """Fill a format string from the columns of a row."""
    try:
        return RowFormatter().vformat(template, (), row)
    except (ValueError, TypeError, IndexError) as error:
        raise MarkError(f"format {template!r}: {error}") from error


def one_row(text: str) -> Row:
    """Return the one row that ``FILE conditions`` selects."""
    source, _, words = text.partition(" ")
    conditions, columns = parse_words(words)
    if columns:
        raise MarkError(f"not a condition: {columns[0][0]}")
    rows = select(load_rows(source), conditions)
    if len(rows) > 1:
        raise MarkError(f"the conditions select {len(rows)} rows; a number needs one")
    return rows[0]


def number(body: str) -> str:
    """Return the text of a number mark."""
    head, separator, template = body.partition(": ")
    if not separator or "{" not in template:
        raise MarkError("a number is FILE conditions: {column:format}")
    try:
        return format_row(template, one_row(head))
    except MissingValueError as error:
        raise MarkError(f"the value of column {error} is missing") from error


def markdown_row(cells: Iterable[str]) -> str:
    """Return a row of a Markdown table."""
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def table(body: str) -> str:
    """Return the lines of a table mark."""
    source, _, words = body.partition(" ")
    if ".md#" in source:
        return f"\n{included_table(body)}\n"
    conditions, columns = parse_words(words)
    if not columns:
        raise MarkError("a table names no column")
    headings, templates = [], []
    for column in columns:
        name, colon, spec = (column["cell"] or f"{column['name']}{column['format'] or ''}").partition(":")
        headings.append((column["heading"] or name).strip('"'))
        templates.append(column["cell"] if "{" in name else f"{{{name}{colon}{spec}}}")
    lines = [markdown_row(headings), "|" + "---|" * len(headings)]
    for row in select(load_rows(source.removesuffix(":")), conditions):
        cells = []
        for template in templates:
            try:
                cells.append(format_row(template, row))
            except MissingValueError:
                cells.append("")
        lines.append(markdown_row(cells))
    return "\n" + "\n".join(lines) + "\n"


def included_table(body: str) -> str:
    """Return the table below a heading of a run's Markdown file."""
    file, _, heading = body.partition("#")
    if not (PUBLISHED / file).is_file():
        raise MarkError(f"no file {file} below results/published")
    sections = re.split(r"^#+ +(.*)$", (PUBLISHED / file).read_text(), flags=re.MULTILINE)
    matching = [text for title, text in zip(sections[1::2], sections[2::2], strict=True) if title.strip() == heading]
    if len(matching) != 1:
        raise MarkError(f"{len(matching)} headings {heading!r} in {file}")
    lines = [line for line in matching[0].splitlines() if line.startswith("|")]
    if not lines:
        raise MarkError(f"no table below {heading!r} in {file}")
    return "\n".join(lines)


def fill_packaged(text: str, where: str) -> tuple[str, list[str]]:
    """Fill the values of a package's data file, as `fill` fills a page.

    The file is an object of entries of two kinds. In ``{"row": "FILE conditions", "columns": {name: value, ...}}`` the
    conditions select one row, whose values of these columns are copied with all digits. In ``{"rows": "FILE
    conditions", "ranges": {name: [lowest, highest], ...}}`` they select one row or more, and the lowest and highest
    value of each column are copied. Such an entry may also have ``"medians": {name: median, ...}`` and ``"distinct":
    {what: {"columns": "name ...", "number": n}, ...}``, the number of distinct combinations of values of some columns.
    Other keys of an entry are left as they are.
    """
    entries, problems = json.loads(text), []
    for name, entry in entries.items():
        try:
            values = {"columns": packaged_columns(entry)} if "columns" in entry else packaged_summaries(entry)
        except (MarkError, MissingValueError) as error:
            problems.append(f"{where}: {name}: error: {error}")
            continue
        problems += [
            f"{where}: {name}: is {entry[key]}, the files give {value}"
            for key, value in values.items()
            if value != entry[key]
        ]
        entry |= values
    return json.dumps(entries, indent=2) + "\n", problems


def packaged_columns(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of an entry that quotes one row."""
    row = one_row(entry["row"])
    return {column: RowFormatter().get_field(column, (), row)[0] for column in entry["columns"]}


def packaged_summaries(entry: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the ranges, and the medians and numbers if it has them, of an entry that summarises several rows."""
    source, _, words = entry["rows"].partition(" ")
    conditions, columns = parse_words(words)
    if columns:
        raise MarkError(f"not a condition: {columns[0][0]}")
    rows = select(load_rows(source), conditions)

    def values_of(column: str) -> list[Any]:
        return [RowFormatter().get_field(column, (), row)[0] for row in rows]

    def count(item: Mapping[str, Any]) -> dict[str, Any]:
        # A value may be missing here: files of one pattern need not have the same columns.
        columns = item["columns"].split()
        if lost := next((column for column in columns if column not in rows[0]), None):
            raise missing_column(lost, rows[0])
        return {**item, "number": len({tuple(row[column] for column in columns) for row in rows})}

    summaries: dict[str, Callable[[str], Any]] = {
        "ranges": lambda column: [min(values_of(column)), max(values_of(column))],
        "medians": lambda column: statistics.median(values_of(column)),
        "distinct": lambda name: count(entry["distinct"][name]),
    }
    return {key: {name: summarise(name) for name in entry[key]} for key, summarise in summaries.items() if key in entry}


def fill_calculator(text: str, where: str) -> tuple[str, list[str]]:
    """Return the package's data file as a module of JavaScript, which replaces the calculator's."""
    filled = f"// Written by docs/fill.py from {PACKAGED.relative_to(ROOT)}.\nexport default {PACKAGED.read_text()}"
    return filled, [] if text == filled else [f"{where}: differs from {PACKAGED.relative_to(ROOT)}"]


def figures(_: str) -> str:
    """Return the gallery of published figures."""
    import gallery  # beside this file; imports every command, which takes a second

    return gallery.markdown()


KINDS: dict[str, Callable[[str], str]] = {"n": number, "table": table, "gallery": figures}
"""What fills each kind of mark, from the mark's words."""


def check_place(text: str, mark: re.Match[str]) -> None:
    """Raise if Markdown would end a paragraph at a number, or not see a table as one."""
    line_start = text.rfind("\n", 0, mark.start()) + 1
    before = text[line_start : mark.start()]
    previous_line = text[:line_start].rstrip("\n").rpartition("\n")[2] if text[:line_start] else ""
    follows_text = bool(previous_line.strip()) and not text[:line_start].endswith("\n\n")
    if mark["kind"] != "n" and (before.strip() or follows_text):
        raise MarkError(f"a {mark['kind']} stands on lines of its own, after an empty line")
    follows_paragraph = follows_text and not re.match(r"\s*(\||#|```|<!--)", previous_line)
    if mark["kind"] == "n" and not before.strip() and follows_paragraph:
        raise MarkError("it begins a line and would end its paragraph; put it behind a word")


def fill(text: str, where: str) -> tuple[str, list[str]]:
    """Fill the marks of a page.

    Args:
      text: Text of the page.
      where: Name of the page in problems.

    Returns:
      The page with every mark filled that can be, and a line for each problem: marks that cannot be filled, and
      marks whose text was not what the files give.
    """
    problems: list[str] = []

    def replacement(mark: re.Match[str]) -> str:
        name = f"{where}: {mark['kind']} {' '.join(mark['body'].split())[:90]}"
        try:
            check_place(text, mark)
            new = KINDS[mark["kind"]](" ".join(mark["body"].split()))
        except MarkError as error:
            problems.append(f"{name}: error: {error}")
            return mark[0]
        if new != mark["text"]:
            problems.append(f"{name}: is {mark['text'].strip()[:60]!r}, the files give {new.strip()[:60]!r}")
        return f"{mark['opening']}{new}<!-- / -->"

    filled = MARK.sub(replacement, text)
    # What begins as a mark but is not a whole one.
    starts = {mark.start() for mark in MARK.finditer(text)}
    problems += [
        f"{where}: error: not a whole mark: {' '.join(opening[0].split())}"
        for opening in OPENING.finditer(text)
        if opening.start() not in starts
    ]
    return filled, problems


def documents() -> list[Path]:
    """Return every file to fill: the package's data, the calculator's, README.md, the pages.

    The gallery is last, as it quotes the pages.
    """
    pages = sorted((ROOT / "docs").rglob("*.md"), key=lambda page: (page.name == "gallery.md", page))
    pages = [page for page in pages if "published" not in page.relative_to(ROOT).parts]
    return [PACKAGED, CALCULATOR, ROOT / "README.md", *pages]


FILLERS: dict[str, Callable[[str, str], tuple[str, list[str]]]] = {
    ".json": fill_packaged,
    ".mjs": fill_calculator,
    ".md": fill,
}
"""What fills a file, by its suffix."""


def main(arguments: Sequence[str]) -> int:
    """Fill or check every page and return the exit status."""
    if list(arguments) not in ([], ["--check"]):
        print(f"usage: fill.py [--check], got {' '.join(arguments)}", file=sys.stderr)
        return 2
    failures = 0
    for path in documents():
        old = path.read_text()
        new, problems = FILLERS[path.suffix](old, str(path.relative_to(ROOT)))
        if not arguments and new != old:
            path.write_text(new)
        # Without --check a mark that differed is now right; only errors remain.
        remaining = [problem for problem in problems if arguments or ": error: " in problem]
        failures += len(remaining)
        print("".join(f"{problem}\n" for problem in remaining), end="")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
