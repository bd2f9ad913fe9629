"""Training records from files, folders and the hub's data sets; a bad one is named by file, place and key."""

import itertools
import os
import re
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, time
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from rora_theory import extras
from rora_theory.data import hub_files, limited
from rora_theory.data.formats import (
    FIELDS,
    FORMATS,
    TRAIN_TEMPLATES,
    AnyRecord,
    BadRecords,
    FormatName,
    Item,
    Record,
    TrainTemplate,
    fitting,
    kind_of,
    records_digest,
)
from rora_theory.errors import InputError, first_line
from rora_theory.io import files
from rora_theory.validation.ranges import Natural, check_ranges

if TYPE_CHECKING:  # it needs Jinja, which records do not
    from rora_theory.data.chat import ChatTemplate

__all__ = [
    "AnyRecord",
    "DataConfig",
    "FormatConfig",
    "Record",
    "RecordSet",
    "read_record_set",
    "read_records",
    "records_digest",
]

NOTES = {
    "arguments": "{:,} tool calls have their arguments as a JSON string; parsed, as chat templates expect an object",
    "weight": "{:,} turns have weight 0; they are not in the loss",
}
"""Notes about what reading converts, by the kind that `formats.Item` counts."""

ACCEPTED = "a .json, .jsonl, .parquet or .txt file, or a split as FOLDER:SPLIT"


LARGEST_TABLE = files.LARGEST
"""Maximum size of the columns of a Parquet file that are read, in bytes."""

TABLE_MEMORY, TABLE_SECONDS = 3 << 30, 120
"""Maximum memory beside that, in bytes, and processor time to read a Parquet file once."""

_ROWS = 1024  # of a batch of a Parquet file


@dataclass(frozen=True)
class FormatConfig:
    """How training records are written."""

    format: FormatName | None = None
    """how records are written: messages (OpenAI's chats), sharegpt, alpaca, prompt-response, prompt-completion,
    conversational (prompt and completion as lists of messages) or text; none tells it by the first record's keys"""
    fields: dict[str, str] = field(default_factory=dict)
    """your data's own name of a field, where it is another: --fields instruction question output answer"""

    def __post_init__(self) -> None:
        """Raise `InputError` for a format or field that there is not."""
        accepted = get_args(FormatName)
        if self.format is not None and self.format not in accepted:
            raise InputError(f"format is {self.format!r}; accepted are {', '.join(accepted)}")
        for name in self.fields:
            if name not in FIELDS:
                raise InputError(f"fields has {name!r}; accepted are your names of {', '.join(FIELDS)}")


@dataclass(frozen=True)
class DataConfig(FormatConfig):
    """How training records are written, and how chats become text."""

    chat_template: str | None = None
    """Jinja file of the template that makes a text of a chat, or chatml; none is the model's own"""
    chat_date: str | None = None
    """day that a template is told which asks for today's, as YYYY-MM-DD; none is today"""
    show: Natural = 0
    """print so many training prompts as they go in, what is in the loss marked"""

    def __post_init__(self) -> None:
        """Raise `InputError` for a value out of range, or a template or date that can't be read."""
        super().__post_init__()
        check_ranges(self, str)
        if self.chat_template is not None:
            from rora_theory.data import chat as chats

            chats.source_of(self.chat_template)
        _ = self.now

    def identity(self) -> dict[str, str]:
        """What of it determines prompts beside the records and the model."""
        digest = None
        if self.chat_template is not None:
            from rora_theory.data import chat as chats

            digest = chats.digest_of(chats.source_of(self.chat_template))
        named = {"chat_template_sha256": digest, "chat_date": self.chat_date}
        return {name: value for name, value in named.items() if value is not None}

    @property
    def now(self) -> datetime:
        """The time that chat templates are told: noon of the day, so that a day's runs are alike."""
        try:
            day = date.today() if self.chat_date is None else date.fromisoformat(self.chat_date)
        except ValueError:
            raise InputError(f"chat_date is {self.chat_date!r}; accepted is a day as YYYY-MM-DD") from None
        return datetime.combine(day, time(12))


