"""Files of a user's, read whole with a limit: a pipe, a device or a file too large is refused before memory goes."""

import json
import os
import stat
from pathlib import Path
from typing import Any

from rora_theory.errors import InputError

LARGEST = 1 << 30
"""Bytes of the largest text that is read: 1 GiB, some eight times the 170 000 records of the eight tasks."""

DEPTH = 64
"""Lists and objects that JSON may hold inside one another."""

_PART = 1 << 24
"""Bytes that are read at once."""

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def read_bytes(path: str | Path, limit: int = LARGEST, *, accepted: str = "a regular file") -> bytes:
    """The content of a regular file of at most ``limit`` bytes.

    Args:
      path: the file, or a link to it.
      limit: most bytes.
      accepted: what the file should have been, for the errors.

    Raises:
      InputError: no such file, no permission, more than ``limit`` bytes, or not a regular file: a folder, and a pipe
        or a device such as /dev/zero, which need not end.
    """
    try:
        # Without O_NONBLOCK, to open a pipe is to wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; accepted is {accepted}") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path}: cannot be read ({reason}); accepted is {accepted}") from error
    try:
        status = os.fstat(descriptor)
        _check_kind(path, status, accepted)
        parts, size = [], 0
        while status.st_size <= limit >= size and (part := os.read(descriptor, _PART)):
            parts.append(part)
            size += len(part)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); accepted is {accepted}") from error
    finally:
        os.close(descriptor)
    if max(status.st_size, size) > limit:
        raise InputError(f"{path}: has more than {limit:,} bytes, the most that are read; accepted is {accepted}")
    return b"".join(parts)


def check_regular(path: str | Path, *, accepted: str = "a regular file") -> None:
    """Refuse what another library is to open and could wait for or read for ever.

    Raises:
      InputError: no such file, no permission to look, or not a regular file.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; accepted is {accepted}") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path}: cannot be read ({reason}); accepted is {accepted}") from error
    _check_kind(path, status, accepted)


def _check_kind(path: str | Path, status: os.stat_result, accepted: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "not a file")
        raise InputError(f"{path}: is {kind}; accepted is {accepted}")


def check_folder(path: str | Path) -> None:
    """Refuse a folder that can't be made, or written to where it is there.

    Raises:
      InputError: a file there or on the way there, no permission, or a name that is too long.
    """
    accepted = "accepted is a folder that can be made or written to"
    place = Path(path)
    try:
        while not _is_there(place):
            place = place.parent
        longest = os.pathconf(place, "PC_NAME_MAX")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path}: cannot be used ({reason}); {accepted}") from error
    if any(len(os.fsencode(part)) > longest for part in Path(path).parts):
        raise InputError(f"{path}: has a name of more than {longest} bytes; {accepted}")
    if not place.is_dir():
        raise InputError(f"{path}: {'is' if place == Path(path) else f'{place} is'} a file; {accepted}")
    if not os.access(place, os.W_OK | os.X_OK, effective_ids=True):
        raise InputError(f"{path}: no permission to write to {place}; {accepted}")


def _is_there(path: Path) -> bool:
    """As `Path.exists`, which takes a loop of links or a zero byte for nothing there."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def read_text(path: str | Path, limit: int = LARGEST, *, accepted: str = "a text file in UTF-8") -> str:
    """The text of a regular file in UTF-8, line ends as they are.

    Raises:
      InputError: as `read_bytes`, or a byte that is not UTF-8; names the byte.
    """
    try:
        return read_bytes(path, limit, accepted=accepted).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8; accepted is {accepted}") from error


def read_json(path: str | Path, limit: int = LARGEST, *, accepted: str = "a JSON file") -> Any:
    """The value in a JSON file.

    Raises:
      InputError: as `read_text` and `parse_json`.
    """
    return parse_json(read_text(path, limit, accepted=accepted), where=str(path), accepted=accepted)


def read_object(path: str | Path, limit: int = LARGEST, *, accepted: str = "a JSON object") -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      InputError: as `read_json`, or another value.
    """
    value = read_json(path, limit, accepted=accepted)
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a {type(value).__name__}; accepted is {accepted}")
    return value


def parse_json(text: str, *, where: str, accepted: str = "JSON") -> Any:
    """The value of a JSON text.

    Args:
      text: the JSON.
      where: the file, and its line where the text is one of several, for the errors.
      accepted: what the text should have been, for the errors.

    Raises:
      InputError: not JSON (with the place), or lists and objects more than `DEPTH` deep.

    Example:
      >>> parse_json('{"rank": [8, 16]}', where="run.json")
      {'rank': [8, 16]}
    """
    try:
        value = json.loads(text)
    except RecursionError:
        value = None
        deep = True
    except ValueError as error:
        raise InputError(f"{where}: is not JSON ({error}); accepted is {accepted}") from error
    else:
        deep = _is_deeper(value, DEPTH)
    if deep:
        raise InputError(f"{where}: is JSON more than {DEPTH} lists and objects deep; accepted is {accepted}")
    return value


def _is_deeper(value: Any, depth: int) -> bool:
    """Whether lists and objects lie more than ``depth`` deep in ``value``."""
    level = [value] if isinstance(value, (list, dict)) else []
    for _ in range(depth):
        level = [
            child
            for item in level
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, (list, dict))
        ]
    return bool(level)
