"""A command's options by name: those of a YAML file as words of a command line."""

import dataclasses
import itertools
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import tyro
import yaml

from rora_theory.errors import InputError, shown
from rora_theory.io import files

FILE = "--config"
LARGEST = 1 << 16
"""Maximum size of a file of options, in bytes."""


def of(config: type) -> dict[str, Any]:
    """Every option of a dataclass and of the dataclasses in it, with its type; positional and fixed ones are none."""
    hints = typing.get_type_hints(config, include_extras=True)
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        hint, name = hints[field.name], field.name
        if dataclasses.is_dataclass(hint):
            found |= of(typing.cast(type, hint))
            continue
        if get_origin(hint) is typing.Annotated:
            hint, *settings = get_args(hint)
            if tyro.conf.Positional in settings or tyro.conf.Fixed in settings:
                continue
            name = next((one.name for one in settings if getattr(one, "name", None)), name)
        found[name.replace("_", "-")] = hint
    return found


def check_words(words: Sequence[str], known: Mapping[str, Any]) -> None:
    """Refuse flags with a value.

    Raises:
      InputError: A flag has a value.
    """
    for word, following in itertools.pairwise([*words, ""]):
        name, equals, value = word.partition("=")
        if not name.startswith("--"):
            continue
        option = name[2:].replace("_", "-")
        value = value if equals else following
        if known.get(option) is bool and (equals or value.lower() in ("true", "false")):
            raise InputError(f"{name} is a flag and takes no {value!r}; accepted are --{option} and --no-{option}")


class FileOptions(typing.NamedTuple):
    """The words that a file's options are, and where they stand."""

    path: Path
    words: dict[str, list[str]]

    def place(self, message: str) -> str:
        """An error's message, with the file and the key before it where it is about an option from here."""
        for key in self.words:
            if re.search(rf"(^|--){key.replace('-', '[-_]')}(?![\w-])", message):
                return f"{self.path}: key {key}: {message}"
        return message


def place(message: str, read: Sequence[FileOptions]) -> str:
    """Return an error's message, with the file and the key before it where it is about an option from a file."""
    for file in read:
        message = file.place(message)
    return message


def expand(words: Sequence[str], known: Mapping[str, Any]) -> tuple[list[str], list[FileOptions]]:
    """Replace each ``--config FILE`` of a command line by the options in that file.

    A later file overrides an earlier one, and the command line overrides all files.

    Args:
      words: The command line.
      known: Options of the command, as `of` returns them.

    Returns:
      The words, and the options that each file gives.

    Raises:
      InputError: a file that is no mapping of options in YAML, or a key that is none; names the file and the key.
    """
    rest, paths = _take_files(words)
    given = {word[2:].partition("=")[0].replace("_", "-") for word in rest if word[:2] == "--"}
    read = [_read(path, known) for path in paths]
    for file in reversed(read):  # the last file that has an option gives it
        for key in list(file.words):
            if key in given or f"no-{key}" in given:
                del file.words[key]
        given |= file.words.keys()
    return rest + [word for file in read for part in file.words.values() for word in part], read


def _take_files(words: Sequence[str]) -> tuple[list[str], list[Path]]:
    """Split a command line into the other words and the files of options. An option without a value stays."""
    rest: list[str] = []
    paths: list[Path] = []
    remaining = iter(words)
    for word in remaining:
        name, equals, path = word.partition("=")
        value = (path if equals else next(remaining, None)) if name == FILE else None
        if value is None:
            rest.append(word)
        else:
            paths.append(Path(value))
    return rest, paths


def _read(path: Path, known: Mapping[str, Any]) -> FileOptions:
    accepted = "a YAML file of options by their names"
    text = files.read_text(path, LARGEST, accepted=accepted)
    entries = files.parse_yaml(text, where=str(path), accepted=accepted)
    if not isinstance(entries, dict):
        raise InputError(f"{path}: holds {shown(entries)}; accepted is {accepted}")
    options = [str(key.value).replace("_", "-") for key, _ in yaml.compose(text).value]
    read = FileOptions(path, {})
    for key, value in entries.items():
        option = str(key).replace("_", "-")
        if options.count(option) > 1:  # the parser would take the last
            raise InputError(f"{path}: key {option}: is there {options.count(option)} times; accepted is once")
        if option not in known:
            raise InputError(f"{path}: key {key}: is no option; accepted are {', '.join(known)}")
        read.words[option] = list(_words(path, option, value, known[option]))
    return read


def _words(path: Path, option: str, value: Any, hint: Any) -> Iterator[str]:
    """One entry as the words that give it on a command line."""
    if hint is bool:
        if not isinstance(value, bool):
            raise InputError(f"{path}: key {option}: is {shown(value)}; accepted are true and false")
        yield f"--{option}" if value else f"--no-{option}"
        return
    if isinstance(value, dict):
        value = [part for pair in value.items() for part in pair]
    if isinstance(value, list):
        if not _takes_several(hint):
            raise InputError(f"{path}: key {option}: is {shown(value)}; accepted is one value")
        yield from (f"--{option}", *map(str, value))
    else:
        yield f"--{option}={value}"


def _takes_several(hint: Any) -> bool:
    return get_origin(hint) in (tuple, dict) or any(map(_takes_several, get_args(hint)))
