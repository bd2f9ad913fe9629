"""Options of a command by name, and files of options as words of the command line."""

import dataclasses
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import tyro

from rora_theory.errors import InputError, shown
from rora_theory.runs import files

CONFIG_OPTION = "--config"
"""Option that names a file of options."""


def options_of(config: type) -> dict[str, Any]:
    """Return the types of a dataclass's options by name, including those of nested dataclasses.

    Positional and fixed fields are not options.
    """
    hints = typing.get_type_hints(config, include_extras=True)
    types: dict[str, Any] = {}
    # Options of nested dataclasses appear under their own names.
    for field in dataclasses.fields(config):
        hint, name = hints[field.name], field.name
        if dataclasses.is_dataclass(hint):
            types |= options_of(typing.cast(type, hint))
            continue
        # Settings of tyro: positional and fixed fields are no options, others may be renamed.
        if get_origin(hint) is typing.Annotated:
            hint, *settings = get_args(hint)
            if tyro.conf.Positional in settings or tyro.conf.Fixed in settings:
                continue
            name = next((setting.name for setting in settings if getattr(setting, "name", None)), name)
        types[name.replace("_", "-")] = hint
    return types


def check_words(words: Sequence[str], known: Mapping[str, Any]) -> None:
    """Refuse two common mistakes: a flag with a value, and a list separated by commas.

    Args:
      words: Command line.
      known: Types of the command's options, see `options_of`.

    Raises:
      InputError: If a word is one of these mistakes; the message shows the correct form.
    """
    name, hint = "", None
    for word in words:
        # Values belong to the last option before them.
        value, equals = word, ""
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            hint = known.get(name[2:].replace("_", "-"))
        if hint is bool and (equals or value.lower() in ("true", "false")):
            option = name[2:].replace("_", "-")
            raise InputError(f"{name} is a flag and takes no value, got {value!r}. Use --{option} or --no-{option}.")
        if "," in value and _takes_several(hint) and not {str, Path} & _plain_types(hint):
            spaced = value.replace(",", " ")
            raise InputError(f"{name} takes values separated by spaces, got {value!r}. Use {name} {spaced}.")


class FileOptions(typing.NamedTuple):
    """The options that a file sets.

    Attributes:
      path: Path of the file.
      words: Words of the command line by option.
    """

    path: Path
    words: dict[str, list[str]]


def add_place(message: str, option_files: Sequence[FileOptions], known: Mapping[str, Any]) -> str:
    """Prefix an error message with the file and the key of the option that it is about, if a file sets that option.

    Args:
      message: Error message; the first option that it names is the one that it is about.
      option_files: Options of the files.
      known: Types of the command's options, see `options_of`.

    Returns:
      The message, with the file and the key in front if a file sets the option.
    """
    names = (name.replace("_", "-") for name in re.findall(r"(?:^|--)(\w[\w-]*)", message))
    option = next((name for name in names if name in known), None)
    for file in option_files:
        if option in file.words:
            return f"{file.path}: key {option}: {message}"
    return message


def expand(words: Sequence[str], known: Mapping[str, Any]) -> tuple[list[str], list[FileOptions]]:
    """Replace each ``--config FILE`` of a command line by the options in that file.

    A later file overrides an earlier one, and the command line overrides all files.

    Args:
      words: Command line.
      known: Types of the command's options, see `options_of`.

    Returns:
      The words, and the options that each file sets.

    Raises:
      InputError: If a file is not a mapping of options in YAML, or a key is not an option; the message names the file
        and the key.
    """
    rest, paths = _split_files(words)
    overriding_options = {word[2:].partition("=")[0].replace("_", "-") for word in rest if word[:2] == "--"}
    option_files = [_read(path, known) for path in paths]
    # Remove what the command line or a later file overrides.
    for file in reversed(option_files):
        for key in list(file.words):
            if key in overriding_options or f"no-{key}" in overriding_options:
                del file.words[key]
        overriding_options |= file.words.keys()
    return rest + [word for file in option_files for words in file.words.values() for word in words], option_files


def _split_files(words: Sequence[str]) -> tuple[list[str], list[Path]]:
    """Separate the paths of ``--config`` from the other words; ``--config`` without a path is left for the parser."""
    rest: list[str] = []
    paths: list[Path] = []
    remaining = iter(words)
    for word in remaining:
        name, equals, path = word.partition("=")
        value = (path if equals else next(remaining, None)) if name == CONFIG_OPTION else None
        if value is None:
            rest.append(word)
        else:
            paths.append(Path(value))
    return rest, paths


def _read(path: Path, known: Mapping[str, Any]) -> FileOptions:
    accepted = "a YAML file of options by their names"
    text = files.read_text(path, accepted=accepted)
    entries = files.parse_yaml(text, where=str(path), accepted=accepted)
    if not isinstance(entries, dict):
        raise InputError(f"{path}: must be a mapping from options to values, got {shown(entries)}")
    file = FileOptions(path, {})
    for key, value in entries.items():
        option = str(key).replace("_", "-")
        if option in file.words:
            raise InputError(f"{path}: key {option}: must be set once, got twice")
        if option not in known:
            raise InputError(f"{path}: key {key}: unknown option; supported: {', '.join(known)}")
        file.words[option] = list(_words_of(path, option, value, known[option]))
    return file


def _words_of(path: Path, option: str, value: Any, hint: Any) -> Iterator[str]:
    """Yield the words of the command line that set an option to a value."""
    if hint is bool:
        if not isinstance(value, bool):
            raise InputError(f"{path}: key {option}: must be true or false, got {shown(value)}")
        yield f"--{option}" if value else f"--no-{option}"
        return
    # Mappings and lists are several words; a single value is joined to its option, as it may begin with a hyphen.
    if isinstance(value, dict):
        value = [part for pair in value.items() for part in pair]
    if isinstance(value, list):
        if not _takes_several(hint):
            raise InputError(f"{path}: key {option}: must be one value, got {shown(value)}")
        yield from (f"--{option}", *map(str, value))
    else:
        yield f"--{option}={value}"


def _takes_several(hint: Any) -> bool:
    return get_origin(hint) in (tuple, dict) or any(map(_takes_several, get_args(hint)))


def _plain_types(hint: Any) -> set[Any]:
    """Return the types without parameters that a type is composed of."""
    parameters = get_args(hint)
    return set().union(*map(_plain_types, parameters)) if parameters else {hint}
