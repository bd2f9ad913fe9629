"""Training records in the schema of LLM-Adapters, from files or a hub's data set; a bad one is named."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rora_theory import files
from rora_theory.errors import InputError

HUB = "hf://datasets/"
"""Begins a hub file's name, ``hf://datasets/OWNER/NAME[@REVISION]/FILE``, as huggingface_hub writes it."""


class Record(NamedTuple):
    """One instruction and the response to learn."""

    instruction: str
    output: str
    input: str = ""


def read_records(sources: Sequence[str | Path]) -> list[Record]:
    """The records of several files, in order.

    Args:
      sources: ``.json`` files (a list of objects), ``.jsonl`` files (an object a line), or names that begin
        with `HUB`, fetched by huggingface_hub or taken from its cache. An object has the strings
        ``instruction`` and ``output``, may have ``input``, and its other keys are not read.

    Raises:
      InputError: a file that is missing, unreadable or empty, or a record that is not as described; the
        message has the file and the record's index from 0.
    """
    if not sources:
        raise InputError("no data files are given; accepted are one or more .json or .jsonl files")
    return [record for source in sources for record in _read(source)]


def _read(source: str | Path) -> list[Record]:
    path = _fetch(source) if isinstance(source, str) and source.startswith(HUB) else Path(source)
    text = files.read_text(path, accepted="a .json or .jsonl file")
    objects = _lines(source, text) if path.suffix == ".jsonl" else _list(source, text)
    if not objects:
        raise InputError(f"{source}: holds no records; accepted is one or more")
    return [_record(source, index, item) for index, item in enumerate(objects)]


def _fetch(source: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    parts = source.removeprefix(HUB).split("/", 2)
    if len(parts) < 3 or not all(parts):
        raise InputError(f"{source}: is not the name of a file; accepted is {HUB}OWNER/NAME[@REVISION]/FILE")
    name, _, revision = parts[1].partition("@")
    try:
        found = hf_hub_download(f"{parts[0]}/{name}", parts[2], repo_type="dataset", revision=revision or None)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"{source}: cannot be fetched ({reason}); accepted is a file the hub or its cache has"
        ) from error
    return Path(found)


def _list(source: str | Path, text: str) -> list[Any]:
    objects = files.parse_json(text, where=str(source), accepted="a list of records")
    if not isinstance(objects, list):
        raise InputError(f"{source}: holds {_name(objects)}; accepted is a list of records")
    return objects


def _lines(source: str | Path, text: str) -> list[Any]:
    return [
        files.parse_json(line, where=f"{source}: line {number}", accepted="a record a line")
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    ]


def _record(source: str | Path, index: int, item: Any) -> Record:
    if not isinstance(item, dict):
        raise InputError(f"{source}: record {index} is {_name(item)}; accepted is an object")
    for key in ("instruction", "output"):
        if key not in item:
            keys = ", ".join(map(repr, item)) or "none"
            raise InputError(f"{source}: record {index} has no {key!r}; its keys are {keys}")
    record = Record(item["instruction"], item["output"], item.get("input", ""))
    for key, value in record._asdict().items():
        if not isinstance(value, str):
            raise InputError(f"{source}: record {index} has {_name(value)} as {key!r}; accepted is a string")
        if not value and key != "input":
            raise InputError(f"{source}: record {index} has an empty {key!r}; accepted is a string that is not empty")
        if not _is_text(value):
            raise InputError(f"{source}: record {index} has half a surrogate pair in {key!r}; accepted is Unicode text")
    return record


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _name(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return kinds.get(type(value), "a number")
