"""Read training records from files, folders and the hub's data sets.

A bad record is refused with an error that names its file, its place in the file and the key.
"""

import itertools
import os
import re
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, time
from functools import cached_property
from pathlib import Path
from typing import Any, cast, get_args

from rora_theory import extras
from rora_theory.chat_templates import ChatTemplate, template_digest
from rora_theory.errors import InputError, first_line
from rora_theory.lab.data import hub_files
from rora_theory.lab.data.chat import load_chat_template, read_template_source
from rora_theory.lab.data.formats import (
    FIELD_NAMES,
    FORMATS,
    TRAIN_TEMPLATES,
    AnyRecord,
    FormatName,
    RawRecord,
    Record,
    RecordErrors,
    TrainTemplate,
    json_type,
    matching_formats,
    records_digest,
)
from rora_theory.runs import files
from rora_theory.scaling import check_choice
from rora_theory.validation.ranges import Natural, check_ranges

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

CONVERSION_NOTES = {
    "arguments": "{:,} tool calls have their arguments as a JSON string. They were parsed, because chat templates "
    "expect an object.",
    "weight": "{:,} turns have weight 0. They are not in the loss.",
}
"""Notes about conversions, by the kind that `formats.RawRecord` counts."""

SUPPORTED_SOURCES = "a .json, .jsonl, .parquet or .txt file, or a split as FOLDER:SPLIT"

_BATCH_ROWS = 1024


@dataclass(frozen=True)
class FormatConfig:
    """Format of training records.

    Raises:
      InputError: The format or a field does not exist.
    """

    format: FormatName | None = None
    """Format of the records: messages (OpenAI's chats), sharegpt, alpaca, prompt-response, prompt-completion,
    conversational (prompt and completion as lists of messages) or text; by default detected from the first record's
    keys"""
    fields: dict[str, str] = field(default_factory=dict)
    """Your data's names of fields, where they differ: --fields instruction question output answer"""

    def __post_init__(self) -> None:
        """Validate the fields."""
        if self.format is not None:
            check_choice("format", self.format, get_args(FormatName))
        for name in self.fields:
            check_choice("fields", name, FIELD_NAMES)


@dataclass(frozen=True)
class DataConfig(FormatConfig):
    """Format of training records, and settings that turn chats into text.

    Raises:
      InputError: A value is out of range, or the template or the date cannot be read.
    """

    chat_template: str | None = None
    """Jinja file of the chat template, or chatml; by default the model's own template"""
    chat_date: str | None = None
    """Date that the chat template sees, as YYYY-MM-DD; by default today"""
    show: Natural = 0
    """Number of training prompts to print, with the parts in the loss marked"""

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        check_ranges(self, str)
        # Read the template and parse the date, so that a bad one is refused before work starts.
        if self.chat_template is not None:
            read_template_source(self.chat_template)
        _ = self.now

    def identity(self) -> dict[str, str]:
        """Return the settings that determine prompts, apart from the records and the model."""
        digest = None
        if self.chat_template is not None:
            digest = template_digest(read_template_source(self.chat_template))
        settings = {"chat_template_sha256": digest, "chat_date": self.chat_date}
        return {name: value for name, value in settings.items() if value is not None}

    @property
    def now(self) -> datetime:
        """Return the time that chat templates see: noon of the day, so that runs of one day are equal."""
        try:
            day = date.today() if self.chat_date is None else date.fromisoformat(self.chat_date)
        except ValueError:
            raise InputError(f"chat_date must be a date as YYYY-MM-DD, got {self.chat_date!r}") from None
        return datetime.combine(day, time(12))