@dataclass(frozen=True)
class RecordSet:
    """The records of several sources in order.

    Attributes:
      records: they.
      formats: of each source, and how many records it has.
      config: how they were read.
      notes: what was told by the keys alone.
    """

    records: list[AnyRecord]
    formats: tuple[tuple[FormatName, int], ...]
    config: DataConfig
    notes: tuple[str, ...] = ()

    @cached_property
    def sha256(self) -> str:
        """`formats.records_digest` of all."""
        return records_digest(self.records)

    def template(self, asked: str | None) -> TrainTemplate:
        """The template that is asked for, or the formats' own.

        Raises:
          InputError: an unknown one; or none is asked for and the sources' formats have different ones.
        """
        own = list(dict.fromkeys(FORMATS[name].template for name, _ in self.formats))
        if asked is None and len(own) > 1:
            told = ", ".join(f"{name} ({FORMATS[name].template})" for name, _ in dict.fromkeys(self.formats))
            raise InputError(f"template is not given, and the formats have their own: {told}; accepted is one for all")
        if asked is not None and asked not in TRAIN_TEMPLATES:
            raise InputError(f"template is {asked!r}; accepted are {', '.join(TRAIN_TEMPLATES)}")
        return own[0] if asked is None else cast(TrainTemplate, asked)

    def chat(self, tokenizer: Any, template: str | None) -> "ChatTemplate | None":
        """The chat template where ``template`` is ``chat``: the one that was named, or the model's own.

        Raises:
          InputError: there is none; names what can be chosen.
        """
        if template != "chat":
            return None
        from rora_theory.data import chat as chats

        return chats.chat_template_of(tokenizer, self.config.chat_template, self.config.now)

    def identity(self, chat: "ChatTemplate | None") -> dict[str, str]:
        """What a run that reads the records is known by, beside the template's name: they, and the chat template."""
        return {"records_sha256": self.sha256} | (chat.identity() if chat is not None else {})

    @property
    def said(self) -> str:
        """How many records, and how they are written, in a sentence."""
        counts: Counter[str] = Counter()
        for name, count in self.formats:
            counts[name] += count
        listed = ", ".join(f"{count:,} as {name}" for name, count in counts.items())
        how = "as --format says" if self.config.format else "told by the first record's keys; --format names another"
        return f"records: {listed} ({how})"


def read_record_set(sources: Sequence[str | Path], config: FormatConfig | None = None) -> RecordSet:
    """The records of several sources, in order.

    Args:
      sources: ``.json`` files (a list of objects, or an object a line), ``.jsonl`` files (an object a line),
        ``.parquet`` files (a row a record), ``.txt`` files (a line a record), of this machine or, as
        ``hf://datasets/OWNER/NAME[@REVISION]/FILE``, of the hub or its cache; or the split of a data set: a folder's as
        ``FOLDER:SPLIT``, the hub's as ``hf://datasets/OWNER/NAME[@REVISION][/SUBSET]:SPLIT``. Keys that no field of the
        format has are not read.
      config: None is the default.

    Raises:
      InputError: A file is missing, unreadable or empty, or records are not as their format says. The message lists
        the first ten of them and their number, each with the file, the record's index from 0 (the line, from 1, of a
        file of lines) and the key.
    """
    config = config if isinstance(config, DataConfig) else DataConfig(**vars(config or FormatConfig()))
    if not sources:
        raise InputError(f"no data files are given; accepted are one or more: {ACCEPTED}")
    records: list[AnyRecord] = []
    formats: list[tuple[FormatName, int]] = []
    notes: list[str] = []
    bad, counts = BadRecords(), Counter[str]()
    for source in sources:
        before, name = len(records) + bad.count, config.format
        for where, value in _objects(source, config.fields):
            try:
                if isinstance(value, InputError):
                    raise value
                if not isinstance(value, dict):
                    raise InputError(f"{where} is {kind_of(value)}; accepted is an object")
                given = {key: one for key, one in value.items() if one is not None}  # null is a key that is not there
                if name is None:
                    name, also = _recognised(where, given, config)
                    notes += [f"{source}: read as {name}; it fits {', '.join(also)} as well (--format)"] if also else []
                records.append(FORMATS[name].make(Item(where, given, config.fields, counts)))
            except InputError as error:
                if name is None:  # of what format the others are is not known
                    raise
                bad.add(str(error))
        if name is None or len(records) + bad.count == before:
            raise InputError(f"{source}: holds no records; accepted is one or more")
        formats.append((name, len(records) + bad.count - before))
    bad.check(len(records) + bad.count)
    notes += [NOTES[kind].format(count) for kind, count in counts.items()]
    return RecordSet(records, tuple(formats), config, tuple(notes))


