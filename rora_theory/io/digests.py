"""SHA-256 of what files hold: two files of one name, written one after the other, are told apart."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rora_theory.errors import InputError
from rora_theory.io.files import check_regular


def of_file(path: Path) -> str:
    """The SHA-256 of a file's bytes in hexadecimal, as ``sha256sum`` prints it; 1 GB takes about a second.

    Raises:
      InputError: the file can't be read, or is a pipe or device, which need not end.
    """
    if os.path.exists(path):
        check_regular(path, accepted="a readable file")
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); accepted is a readable file") from error


def of_files(paths: Iterable[Path]) -> str:
    """The SHA-256 of several files of one folder, their names included: that of a line ``DIGEST  NAME`` a file.

    In the folder, ``sha256sum NAMES | sha256sum`` prints the same, NAMES in the order of their bytes.

    Raises:
      InputError: a file can't be read.
    """
    lines = [f"{of_file(path)}  {path.name}\n" for path in sorted(paths, key=lambda path: path.name.encode())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def of_json(value: Sequence[Any]) -> str:
    """The SHA-256 of a list, such as records, written as JSON."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
