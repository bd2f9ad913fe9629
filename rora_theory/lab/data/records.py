"""Read training records from files, folders and the hub's data sets, by the library `datasets`.

A bad record is refused with an error that names its file, its place in the file and the key.
"""

import glob
import itertools
import json
import os
import tempfile
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date, datetime, time
from functools import cached_property
from pathlib import Path
from typing import Any, cast, get_args

from rora_theory import extras
from rora_theory.chat_templates import ChatTemplate, template_digest
from rora_theory.errors import InputError, first_line
from rora_theory.lab.data import hub_files, texts
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
    matching_format,
    records_digest,
)
from rora_theory.runs import files
from rora_theory.scaling import check_choice
from rora_theory.validation.ranges import Natural, check_ranges
from rora_theory.validation.rules import check_list

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

SUPPORTED_SOURCES = "a .json, .jsonl, .csv, .parquet or .txt file, or a split as FOLDER:SPLIT"

READERS = {".csv": "csv", ".parquet": "parquet", ".txt": "text"}
"""Readers of `datasets` by the suffix of a file. Others are JSON: a list of objects, or one object a line."""


BATCH_ROWS = 1000
"""Number of rows that are converted to objects at once."""


@dataclass(frozen=True)
class FormatConfig:
    """Format of training records.

    Raises:
      InputError: The format or a field does not exist.
    """

    format: FormatName | None = None
    """Format of the records: messages (OpenAI's chats), sharegpt, alpaca, prompt-completion or text; by default
    detected from the first record's keys"""
    fields: dict[str, str] = field(default_factory=dict)
    """Your data's names of fields, where they differ: --fields instruction question output answer"""

    def __post_init__(self) -> None:
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
        super().__post_init__()
        check_ranges(self)
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
    """

    records: list[AnyRecord]
    formats: tuple[tuple[FormatName, int], ...]
    config: DataConfig

    @cached_property
    def sha256(self) -> str:
        """Return the digest of all records, see `formats.records_digest`."""
        return records_digest(self.records)

    def template(self, name: str | None) -> TrainTemplate:
        """Return the template with a name, or the default of the records' kind.

        Raises:
          InputError: The template does not exist, or the records' kinds have different defaults.
        """
        if name is not None:
            check_choice("template", name, TRAIN_TEMPLATES)
            return cast(TrainTemplate, name)
        return texts.default_template(self.records)

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
        detected = "detected from the first record's keys; format selects another"
        return f"records: {listed} ({'selected by format' if self.config.format else detected})"


def check_named_once(argument: str, sources: Sequence[str | Path]) -> None:
    """Raise `InputError` if a source is named twice, also by a link: it could be trained on and held out."""
    check_list(argument, [os.path.realpath(source) for source in sources])


def read_record_set(sources: Sequence[str | Path], config: FormatConfig | None = None) -> RecordSet:
    """Read the records of several sources.

    A source is a file or a split of a data set:

    - a ``.json`` file (a list of objects, or one object a line), a ``.jsonl`` file (one object a line), a ``.csv`` or
      ``.parquet`` file (one record a row) or a ``.txt`` file (one record a line);
    - a file of the hub or its cache, as ``hf://datasets/OWNER/NAME[@REVISION]/FILE``;
    - a split of a folder, as ``FOLDER:SPLIT``, or of a data set on the hub, as
      ``hf://datasets/OWNER/NAME[@REVISION][/SUBSET]:SPLIT``.

    Keys that are not fields of the format are not read.

    Args:
      sources: Files and splits.
      config: Settings; None selects the defaults.

    Returns:
      The records of all sources in order.

    Raises:
      InputError: A file is missing, unreadable or empty, a source is named twice, or records do not follow their
        format. The message lists the first ten of these records and their number, each with the file, the record's
        number from 1 (in a text file, the line's) and the key.
    """
    config = config if isinstance(config, DataConfig) else DataConfig(**vars(config or FormatConfig()))
    if not sources:
        raise InputError(f"data must name at least one source: {SUPPORTED_SOURCES}")
    check_named_once("data", sources)
    # One pass over all sources, which collects errors and reports them together.
    records: list[AnyRecord] = []
    formats: list[tuple[FormatName, int]] = []
    errors = RecordErrors()
    # Columns of a table that may be fields of a record.
    columns = {config.fields.get(key, key) for key in FIELD_NAMES}
    for source in sources:
        located = _locate_source(source)
        count_before, format_name = len(records) + errors.count, config.format
        for where, value in itertools.chain.from_iterable(_read_file(path, name, columns) for path, name in located):
            try:
                # A table has every key in every row, so a null value means that the key is absent.
                present = {key: item for key, item in value.items() if item is not None}
                # The first record of a source selects the format of all of them.
                format_name = format_name or _detect_format(where, present, config)
                records.append(FORMATS[format_name].parse(RawRecord(where, present, config.fields)))
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
    return RecordSet(records, tuple(formats), config)


def read_records(sources: Sequence[str | Path], config: FormatConfig | None = None) -> list[AnyRecord]:
    """Read the records of several sources, see `read_record_set`."""
    return read_record_set(sources, config).records


def _detect_format(where: str, value: dict[str, Any], config: FormatConfig) -> FormatName:
    match = matching_format(value, config.fields)
    if match is None:
        keys = ", ".join(map(repr, value)) or "none"
        listed = ", ".join(f"{name} ({', '.join(form.required_keys)})" for name, form in FORMATS.items())
        raise InputError(
            f"{where}: keys must match a format, got {keys}. Formats: {listed}. Pass the names of the fields as fields."
        )
    return match


def _locate_source(source: str | Path) -> list[tuple[Path, str]]:
    """Return the files of a source with their names for errors; files on the hub are downloaded."""
    # A source is a split of several files, one file on the hub, or a local file.
    split = hub_files.parse_split(source) if isinstance(source, str) else None
    if split is not None:
        on_hub = split.place.startswith(hub_files.HUB_PREFIX)
        return [(path, path.name if on_hub else str(path)) for path in hub_files.locate_split(split)]
    if isinstance(source, str) and source.startswith(hub_files.HUB_PREFIX):
        return [(hub_files.download_file(source), source)]
    return [(Path(source), str(source))]


def _read_file(path: Path, where: str, columns: Container[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place and the value of each record of a file, by the kind that its suffix names.

    Of a Parquet file, only ``columns`` are read; other keys have the value ``...``.
    """
    # `datasets` does not name a folder or a missing file in one line.
    files.check_regular(path, accepted=SUPPORTED_SOURCES)
    reader = READERS.get(path.suffix, "json")
    table = _load_table(path, reader, where)
    unread: dict[str, Any] = {}
    if reader == "parquet":
        # Other columns may be large, such as images, or hold values that Python does not have.
        unread = dict.fromkeys((name for name in table.column_names if name not in columns), ...)
        table = table.remove_columns(list(unread))
        if not table.column_names:
            yield f"{where}: record 1", unread
            return
    number = 0
    try:
        for batch in table.iter(BATCH_ROWS):
            for values in zip(*batch.values(), strict=True):
                number += 1
                record = dict(zip(batch, values, strict=True)) | unread
                # Blank lines of a text separate its records.
                if reader != "text" or record["text"].strip():
                    yield f"{where}: record {number}", record
    except (ValueError, ArithmeticError, LookupError, OSError) as error:
        # Text that is not UTF-8, dates out of Python's range, unknown time zones.
        raise InputError(
            f"{where}: a record after {number} has a value that Python cannot hold ({first_line(error)})"
        ) from None


def _load_table(path: Path, reader: str, where: str) -> Any:
    """Load a file by `datasets`, in memory and without its cache."""
    datasets = extras.import_extra("datasets")
    options: dict[str, Any] = {}
    try:
        if reader == "csv":
            # Cells are text: without types, an answer such as 007 would become a number.
            import pandas as pd  # half a second that `rora transfer` need not wait

            names = pd.read_csv(path, nrows=0).columns
            options["features"] = datasets.Features({name: datasets.Value("string") for name in names})
            options["keep_default_na"] = False
        elif reader == "text":
            options["encoding"] = "utf-8-sig"
        elif reader == "json":
            # One chunk, because the columns of a file are those of its first chunk.
            options["chunksize"] = max(os.path.getsize(path), 1)
        with _quietly(datasets), tempfile.TemporaryDirectory() as cache:
            # Unlike `load_dataset`, which reports each file that it reads to a server.
            read = getattr(datasets.Dataset, f"from_{reader}")
            return read(glob.escape(str(path.absolute())), cache_dir=cache, keep_in_memory=True, **options)
    except Exception as error:  # of the parsers of every kind of file
        if "corresponds to no data" in str(error):
            return datasets.Dataset.from_dict({})
        number = _find_bad_object(path) if reader == "json" else None
        if number is not None:
            raise InputError(f"{where}: record {number} is not a JSON object. Pass {SUPPORTED_SOURCES}.") from None
        raise InputError(
            f"{where}: cannot be read as {reader} ({first_line(error.__cause__ or error)}). Pass {SUPPORTED_SOURCES}."
        ) from None


def _find_bad_object(path: Path) -> int | None:
    """Return the number of the first element of a list, or line, that is no JSON object, from 1; None if unknown."""

    def parse(text: str) -> Any:
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return None

    text = path.read_text(errors="replace")
    values = parse(text)
    if values is None and not text.lstrip().startswith("["):
        values = [parse(line) for line in text.split("\n") if line.strip()]
    if not isinstance(values, list):
        return None
    return next((number for number, value in enumerate(values, 1) if not isinstance(value, dict)), None)


@contextmanager
def _quietly(datasets: Any) -> Iterator[None]:
    """Hide progress bars, and logs of errors that the exceptions repeat."""
    verbosity, shows_bars = datasets.logging.get_verbosity(), not datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if shows_bars:
            datasets.enable_progress_bars()