@dataclass(frozen=True)
class RecordSet:
    """Records of several sources.

    Attributes:
      records: Records of all sources in order.
      formats: Format and number of records of each source.
      config: Settings with which the records were read.
      notes: Notes about conversions and about formats that were ambiguous.
    """

    records: list[AnyRecord]
    formats: tuple[tuple[FormatName, int], ...]
    config: DataConfig
    notes: tuple[str, ...] = ()

    @cached_property
    def sha256(self) -> str:
        """Return the digest of all records, see `formats.records_digest`."""
        return records_digest(self.records)

    def template(self, name: str | None) -> TrainTemplate:
        """Return the template with a name, or the default of the formats.

        Raises:
          InputError: The template does not exist, or the sources' formats have different defaults.
        """
        if name is not None:
            check_choice("template", name, TRAIN_TEMPLATES)
            return cast(TrainTemplate, name)
        defaults = list(dict.fromkeys(FORMATS[form].default_template for form, _ in self.formats))
        if len(defaults) > 1:
            listed = ", ".join(f"{form} ({FORMATS[form].default_template})" for form, _ in dict.fromkeys(self.formats))
            raise InputError(f"template must be given for formats with different defaults, got None for {listed}")
        return defaults[0]

    def chat(self, tokenizer: Any, template: str | None) -> ChatTemplate | None:
        """Return the configured chat template, or the model's; None unless ``template`` is ``chat``.

        Raises:
          InputError: There is no chat template. The message lists what can be chosen.
        """
        if template != "chat":
            return None
        return load_chat_template(tokenizer, self.config.chat_template, self.config.now)

    def identity(self, chat: ChatTemplate | None) -> dict[str, str]:
        """Return the digests of the records and the chat template, by which a run recognises its data."""
        return {"records_sha256": self.sha256} | (chat.identity() if chat is not None else {})

    @property
    def summary(self) -> str:
        """Return a sentence with the number of records of each format."""
        counts: Counter[str] = Counter()
        for name, count in self.formats:
            counts[name] += count
        listed = ", ".join(f"{count:,} as {name}" for name, count in counts.items())
        detected = "detected from the first record's keys; --format selects another"
        return f"records: {listed} ({'selected with --format' if self.config.format else detected})"


@dataclass
class FilesRead:
    """Files that have been read, none of which may be read again.

    A record that is read twice could be in both the training and the validation data.

    Attributes:
      argument: Name of the argument that lists the sources, for errors.
      sources: Source of each file, by the device and inode of the file.
    """

    argument: str = "data"
    sources: dict[tuple[int, int], str | Path] = field(default_factory=dict)

    def add(self, source: str | Path, paths: Sequence[Path]) -> None:
        """Add the files of a source.

        Raises:
          InputError: A file belongs to an earlier source.
        """
        identities = set()
        for path in paths:
            # The file system's identity also detects links and other spellings of a path.
            try:
                status = path.stat()
            except (OSError, ValueError):  # reported when the file is read
                continue
            identity = (status.st_dev, status.st_ino)
            if identity in self.sources:
                raise InputError(
                    f"{self.argument} must not name a file twice, got {path} in {self.sources[identity]} and {source}. "
                    "Remove one of them."
                )
            identities.add(identity)
        self.sources.update(dict.fromkeys(identities, source))