def read_records(sources: Sequence[str | Path], config: FormatConfig | None = None) -> list[AnyRecord]:
    """The records alone that `read_record_set` reads."""
    return read_record_set(sources, config).records


def _recognised(where: str, value: dict[str, Any], config: FormatConfig) -> tuple[FormatName, list[FormatName]]:
    """The format of an object, and others that it fits."""
    found = fitting(value, config.fields)
    if found:
        return found[0], found[1:]
    keys = ", ".join(map(repr, value)) or "none"
    most = max(FORMATS, key=lambda name: sum(config.fields.get(key, key) in value for key in FORMATS[name].keys))
    missing = [config.fields.get(key, key) for key in FORMATS[most].keys]
    missing = [key for key in missing if key not in value]
    if len(missing) < len(FORMATS[most].keys):
        raise InputError(f"{where} has no {missing[0]!r}; its keys are {keys}")
    listed = ", ".join(f"{name} ({', '.join(one.keys)})" for name, one in FORMATS.items())
    raise InputError(f"{where} has the keys {keys}; accepted are {listed}, or other names with --fields")


def _objects(source: str | Path, names: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    """Yield where each record of a source stands, and its value, or the error of a line that is not JSON.

    The source has the ``names`` for fields that are called otherwise here.
    """
    columns = {names.get(key, key) for key in FIELDS}
    part = hub_files.part_of(source) if isinstance(source, str) else None
    if part is not None:
        for path in hub_files.locate_split(part):
            yield from _read(path, path.name if part.place.startswith(hub_files.HUB) else str(path), columns)
    elif isinstance(source, str) and source.startswith(hub_files.HUB):
        yield from _read(_fetch(source), source, columns)
    else:
        yield from _read(Path(source), str(source), columns)


def _fetch(source: str) -> Path:
    parts = source.removeprefix(hub_files.HUB).split("/", 2)
    if len(parts) < 3 or not all(parts):
        raise InputError(
            f"{source}: is not the name of a file or split; accepted are {hub_files.HUB}OWNER/NAME[@REVISION]/FILE and "
            f"{hub_files.HUB}OWNER/NAME[@REVISION][/SUBSET]:SPLIT"
        )
    name, _, revision = parts[1].partition("@")
    accepted = "a file the hub or its cache has"
    return hub_files.fetch(f"{parts[0]}/{name}", parts[2], revision or None, where=f"{source}:", accepted=accepted)


def _read(path: Path, where: str, columns: Container[str]) -> Iterator[tuple[str, Any]]:
    if path.suffix == ".parquet":
        yield from _rows(path, where, columns)
        return
    if os.path.isdir(path):
        raise InputError(f"{where}: is a folder; accepted is {ACCEPTED}")
    text = files.read_text(path, accepted=ACCEPTED)
    if path.suffix == ".txt":
        yield from ((f"{where}: line {number}", {"text": line.removesuffix("\r")}) for number, line in _lines(text))
    elif path.suffix == ".jsonl" or _is_lines(text):
        for number, line in _lines(text):
            place = f"{where}: line {number}"
            try:
                yield place, files.parse_json(line, where=place, accepted="a record a line")
            except InputError as error:  # the lines after it can be read
                yield place, error
    else:
        found = files.parse_json(text, where=where, accepted="a list of records")
        if not isinstance(found, list):
            raise InputError(f"{where}: holds {kind_of(found)}; accepted is a list of records")
        yield from ((f"{where}: record {index}", value) for index, value in enumerate(found))


def _is_lines(text: str) -> bool:
    """Whether a text has an object a line though its name says JSON, as many data sets of the hub do."""
    first, second = [*(line for _, line in itertools.islice(_lines(text), 2)), "", ""][:2]
    return first.startswith("{") and first.rstrip().endswith("}") and (not second or second.startswith("{"))


def _rows(path: Path, where: str, columns: Container[str]) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a Parquet file.

    A column that is not in ``columns`` is not read: its key has the value ``...``.
    """
    data = files.read_bytes(path, accepted=ACCEPTED)
    try:
        import pyarrow
    except ImportError as error:
        raise InputError(f"{where}: {extras.missing_message(error)}") from None
    # A file of some kilobytes may claim anything of its size: a child process reads it first, with limits.
    limits = {"seconds": TABLE_SECONDS, "memory": TABLE_MEMORY + LARGEST_TABLE}
    try:
        limited.run(_check_table, str(path), where, columns, LARGEST_TABLE, **limits)
    except limited.LimitError as error:
        raise InputError(
            f"{where}: reading the table {error}; accepted is one of at most {LARGEST_TABLE:,} bytes"
        ) from None
    names, batches = _open_table(pyarrow.BufferReader(data), where, columns)
    start, others = 0, dict.fromkeys((name for name in names if name not in columns), ...)
    for batch in batches:
        try:
            rows = batch.to_pylist()
        # Text that is not UTF-8, dates out of Python's range, unknown time zones, fields of the same name.
        except (pyarrow.ArrowException, ValueError, ArithmeticError, LookupError, OSError) as error:
            raise InputError(
                f"{where}: a row from {start} on has a value that cannot be read ({first_line(error)}); accepted are "
                "values that JSON has"
            ) from None
        for number, row in enumerate(rows, start):
            yield f"{where}: row {number}", row | others
        start += len(rows)


def _open_table(source: Any, where: str, columns: Container[str]) -> tuple[list[str], Iterator[Any]]:
    """Open a Parquet file: the names of its columns, and batches of those in ``columns``."""
    import pyarrow
    import pyarrow.parquet

    def read() -> Iterator[Any]:
        try:
            yield from file.iter_batches(_ROWS, columns=[name for name in names if name in columns], use_threads=False)
        except MemoryError:  # which pyarrow derives its own of both from
            raise
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise _not_parquet(where, error) from None

    try:
        file = pyarrow.parquet.ParquetFile(source)
        names = file.schema_arrow.names
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: a name that is not UTF-8
        raise _not_parquet(where, error) from None
    for column in file.schema_arrow:
        if column.name in columns and names.count(column.name) > 1:
            raise InputError(f"{where}: has {names.count(column.name)} columns {column.name!r}; accepted is one")
        parts = range(column.type.num_fields)
        if column.name in columns and any("dictionary<" in str(column.type.field(i).type) for i in parts):
            raise InputError(f"{where}: has dictionaries within {column.name!r}; accepted are plain values")
    return names, read()


def _not_parquet(where: str, error: Exception) -> InputError:
    return InputError(f"{where}: is not Parquet ({first_line(error)}); accepted is {ACCEPTED}")


def _check_table(path: str, where: str, columns: Container[str], largest: int) -> Iterator[int]:
    """Read a Parquet file and refuse one of more than ``largest`` bytes; in a child process, see `limited.run`."""
    import pyarrow

    total = 0
    for batch in _open_table(path, where, columns)[1]:
        for column in batch.columns:
            plain = column.dictionary_decode() if isinstance(column, pyarrow.DictionaryArray) else column
            total += plain.nbytes
        if total > largest:
            raise InputError(f"{where}: expands to more than {largest:,} bytes; accepted are tables of at most that")
    yield total


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield the lines of a text that are not blank, with their numbers from 1.

    Lines end at a line feed alone: `str.splitlines` would cut at U+2028 and others within a text. Runs of line feeds
    are skipped without making an object of each line.
    """
    number, end = 1, 0
    for match in re.finditer(r"[^\n]+", text):
        number += text.count("\n", end, match.start())
        end = match.end()
        if match[0].strip():
            yield number, match[0]
