"""SHA-256 of the content of files, which distinguishes two versions of a file of the same name."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rora_theory.errors import InputError
from rora_theory.runs.files import check_regular


def of_file(path: Path) -> str:
    """Compute the SHA-256 of a file in hexadecimal, as ``sha256sum`` prints it; 1 GB takes about a second.

    Raises:
      InputError: The file cannot be read.
    """
    check_regular(path, accepted="a readable file")
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}). Expected a readable file.") from error


def of_files(paths: Iterable[Path]) -> str:
    """Compute the SHA-256 of several files of one folder, including their names.

    It is the digest of one line ``DIGEST  NAME`` for each file. In the folder, ``sha256sum NAMES | sha256sum`` prints
    the same, with NAMES in the order of their bytes.

    Raises:
      InputError: A file cannot be read.
    """
    lines = [f"{of_file(path)}  {path.name}\n" for path in sorted(paths, key=lambda path: path.name.encode())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def of_json(value: Sequence[Any]) -> str:
    """Compute the SHA-256 of the JSON text of a list, such as records."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
