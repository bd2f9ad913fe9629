"""Locate the files of a data set's split, and download files of the hub's data sets."""

import contextlib
import os
import re
import tempfile
from pathlib import Path
from typing import NamedTuple

from rora_theory import extras
from rora_theory.errors import InputError, first_line

HUB_PREFIX = "hf://datasets/"
"""Prefix of the name of a data set on the hub, and of its files and splits."""


def download_file(address: str) -> Path:
    """Return the local path of a data set's file, downloaded or from the hub's cache.

    Args:
      address: Address of the file, ``hf://datasets/OWNER/NAME[@REVISION]/FILE``.

    Raises:
      InputError: The address has another form, or neither the hub nor the cache has the file.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    parts = address.removeprefix(HUB_PREFIX).split("/", 2)
    if len(parts) < 3 or not all(parts):
        data_set = f"{HUB_PREFIX}OWNER/NAME[@REVISION]"
        raise InputError(
            f"{address}: not the name of a file or split. Pass {data_set}/FILE or {data_set}[/SUBSET]:SPLIT."
        )
    owner, name, file = parts
    name, _, revision = name.partition("@")
    try:
        return Path(hf_hub_download(f"{owner}/{name}", file, repo_type="dataset", revision=revision or None))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"{address}: cannot be downloaded ({first_line(error)}). Pass a file that the hub or its cache has."
        ) from error


class Split(NamedTuple):
    """Split of a data set, written as ``PLACE[/SUBSET]:NAME``.

    Attributes:
      place: Folder, or data set of the hub with its prefix.
      subset: Subset of the data set, if one is named.
      name: Name of the split.
    """

    place: str
    subset: str | None
    name: str


def parse_split(source: str) -> Split | None:
    """Return the split that a source names, or None if it names a file.

    Examples:
      >>> parse_split("hf://datasets/me/chats@v1/english:train")
      Split(place='hf://datasets/me/chats@v1', subset='english', name='train')
    """
    place, colon, name = source.rpartition(":")
    # An existing file may have a colon in its name.
    if not colon or not re.fullmatch(r"[A-Za-z0-9_.-]+", name) or os.path.exists(source):
        return None
    # On the hub: owner, repository and, optionally, a subset.
    if place.startswith(HUB_PREFIX):
        owner, repository, subset = [*place.removeprefix(HUB_PREFIX).strip("/").split("/", 2), "", ""][:3]
        return Split(f"{HUB_PREFIX}{owner}/{repository}", subset or None, name) if owner and repository else None
    # On the disk: a folder, or a folder with a subset as the last component.
    if os.path.isdir(place):
        return Split(place, None, name)
    folder, _, subset = place.rpartition("/")
    return Split(folder, subset, name) if os.path.isdir(folder) else None


def locate_split(split: Split) -> list[Path]:
    """Return the files of a split, downloaded if the data set is on the hub.

    `datasets` selects the files, by the data set's card (`README.md`) or by their names. If the hub cannot be reached,
    the files in its cache are used.

    Raises:
      InputError: The data set, subset or split does not exist. The message names those that do.
    """
    # A folder needs no download.
    if not split.place.startswith(HUB_PREFIX):
        return list(map(Path, _list_files(split, split.place, None)))
    repository, _, revision = split.place.removeprefix(HUB_PREFIX).partition("@")
    try:
        names = _list_files(split, repository, revision or None)
    except InputError:
        with contextlib.suppress(Exception):  # of the hub's HTTP client, which differ between its versions
            from huggingface_hub import snapshot_download

            cache = snapshot_download(repository, repo_type="dataset", revision=revision or None, local_files_only=True)
            return list(map(Path, _list_files(split, cache, None)))
        raise
    # Request one file by branch, so that the cache knows the branch's commit when the hub cannot be reached.
    _, _, file = names[0].removeprefix(HUB_PREFIX).split("/", 2)
    download_file(f"{split.place}/{file}")
    return [download_file(name) for name in names]


def _list_files(split: Split, place: str, revision: str | None) -> list[str]:
    """Return the paths of a split's files, or their addresses at a commit."""
    datasets = extras.import_extra("datasets")
    try:
        with tempfile.TemporaryDirectory() as cache:
            builder = datasets.load_dataset_builder(place, split.subset, revision=revision, cache_dir=cache)
    except Exception as error:  # of the file system, the hub's HTTP client and the parser of the card
        raise InputError(f"{split.place}: the data set cannot be read ({first_line(error)})") from None
    splits = {str(name): list(map(str, names)) for name, names in (builder.config.data_files or {}).items()}
    if split.name not in splits:
        raise InputError(f"{split.place}: no split {split.name!r}. Pass one of: {', '.join(splits)}.")
    return splits[split.name]
