"""Write numbers and tables of the published runs into the pages, or check those that are there.

    python docs/fill.py            # rewrite every mark in README.md and docs/**/*.md
    python docs/fill.py --check    # exit with status 1 if a mark's text differs from what the files give

A page holds marks, which are HTML comments of one line or several. What stands between a mark and its end is generated.
FILE is a path below `results/published`, without spaces.

A number inside a sentence. The conditions must select exactly one row. The text after the first colon and space has
the row's columns in braces, with Python's formats:

    fell as G to the <!-- n horizon/exponents.csv over=gain at=8 step=64: {exponent:+.2f} -->-0.79<!-- / --> and

A table. The mark stands on lines of its own, after an empty line. The conditions select rows, the other words are
columns:

    <!-- table horizon/best.csv step=64 rank!=: rank "G"=gain:g
      "loss (s.e.)"={best_loss:.3f} ({best_loss_error:.3f}) -->
    | rank | G | loss (s.e.) |
    ...
    <!-- / -->

The gallery of figures is `<!-- gallery -->`, and the list of published runs `<!-- runs -->`, each on a line of its own.
The package's data file `rora_theory/advice/constants.json` is filled and checked with the pages (`fill_packaged`).

What the package advises. The two ranks come first, then options of `rora_theory.transfer` and of the tuned setting
(alpha 32, rule lora and rate 2e-4 unless stated). The columns are rate, low, high, factor, divisor, divisor_low,
divisor_high, lora_alpha and sentence:

    <!-- advice 16 128 to_alpha=256: {divisor:.1f} -->3.6<!-- / -->

What a command prints, by the numbers of its paragraphs, on lines of its own:

    <!-- output 1-2 rora transfer --from-rank 16 --to-rank 128 --alpha 32 --lr 2e-4 -->
    (a block of code)
    <!-- / -->

FILE
    x.csv            The rows of the file. An empty cell is a missing value.
    x.json           A list of objects has a row for each. Any other object is one row; nested keys are joined by dots.
    x.json#a.b       The value at the keys `a`, `b` of the file.
    x/*/y.csv        The rows of all files that match; `folder` is the name of the folder that holds a row's file, and
                     `run_name` says in words what it is (`NAMES`).
Conditions
    column=value     Numbers compare with a relative tolerance of 1e-6. `column=a,b` accepts either value.
    column!=value    The opposite. `column=` selects rows where the value is missing, `column!=` rows where it is not.
    A value with spaces or commas is quoted: policy="keep the rate".
Columns
    name             The heading is the name. `name:format` formats the value.
    "heading"=name   The same under another heading, also with `:format`.
    "heading"={a:.2f} ± {b:.2f}
                     Several columns in one cell. A cell in which a value is missing is empty.
    A colon after the conditions is optional.

Formats are Python's. `:.1f/1e9` divides the value first, and `:.1f*1.96` multiplies it, which turns a standard error
into half a 95% interval. They apply to the value rounded to 12 significant digits, so that a tie does not depend on the
processor that wrote the file. A cell that is a code of its column, such as `adamw`, appears in words (`WORDS`).
"""

import csv
import json
import math
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import gallery
from gallery import PUBLISHED, ROOT

import rora_theory

PACKAGED = ROOT / "rora_theory" / "advice" / "constants.json"  # for the library and the calculator

MARK = re.compile(
    r"(?P<opening><!-- (?P<kind>n|table|gallery|runs|advice|output)\b(?P<body>(?:(?!-->).)*?)\s-->)"
    r"(?P<text>(?:(?!<!--).)*)<!-- / -->",
    re.DOTALL,
)
"""A well-formed mark with its text and its end."""

OPENING = re.compile(r"<!--\s*(?:n|table|gallery|runs|advice|output)\b(?P<body>[^>]{0,60})")
"""The beginning of any mark, well-formed or not."""