def read_record_set(
    sources: Sequence[str | Path], config: FormatConfig | None = None, *, files_read: FilesRead | None = None
) -> RecordSet:
    """Read the records of several sources.

    A source is a file or a split of a data set:

    - a ``.json`` file (a list of objects, or one object a line), a ``.jsonl`` file (one object a line), a ``.parquet``
      file (one record a row) or a ``.txt`` file (one record a line);
    - a file of the hub or its cache, as ``hf://datasets/OWNER/NAME[@REVISION]/FILE``;
    - a split of a folder, as ``FOLDER:SPLIT``, or of a data set on the hub, as
      ``hf://datasets/OWNER/NAME[@REVISION][/SUBSET]:SPLIT``.

    Keys that are not fields of the format are not read.

    Args:
      sources: Files and splits.
      config: Settings; None selects the defaults.
      files_read: Files of earlier sources, to which those of these sources are added; None stands for no file.

    Returns:
      The records of all sources in order.

    Raises:
      InputError: A file is missing, unreadable or empty, or belongs to two sources, or records do not follow their
        format. The message lists the first ten of these records and their number, each with the file, the record's
        index from 0 (in a file of lines, the line from 1) and the key.
    """
    config = config if isinstance(config, DataConfig) else DataConfig(**vars(config or FormatConfig()))
    if not sources:
        raise InputError(f"data must name at least one source: {SUPPORTED_SOURCES}")
    # One pass over all sources, which collects errors and reports them together.
    records: list[AnyRecord] = []
    formats: list[tuple[FormatName, int]] = []
    notes: list[str] = []
    errors, conversions = RecordErrors(), Counter[str]()
    files_read = FilesRead() if files_read is None else files_read
    # Columns of a table that may be fields of a record.
    columns = {config.fields.get(key, key) for key in FIELD_NAMES}
    for source in sources:
        located = _locate_source(source)
        files_read.add(source, [path for path, _ in located])
        count_before, format_name = len(records) + errors.count, config.format
        for where, value in itertools.chain.from_iterable(_read_file(path, name, columns) for path, name in located):
            try:
                if isinstance(value, InputError):  # of a line that is not JSON
                    raise value
                if not isinstance(value, dict):
                    raise InputError(f"{where} must be an object, got {json_type(value)}")
                # Parquet has every key in every row, so a null value means that the key is absent.
                present = {key: item for key, item in value.items() if item is not None}
                # The first record of a source selects the format of all of them.
                if format_name is None:
                    format_name, *alternatives = _detect_formats(where, present, config)
                    if alternatives:
                        listed = ", ".join(alternatives)
                        notes.append(f"{source}: read as {format_name}; it also matches {listed} (--format)")
                records.append(FORMATS[format_name].parse(RawRecord(where, present, config.fields, conversions)))
            except InputError as error:
                # Without a format, the other records cannot be checked.
                if format_name is None:
                    raise
                errors.add(str(error))
        if format_name is None or len(records) + errors.count == count_before:
            raise InputError(f"{source}: has no records. Pass a source with at least one.")
        formats.append((format_name, len(records) + errors.count - count_before))
    # Many bad records are reported in one error, which counts them.
    errors.raise_if_any(len(records) + errors.count)
    notes += [CONVERSION_NOTES[kind].format(count) for kind, count in conversions.items()]
    return RecordSet(records, tuple(formats), config, tuple(notes))


def read_records(sources: Sequence[str | Path], config: FormatConfig | None = None) -> list[AnyRecord]:
    """Read the records of several sources, see `read_record_set`."""
    return read_record_set(sources, config).records


def _detect_formats(where: str, value: dict[str, Any], config: FormatConfig) -> list[FormatName]:
    """Return the formats that an object matches, and raise `InputError` if there are none."""
    matches = matching_formats(value, config.fields)
    if matches:
        return matches
    keys = ", ".join(map(repr, value)) or "none"
    # If some of a format's keys are there, name the missing one of the format with the most.
    required = {name: [config.fields.get(key, key) for key in form.required_keys] for name, form in FORMATS.items()}
    closest = max(required.values(), key=lambda names: sum(name in value for name in names))
    missing = [name for name in closest if name not in value]
    if len(missing) < len(closest):
        raise InputError(f"{where} has no {missing[0]!r}; its keys are {keys}")
    listed = ", ".join(f"{name} ({', '.join(form.required_keys)})" for name, form in FORMATS.items())
    raise InputError(f"{where}: keys must match a format, got {keys}. Formats: {listed}. Rename fields with --fields.")


def _locate_source(source: str | Path) -> list[tuple[Path, str]]:
    """Return the files of a source with their names for errors; files on the hub are downloaded."""
    # A source is a split of several files, one file on the hub, or a local file.
    split = hub_files.parse_split(source) if isinstance(source, str) else None
    if split is not None:
        on_hub = split.place.startswith(hub_files.HUB_PREFIX)
        return [(path, path.name if on_hub else str(path)) for path in hub_files.locate_split(split)]
    if isinstance(source, str) and source.startswith(hub_files.HUB_PREFIX):
        return [(_download(source), source)]
    return [(Path(source), str(source))]


def _download(source: str) -> Path:
    parts = source.removeprefix(hub_files.HUB_PREFIX).split("/", 2)
    if len(parts) < 3 or not all(parts):
        data_set = f"{hub_files.HUB_PREFIX}OWNER/NAME[@REVISION]"
        raise InputError(
            f"{source}: not the name of a file or split. Pass {data_set}/FILE or {data_set}[/SUBSET]:SPLIT."
        )
    owner, name, file = parts
    name, _, revision = name.partition("@")
    return hub_files.download_file(f"{owner}/{name}", file, revision or None, where=source)


