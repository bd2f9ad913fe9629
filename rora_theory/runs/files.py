"""Read files with errors of one line, and write them atomically.

Atomic writes leave a file intact when the process is killed or the disk is full.
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

PARTIAL_SUFFIX = ".part"
"""Suffix of a temporary file, which is renamed when it is complete."""

_FULL_OR_BROKEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def read_bytes(path: str | Path, *, accepted: str = "a regular file") -> bytes:
    """Read the content of a file.

    Raises:
      InputError: The file does not exist, may not be read, or is a folder, a pipe or a device.
    """
    check_regular(path, accepted=accepted)
    with _naming_unreadable(path, accepted):
        return Path(path).read_bytes()


def check_regular(path: str | Path, *, accepted: str = "a regular file") -> None:
    """Check that a path is a regular file, before another library opens it.

    Raises:
      InputError: The file does not exist, cannot be accessed, or is not a regular file.
    """
    with _naming_unreadable(path, accepted):
        mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise InputError(f"{path}: is {kind}. Expected {accepted}.")


@contextlib.contextmanager
def _naming_unreadable(path: str | Path, accepted: str) -> Iterator[None]:
    """Raise `InputError` if the block cannot find or read a file."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file. Expected {accepted}.") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path}: cannot be read ({reason}). Expected {accepted}.") from error


def resolve_inside(folder: Path, name: object, *, where: str | Path) -> Path:
    """Return the path of a file in a folder by a name that was read from a file.

    Args:
      folder: Folder that the path must not leave.
      name: Relative path.
      where: File that holds the name, for the error.

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
    if not parts or PurePath(*parts).is_absolute() or ".." in parts or not _is_inside(path, folder):
        raise InputError(f"{where}: names {shown(name)}, which is not a path inside {folder}")
    return path


def check_links(folder: Path) -> None:
    """Check that no symbolic link in a folder leads out of it or in a circle.

    Raises:
      InputError: A link leads out of the folder, or to nothing.
    """
    for parent, folders, names in os.walk(folder):
        for path in (Path(parent, name) for name in (*folders, *names)):
            if path.is_symlink() and not (_is_inside(path, folder) and path.exists()):
                raise InputError(
                    f"{path}: symbolic link out of {folder}, or to nothing. Replace it by what it links to."
                )


def _is_inside(path: Path, folder: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def read_text(path: str | Path, *, accepted: str = "a text file in UTF-8") -> str:
    """Read a text file in UTF-8 without changing its line ends. A byte-order mark at its start is removed.

    Raises:
      InputError: `read_bytes` refuses the file, or a byte is not UTF-8; the message names the byte.
    """
    try:
        return read_bytes(path, accepted=accepted).decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8. Expected {accepted}.") from error


def read_json(path: str | Path, *, accepted: str = "a JSON file") -> Any:
    """Read the value in a JSON file.

    Raises:
      InputError: `read_text` or `parse_json` refuses the file.
    """
    return parse_json(read_text(path, accepted=accepted), where=str(path), accepted=accepted)


def read_object(path: str | Path) -> dict[str, Any]:
    """Read the object in a JSON file.

    Raises:
      InputError: `read_json` refuses the file, or its value is not an object.
    """
    accepted = "a JSON object"
    value = read_json(path, accepted=accepted)
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a {type(value).__name__}. Expected {accepted}.")
    return value


def parse_json(text: str, *, where: str, accepted: str = "JSON") -> Any:
    """Parse a JSON text.

    Args:
      text: JSON source.
      where: Name of the file, with the line if the file has several texts, for error messages.
      accepted: Description of the expected text, for error messages.

    Raises:
      InputError: The text is not JSON.

    Examples:
      >>> parse_json('{"rank": [8, 16]}', where="run.json")
      {'rank': [8, 16]}
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: is not JSON ({error}). Expected {accepted}.") from error


@contextlib.contextmanager
def naming_damage(where: str | Path) -> Iterator[None]:
    """Raise `InputError` if the block fails because a value read from a file is missing or has the wrong type."""
    try:
        yield
    except InputError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"{where}: is damaged ({reason}). Restore the file as the run wrote it.") from error


def parse_yaml(text: str, *, where: str, accepted: str = "YAML") -> Any:
    """Parse a YAML text.

    Raises:
      InputError: The text is not YAML.

    Examples:
      >>> parse_yaml("ranks: [8, 16]  # two", where="run.yaml")
      {'ranks': [8, 16]}
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        return YAML(typ="safe").load(text)
    # A tag such as !!int raises whatever the conversion of its text raises.
    except (YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{where}: is not YAML ({reason}). Expected {accepted}.") from None


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file atomically: readers see the old content or the new one, never a part of it.

    The content is written to a temporary file in the same folder, which is then renamed.

    Raises:
      InputError: The disk is full or cannot be written to; the file is unchanged.
    """
    temporary = temporary_path(path)
    try:
        with _naming(path):
            write_new(temporary, content.encode() if isinstance(content, str) else content)
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def temporary_path(path: Path) -> Path:
    """Return an unpredictable path in the same folder, for a file that is renamed to ``path`` when it is complete."""
    return path.with_name(f".{secrets.token_hex(8)}{PARTIAL_SUFFIX}")


def write_new(path: Path, content: bytes) -> None:
    """Write a new file and wait until the disk has it. Its permissions follow the umask.

    Raises:
      OSError: The path exists (links are not followed), the disk is full, or it cannot be written to.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        _write(descriptor, content)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append(path: Path, line: str, *, sync: bool = True) -> None:
    """Append a line to a file. If the disk becomes full, the incomplete line is removed.

    Args:
      path: Path of the file, which is created if it does not exist. Symbolic links are refused.
      line: Line with its newline.
      sync: Whether to wait until the disk has the line, so that it survives a crash of the machine.

    Raises:
      InputError: The disk is full or cannot be written to; the file is unchanged.
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
                # Restore the length, so that no incomplete line remains.
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, before)
                raise
        finally:
            os.close(descriptor)


def is_disk_error(error: BaseException | None) -> bool:
    """Return whether an error was caused by a full or broken disk, not by the computation."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL_OR_BROKEN:
            return True
        error = error.__cause__
    return False


def _write(descriptor: int, data: bytes) -> None:
    """Write all bytes; the system may accept only a part of them at a time."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Raise `InputError` with the path and how to resume, if the block cannot write."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror or error}). Finished results are saved: use a writable disk "
            "with free space and run the same command again."
        ) from error