QUOTED = r'"[^"]*"'
WORD = re.compile(
    rf"\s*(?:(?P<column>[\w.]+)(?P<test>!=|=)(?P<value>(?:{QUOTED}|[^\s:\"])*):?"  # a condition
    rf"|(?P<heading>{QUOTED})=(?P<cell>[^\"]*\}}[^\s\"]*|[^\s\"]+)"  # a column with a heading
    r"|(?P<name>[\w.]+(?::\S+)?))(?=\s|$)"  # a column
)
FIELD = re.compile(r"\{([^{}:]*):?([^{}]*)\}")
"""A column and its format in a format string."""
NAMES = {
    "accuracy": "SmolLM2-135M, 64 steps",
    "accuracy_256": "SmolLM2-135M, 256 steps",
    "accuracy_pruned": "SmolLM2-135M pruned to half, 64 steps",
    "evaluate_speed": "AMD EPYC (AVX-512)",
    "evaluate_speed_avx2": "AVX2 alone",
    "finetune_speed": "AMD EPYC (AVX-512)",
    "finetune_speed_avx2": "AVX2 alone",
    "finetune_speed_intel": "Intel Xeon",
    "held_out_30": "held-out loss, 30 steps",
    "held_out_100": "held-out loss, 100 steps",
    "held_out_300": "held-out loss, 300 steps",
    "held_out_1000": "held-out loss, 1,000 steps",
    "rank_sweep": "SmolLM2-135M",
    "rank_sweep_pruned": "SmolLM2-135M pruned to half",
    "train_30": "training loss, 30 steps",
    "train_100": "training loss, 100 steps",
    "train_1000": "training loss, 1,000 steps",
}
"""Names of folders in words, for tables over several of them."""
WORDS = {
    "base": {"bfloat16": "bfloat16", "nf4": "NF4 (4 bits)", "q4_0": "Q4_0 (4 bits)", "q8_0": "Q8_0 (8 bits)"},
    "init": {"gaussian": "gaussian", "kaiming_uniform": "PEFT's default"},
    "method": {"dora": "DoRA", "lora": "LoRA", "rora": "RoRA"},
    "name": {
        "batch_exponent": "exponent in the batch size",
        "cosine": "best peak rate with cosine decay over the best constant rate",
        "displacement_constant": "K of the displacement law",
        "gain_exponent": "correction of the displacement law's exponent in the gain",
        "pair": "logarithm of the ratio of two best rates beyond the laws",
        "rank_exponent": "exponent in the rank at one gain",
        "steps_exponent": "exponent in the number of steps",
    },
    "optimizer": {"adam": "Adam", "adamw": "AdamW", "sgd": "SGD"},
    "policy": {"tune": "probe"},  # the published runs of the probe, which `rora tune` had then
    "rule": {"0": "constant scaling", "0.25": "alpha / r^0.25", "lora": "alpha / r", "rora": "alpha / sqrt(r)"},
    "side": {"ours": "this package (JAX)", "peer": "torch + peft"},
}
"""Codes in words, by column."""
RELATIVE_TOLERANCE = 1e-6
SIGNIFICANT_DIGITS = 12

Row = Mapping[str, Any]


class MarkError(Exception):
    """A mark that cannot be filled."""


class MissingValueError(MarkError):
    """A mark names a column whose value is missing."""


def check_column(name: str, row: Row) -> None:
    """Raise if a row does not have a column."""
    if name not in row:
        raise MarkError(f"no column {name!r}; there are {', '.join(row)}")


def value_of(row: Row, column: str) -> Any:
    """Return the value of a column, which must not be missing."""
    check_column(column, row)
    if row[column] is None:
        raise MissingValueError(f"the value of column {column} is missing")
    return row[column]


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
        if not isinstance(value, dict) or key not in value:
            raise MarkError(f"{path.name} has no key {key!r} of #{keys}")
        value = value[key]
    return [flatten(row) for row in (value if isinstance(value, list) else [value])]


@cache
def load_rows(source: str) -> tuple[dict[str, Any], ...]:
    """Return the rows of FILE, as the head of this module describes it."""
    pattern, _, part = source.partition("#")
    # Numbers inside names compare as numbers.
    paths = sorted(PUBLISHED.glob(pattern), key=lambda path: re.sub(r"\d+", lambda n: n[0].zfill(9), str(path)))
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
        folder = path.parent.name
        rows += [{"folder": folder, "run_name": NAMES.get(folder, folder)} | row for row in loaded]
    if not rows:
        raise MarkError(f"{pattern} has no rows")
    # A column that only some rows have is missing in the others.
    columns = dict.fromkeys(column for row in rows for column in row)
    return tuple(columns | row for row in rows)


def equals(value: Any, text: str) -> bool:
    """Return whether a value is the one that a condition names."""
    target = parse_value(text)
    if isinstance(value, (int, float)) and isinstance(target, (int, float)) and not isinstance(value, bool):
        return math.isclose(value, target, rel_tol=RELATIVE_TOLERANCE)
    return value is target if value is None or target is None else str(value) == text


def parse_words(text: str) -> Iterator[re.Match[str]]:
    """Split the words of a mark into conditions and columns."""
    end = 0
    while rest := text[end:].strip():
        match = WORD.match(text, end)
        if match is None:
            raise MarkError(f"neither a condition nor a column: {rest[:40]}")
        yield match
        end = match.end()