def _read_file(path: Path, where: str, columns: Container[str]) -> Iterator[tuple[str, Any]]:
    """Yield the place and the value of each record of a file, by the kind that its suffix names.

    The value of a line that is not JSON is the error.
    """
    if path.suffix == ".parquet":
        yield from _read_table(path, where, columns)
        return
    if os.path.isdir(path):
        raise InputError(f"{where}: is a folder. Pass {SUPPORTED_SOURCES}.")
    text = files.read_text(path, accepted=SUPPORTED_SOURCES)
    if path.suffix == ".txt":
        for number, line in _numbered_lines(text):
            yield f"{where}: line {number}", {"text": line.removesuffix("\r")}
    # Files named .json may hold a record per line, too.
    elif path.suffix == ".jsonl" or _has_json_lines(text):
        for number, line in _numbered_lines(text):
            place = f"{where}: line {number}"
            # A line that is not JSON is yielded as an error, so that the lines after it are read as well.
            try:
                yield place, files.parse_json(line, where=place, accepted="a record a line")
            except InputError as error:
                yield place, error
    else:
        values = files.parse_json(text, where=where, accepted="a list of records")
        if not isinstance(values, list):
            raise InputError(f"{where}: must hold a list of records, got {json_type(values)}")
        for index, value in enumerate(values):
            yield f"{where}: record {index}", value


def _has_json_lines(text: str) -> bool:
    """Return whether a ``.json`` file has one object a line, as in many data sets of the hub."""
    first, second = [*(line for _, line in itertools.islice(_numbered_lines(text), 2)), "", ""][:2]
    return first.startswith("{") and first.rstrip().endswith("}") and (not second or second.startswith("{"))


def _read_table(path: Path, where: str, columns: Container[str]) -> Iterator[tuple[str, Any]]:
    """Yield the place and the value of each row of a Parquet file.

    A column that is not in ``columns`` is not read. Its key has the value ``...``.
    """
    data = files.read_bytes(path, accepted=SUPPORTED_SOURCES)
    try:
        import pyarrow
    except ImportError as error:
        raise InputError(f"{where}: {extras.missing_message(error)}") from None
    names, batches = _open_table(pyarrow.BufferReader(data), where, columns)
    start, unread = 0, dict.fromkeys((name for name in names if name not in columns), ...)
    for batch in batches:
        try:
            rows = batch.to_pylist()
        # Text that is not UTF-8, dates out of Python's range, unknown time zones, fields with the same name.
        except (pyarrow.ArrowException, ValueError, ArithmeticError, LookupError, OSError) as error:
            raise InputError(
                f"{where}: a row from {start} on has a value that cannot be converted to JSON ({first_line(error)})"
            ) from None
        for number, row in enumerate(rows, start):
            yield f"{where}: row {number}", row | unread
        start += len(rows)


def _open_table(source: Any, where: str, columns: Container[str]) -> tuple[list[str], Iterator[Any]]:
    """Open a Parquet file.

    Args:
      source: Path or buffer that pyarrow reads.
      where: Name of the file, for the errors.
      columns: Columns to read.

    Returns:
      The names of all columns, and batches of those in ``columns``.

    Raises:
      InputError: The file is not Parquet, or has a column twice or with values that cannot be measured.
    """
    import pyarrow
    import pyarrow.parquet

    def read_batches() -> Iterator[Any]:
        selected = [name for name in names if name in columns]
        try:
            yield from file.iter_batches(_BATCH_ROWS, columns=selected, use_threads=False)
        except MemoryError:  # pyarrow's own is also an ArrowException
            raise
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise _not_parquet(where, error) from None

    try:
        file = pyarrow.parquet.ParquetFile(source)
        names = file.schema_arrow.names
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: a name that is not UTF-8
        raise _not_parquet(where, error) from None
    for column in file.schema_arrow:
        if column.name not in columns:
            continue
        if names.count(column.name) > 1:
            raise InputError(f"{where}: must have one column {column.name!r}, got {names.count(column.name)}")
    return names, read_batches()


def _not_parquet(where: str, error: Exception) -> InputError:
    return InputError(f"{where}: not a Parquet file ({first_line(error)}). Pass {SUPPORTED_SOURCES}.")


def _numbered_lines(text: str) -> Iterator[tuple[int, str]]:
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
