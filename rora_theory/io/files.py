"""Files read whole with a limit, so that a pipe, a device or a file too large is refused before memory goes; and files
written so that a kill or a full disk leaves them whole.
"""

import contextlib
import errno
import json
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

from rora_theory.errors import InputError, first_line, shown

LARGEST = 1 << 30
"""Bytes of the largest text that is read: 1 GiB, some eight times the 170 000 records of the eight tasks."""

LARGEST_YAML = 1 << 20
"""Maximum length of a YAML text."""

DEPTH = 64
"""Lists and objects that JSON may hold inside one another."""

PART = ".part"
"""How the name of a file ends that is being written, to be renamed when it is whole."""

_FULL_OR_BROKEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)

_AT_ONCE = 1 << 24
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
        while status.st_size <= limit >= size and (part := os.read(descriptor, _AT_ONCE)):
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


def resolve_inside(folder: Path, name: object, *, where: str | Path, links: bool = False) -> Path:
    """Return the path of a file in a folder by a name that was read from a file.

    Args:
      folder: Folder that the path must not leave.
      name: Relative path.
      where: File that holds the name, for the error.
      links: Whether symbolic links may lead out of the folder, as in the Hugging Face hub's cache. Pass True only for
        files that are read, never for those that are written or removed.

    Returns:
      The folder joined with the name.

    Raises:
      InputError: The name is not a relative path, contains ``..``, or leads out of the folder through a symbolic link.

    Examples:
      >>> resolve_inside(Path("run"), "cells/1f/losses.csv", where="run/manifest.json").as_posix()
      'run/cells/1f/losses.csv'
      >>> resolve_inside(Path("run"), "../other", where="run/manifest.json")
      Traceback (most recent call last):
      ...
      rora_theory.errors.InputError: run/manifest.json: names '../other', which is not a path inside run
    """
    parts = PurePath(name).parts if isinstance(name, str) and "\0" not in name else ()
    path = folder.joinpath(*parts)
    if not parts or PurePath(*parts).is_absolute() or ".." in parts or not (links or _is_inside(path, folder)):
        raise InputError(f"{where}: names {shown(name)}, which is not a path inside {folder}")
    return path


def check_links(folder: Path) -> None:
    """Check that no symbolic link in a folder leads out of it, so that nothing outside is written or removed.

    Raises:
      InputError: A link leads out of the folder.
    """
    for parent, folders, names in os.walk(folder):
        for path in (Path(parent, name) for name in (*folders, *names)):
            if path.is_symlink() and not _is_inside(path, folder):
                raise InputError(f"{path}: symbolic link out of {folder}. Replace it by what it links to.")


def _is_inside(path: Path, folder: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _is_there(path: Path) -> bool:
    """As `Path.exists`, which takes a loop of links or a zero byte for nothing there."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def read_text(path: str | Path, limit: int = LARGEST, *, accepted: str = "a text file in UTF-8") -> str:
    """The text of a regular file in UTF-8, line ends as they are, without the byte-order mark that some programs begin
    a file with.

    Raises:
      InputError: as `read_bytes`, or a byte that is not UTF-8; names the byte.
    """
    try:
        return read_bytes(path, limit, accepted=accepted).decode().removeprefix("\ufeff")
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

    Examples:
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


@contextlib.contextmanager
def naming_damage(where: str | Path) -> Iterator[None]:
    """Raise `InputError` where a value that was read from a file is missing or has the wrong type.

    Args:
      where: File, for the error.
    """
    try:
        yield
    except InputError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"{where}: is damaged ({reason}); accepted is the file as the run wrote it") from error


def parse_yaml(text: str, *, where: str, accepted: str = "YAML") -> Any:
    """Parse a YAML text that has no aliases, which expand to any size.

    Args:
      text: YAML source.
      where: Name of the file, for the errors.
      accepted: Description of the expected content, for the errors.

    Returns:
      The value that `yaml.safe_load` returns.

    Raises:
      InputError: The text is not YAML, has an alias, or is larger than `LARGEST_YAML`.
    """
    import yaml

    if len(text) > LARGEST_YAML:
        raise InputError(f"{where}: has more than {LARGEST_YAML:,} characters of YAML; accepted is {accepted}")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where libyaml is installed
    try:
        alias = next((event for event in yaml.parse(text, loader) if isinstance(event, yaml.AliasEvent)), None)
        if alias is not None:
            raise yaml.YAMLError(f"found the alias *{alias.anchor}, which is not supported")
        return yaml.load(text, loader)
    # A tag such as !!bool raises whatever the conversion of its text raises.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{where}: is not YAML ({reason}); accepted is {accepted}") from None


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


def write_whole(path: Path, content: str | bytes) -> None:
    """Write ``content`` beside ``path`` and rename it there: readers see the old file or the new, never a part.

    Raises:
      InputError: the disk is full or does not take it; names the file, which is as it was.
    """
    beside = name_beside(path)
    try:
        with _naming(path):
            write_new(beside, content.encode() if isinstance(content, str) else content)
            os.replace(beside, path)
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def name_beside(path: Path) -> Path:
    """A name that can't be foreseen, in the same folder: for what is to be renamed to ``path`` when it is whole."""
    return path.with_name(f".{secrets.token_hex(8)}{PART}")


def write_new(path: Path, content: bytes) -> None:
    """Write a file that must not be there and wait until the disk has it; its permissions are the umask's.

    Raises:
      OSError: a file or a link is there, which is not followed; the disk is full or does not take it.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        _write(descriptor, content)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append(path: Path, line: str, *, sync: bool = True) -> None:
    """Append a line to a file; a part of it that a full disk took is taken back.

    Args:
      path: made where it is missing; a symbolic link is refused.
      line: with its newline.
      sync: wait until the disk has it, so that it outlives the machine and not the process alone.

    Raises:
      InputError: as `write_whole`.
    """
    with _naming(path):
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o666)
        try:
            before = os.fstat(descriptor).st_size
            try:
                _write(descriptor, line.encode())
                if sync:
                    os.fsync(descriptor)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, before)
                raise
        finally:
            os.close(descriptor)


def is_disk_error(error: BaseException | None) -> bool:
    """Whether an error came of a disk that is full or broken: no matter of what was being computed."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL_OR_BROKEN:
            return True
        error = error.__cause__
    return False


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror or error}); accepted is a writable place with room; what was "
            "finished is kept, and the same command goes on from there"
        ) from error