def select(text: str) -> tuple[list[Row], list[re.Match[str]]]:
    """Return the rows that ``FILE conditions columns`` selects, and the columns."""
    source, _, words = text.partition(" ")
    rows: list[Row] = list(load_rows(source.removesuffix(":")))
    columns = []
    for word in parse_words(words):
        if not (column := word["column"]):
            columns.append(word)
            continue
        # "a,b" is one quoted value; a,b are two.
        values = [value.strip('"') for value in re.findall(rf"{QUOTED}|[^,]+", word["value"])] or [""]
        check_column(column, rows[0])
        rows = [row for row in rows if any(equals(row[column], value) for value in values) == (word["test"] == "=")]
        if not rows:
            raise MarkError("the conditions select no row")
    return rows, columns


def format_row(template: str, row: Row) -> str:
    """Fill a format string from the columns of a row."""

    def replacement(field: re.Match[str]) -> str:
        value, (spec, operation, number) = value_of(row, field[1]), re.match(r"([^*/]*)([*/]?)(.*)", field[2]).groups()
        if operation:
            value = value * float(number) if operation == "*" else value / float(number)
        value = WORDS.get(field[1], {}).get(str(value), value)
        if isinstance(value, float):
            # Rounding removes differences between processors.
            value, spec = float(f"{value:.{SIGNIFICANT_DIGITS}g}"), spec or "g"
        text = format(value, spec)
        return text.replace("*", "\\*") if isinstance(value, str) else text  # r* is no emphasis

    if {"{", "}"} & set(FIELD.sub("", template)):
        raise MarkError(f"format {template!r}: a brace without its other")
    try:
        return FIELD.sub(replacement, template)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise MarkError(f"format {template!r}: {error}") from error


def select_rows(text: str, is_one: bool = False) -> list[Row]:
    """Return the rows that ``FILE conditions`` selects, or the only one."""
    rows, columns = select(text)
    if columns:
        raise MarkError(f"not a condition: {columns[0][0].strip()}")
    if is_one and len(rows) > 1:
        raise MarkError(f"the conditions select {len(rows)} rows; a number needs one")
    return rows


def number(body: str) -> str:
    """Return the text of a number mark."""
    head, separator, template = body.partition(": ")
    if not separator or not FIELD.search(template):
        raise MarkError("a number is FILE conditions: {column:format}")
    return format_row(template, select_rows(head, is_one=True)[0])


def advice(body: str) -> str:
    """Return the text of an advice mark."""
    head, separator, template = body.partition(": ")
    old_rank, new_rank, *words = head.split()
    options: dict[str, Any] = {name: parse_value(value) for name, _, value in (word.partition("=") for word in words)}
    if not separator or not FIELD.search(template):
        raise MarkError("advice is RANK RANK options: {column:format}")
    values: list[Any] = [
        options.pop(name, default) for name, default in (("alpha", 32), ("rate", 2e-4), ("rule", "lora"))
    ]
    setting = rora_theory.Setting(int(old_rank), float(values[0]), float(values[1]), rule=values[2])
    to: dict[str, Any] = {name: options.pop(f"to_{name}", None) for name in ("alpha", "rule")}
    try:
        result = rora_theory.transfer(setting, int(new_rank), **to, **options)
    except (rora_theory.InputError, TypeError) as error:
        raise MarkError(f"{head}: {error}") from error
    if result.rate_range is None:
        raise MarkError(f"{head}: no law gives a range")
    low, rate, high = result.rate_range
    row: dict[str, Any] = {"rate": rate, "low": low, "high": high, "factor": rate / setting.learning_rate}
    row |= {"divisor": 1 / row["factor"], "divisor_low": setting.learning_rate / high}
    row |= {"divisor_high": setting.learning_rate / low, "lora_alpha": result.lora_alpha, "sentence": result.sentence()}
    return format_row(template, row)


