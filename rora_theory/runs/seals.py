"""Digests that tell what a run wrote from what was cut or changed since.

A seal is no signature: who changes a figure and its digest together is not found out. It catches the flipped byte, the
line cut off and the number changed by hand.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rora_theory.errors import InputError
from rora_theory.io import digests, files

DIGEST = "digest"
"""The key of an entry's own digest."""


def seal(entry: Mapping[str, Any], *, of: str = "") -> dict[str, Any]:
    """``entry`` with its digest, 16 hexadecimal digits of the SHA-256 of its JSON text.

    Args:
      entry: of JSON types; an older digest in it is replaced.
      of: what the entry belongs to or follows, which the digest covers too: elsewhere the seal does not hold.
    """
    plain = {name: value for name, value in entry.items() if name != DIGEST}
    text = of + json.dumps(plain, sort_keys=True)
    return plain | {DIGEST: hashlib.sha256(text.encode()).hexdigest()[:16]}


def is_sealed(entry: Any, *, of: str = "") -> bool:
    """Whether ``entry`` is as `seal` left it."""
    return isinstance(entry, Mapping) and DIGEST in entry and seal(entry, of=of)[DIGEST] == entry[DIGEST]


def changed_files(folder: Path, known: Any) -> list[str]:
    """Which of a folder's files differ from their SHA-256 in ``known``; one that is not there does not.

    Raises:
      InputError: a file that can't be read, or a name that leads out of the folder.
    """
    if not isinstance(known, Mapping):
        return []
    where = folder / "manifest.json"
    paths = {name: files.resolve_inside(folder, name, where=where) for name in known}
    return [name for name, path in paths.items() if path.is_file() and digests.of_file(path) != known[name]]


def problem(folder: Path, within: str = "") -> str | None:
    """What in a run's folder is not as the run wrote it, in words; None where nothing is, or nothing tells.

    A run that was killed, or is of a version without digests, tells nothing of its files.

    Args:
      folder: of the run, with its sealed ``manifest.json``.
      within: the folder in it whose files are looked at, ``cells/KEY`` for a cell's; the run's own by default.
    """
    path = folder / "manifest.json"
    if not os.path.lexists(path):
        return None
    try:
        known = files.read_json(path)
        if DIGEST not in known:
            return None
        if not is_sealed(known):
            return f"{path}: was changed since the run wrote it"
        own = known.get("files") or {}
        for name in changed_files(folder, {name: own[name] for name in own if name.rpartition("/")[0] == within}):
            return f"{folder / name}: was changed since the run wrote it"
    except InputError as error:
        reason = str(error).removeprefix(f"{path}: ").partition("; accepted")[0]
        return f"{path}: is damaged ({reason})"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{path}: is damaged ({error})"
    return None