def output(body: str) -> str:
    """Return the paragraphs of a command's output as a block of code."""
    paragraphs, program, name, *options = body.split()
    first, _, last = paragraphs.partition("-")
    if program != "rora" or not first.isdigit() or not last.isdigit():
        raise MarkError("output is FIRST-LAST rora COMMAND OPTIONS")
    command = [sys.executable, "-m", f"sims.{name}", *options]
    environment = os.environ | {"COLUMNS": "80", "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    process = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if process.returncode:
        raise MarkError(process.stderr.strip())
    blocks = re.split(r"\n\s*\n", process.stdout.strip())
    if len(blocks) < int(last):
        raise MarkError(f"the command prints {len(blocks)} paragraphs")
    text = "\n\n".join(blocks[int(first) - 1 : int(last)])
    return f"\n```text\n{text}\n```\n"


def markdown_row(cells: Iterable[str]) -> str:
    """Return a row of a Markdown table."""
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def table(body: str) -> str:
    """Return the lines of a table mark."""
    rows, columns = select(body)
    if not columns:
        raise MarkError("a table names no column")
    headings, templates = [], []
    for column in columns:
        cell = column["cell"] or column["name"]
        headings.append((column["heading"] or cell.partition(":")[0]).strip('"'))
        templates.append(cell if "{" in cell else f"{{{cell}}}")
    lines = [markdown_row(headings), "|" + "---|" * len(headings)]
    for row in rows:
        cells = []
        for template in templates:
            try:
                cells.append(format_row(template, row))
            except MissingValueError:
                cells.append("")
        lines.append(markdown_row(cells))
    return "\n" + "\n".join(lines) + "\n"


def fill_packaged(text: str, where: str) -> tuple[str, list[str]]:
    """Fill the values of a package's data file, as `fill` fills a page.

    The file is an object of entries. In ``{"row": "FILE conditions", "columns": {name: value, ...}}`` the conditions
    select one row, whose values of these columns are copied with all digits. An entry with ``"rows"`` selects one row
    or more. It has the lowest and highest values of columns in ``"ranges"``, and may have ``"medians"`` and
    ``"distinct": {what: {"columns": "name ...", "number": n}, ...}``, the number of distinct combinations of values.
    Other keys of an entry are left as they are.
    """
    entries, problems = json.loads(text), []
    for name, entry in entries.items():
        try:
            values = packaged_values(entry)
        except MarkError as error:
            problems.append(f"{where}: {name}: error: {error}")
            continue
        problems += [
            f"{where}: {name}: is {entry[key]}, the files give {value}"
            for key, value in values.items()
            if value != entry[key]
        ]
        entry |= values
    return json.dumps(entries, indent=2) + "\n", problems


def packaged_values(entry: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the generated objects of an entry, by their keys."""
    rows = select_rows(entry["row"], is_one=True) if "row" in entry else select_rows(entry["rows"])

    def values_of(column: str) -> list[Any]:
        return [value_of(row, column) for row in rows]

    def count(what: str) -> dict[str, Any]:
        # A value may be missing here: files of one pattern need not have the same columns.
        columns = entry["distinct"][what]["columns"].split()
        for column in columns:
            check_column(column, rows[0])
        return entry["distinct"][what] | {"number": len({tuple(row[column] for column in columns) for row in rows})}

    summaries: dict[str, Callable[[str], Any]] = {
        "columns": lambda column: values_of(column)[0],
        "ranges": lambda column: [min(values_of(column)), max(values_of(column))],
        "medians": lambda column: statistics.median(values_of(column)),
        "distinct": count,
    }
    return {key: {name: summarise(name) for name in entry[key]} for key, summarise in summaries.items() if key in entry}


KINDS: dict[str, Callable[[str], str]] = {
    "advice": advice,
    "n": number,
    "output": output,
    "table": table,
    "gallery": lambda _: gallery.markdown(),
    "runs": lambda _: gallery.runs_markdown(),
}
"""What fills each kind of mark, from the mark's words."""


def check_place(text: str, mark: re.Match[str]) -> None:
    """Raise if Markdown would end a paragraph at a number, or not see a table as one."""
    *_, previous_line, before = ("\n\n" + text[: mark.start()]).split("\n")
    begins_line, follows_text = not before.strip(), bool(previous_line.strip())
    if mark["kind"] not in ("n", "advice") and (follows_text or not begins_line):
        raise MarkError(f"a {mark['kind']} stands on lines of its own, after an empty line")
    if (
        mark["kind"] in ("n", "advice")
        and begins_line
        and follows_text
        and not re.match(r"\s*(\||#|```|<!--)", previous_line)
    ):
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
    """Return every file to fill: the package's data, README.md, the pages."""
    pages = [page.relative_to(ROOT) for page in sorted((ROOT / "docs").rglob("*.md"))]
    return [PACKAGED, ROOT / "README.md", *(ROOT / page for page in pages)]


def main(arguments: Sequence[str]) -> int:
    """Fill or check every page and return the exit status."""
    if list(arguments) not in ([], ["--check"]):
        print(f"usage: fill.py [--check], got {' '.join(arguments)}", file=sys.stderr)
        return 2
    remaining = []
    for path in documents():
        old, fill_file = path.read_text(), fill_packaged if path == PACKAGED else fill
        new, problems = fill_file(old, str(path.relative_to(ROOT)))
        if not arguments and new != old:
            path.write_text(new)
        # Without --check a mark that differed is now right; only errors remain.
        remaining += [problem for problem in problems if arguments or ": error: " in problem]
    print("".join(f"{problem}\n" for problem in remaining), end="")
    return int(bool(remaining))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
