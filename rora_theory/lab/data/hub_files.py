"""Download files of the hub's data sets, and select the files of a data set that belong to a split."""

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rora_theory.errors import InputError, first_line, shown
from rora_theory.runs import files

HUB_PREFIX = "hf://datasets/"
"""Prefix of the name of a data set on the hub, and of its files and splits."""

PARQUET_REVISION = "refs/convert/parquet"
"""Revision under which the hub keeps a Parquet copy of data sets in other formats."""

RECORD_SUFFIXES = (".parquet", ".jsonl", ".json")
"""Suffixes of files with records. If a split has files of several kinds, the first kind here is read."""

CARD_NAME = "README.md"

MAX_LISTED_FILES = 8
"""Maximum number of files that an error lists."""


def download_file(repository: str, file: str, revision: str | None, *, where: str) -> Path:
    """Return the local path of a data set's file, downloaded or from the hub's cache.

    Args:
      repository: Data set as ``OWNER/NAME``.
      file: Path of the file in the data set.
      revision: Branch, tag or commit; None is ``main``.
      where: Name of the file, for the errors.

    Raises:
      InputError: Neither the hub nor the cache has the file.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, file, repo_type="dataset", revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"{where}: cannot be downloaded ({first_line(error)}). Pass a file that the hub or its cache has."
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
    """Return the files of a split in the order of their names, downloaded if the data set is on the hub.

    A data set's card (`README.md`) may list the files of each split. Without such a list, a split has the files of one
    kind with the split's name in theirs. If a data set on the hub has no files that can be read, the hub's Parquet copy
    is used, provided that no revision is named.

    Raises:
      InputError: The data set, subset or split does not exist. The message names those that do.
    """
    # A local folder needs no download.
    if not split.place.startswith(HUB_PREFIX):
        root = Path(split.place)
        names = _relative_files(root)
        card = _read_card(root / CARD_NAME) if CARD_NAME in names else {}
        return [root / name for name in select_files(names, split, card)]
    repository, _, revision = split.place.removeprefix(HUB_PREFIX).partition("@")
    names, commit = _list_files(repository, revision or None, split.place)

    def download(file: str, at_revision: str | None) -> Path:
        return download_file(repository, file, at_revision, where=f"{split.place}: {file}")

    card = _read_card(download(CARD_NAME, commit)) if CARD_NAME in names else {}
    # Fall back on the hub's Parquet copy.
    if not revision and not any(name.endswith(RECORD_SUFFIXES) for name in names):
        revision, card = PARQUET_REVISION, {}
        names, commit = _list_files(repository, revision, split.place)
    selected = select_files(names, split, card)
    # Request one file by branch, so that the cache knows the branch's commit when the hub cannot be reached.
    download(selected[0], revision or None)
    # Request all of them by commit, so that they belong together even if the branch moves in the meantime.
    return [download(name, commit) for name in selected]


def select_files(names: Sequence[str], split: Split, card: Mapping[str, Any]) -> list[str]:
    """Return the files of a data set that belong to a split.

    Args:
      names: Paths of all files in the data set.
      split: Split to select.
      card: Metadata at the head of the data set's card.

    Raises:
      InputError: The subset or split does not exist, or files of it are missing. The message names those that exist.

    Examples:
      >>> files = ["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet", "README.md"]
      >>> select_files(files, Split("them/set", None, "train"), {})
      ['data/train-00000-of-00001.parquet']
    """
    # The card's lists of files take precedence over the names of the files.
    subsets = _parse_subsets(card)
    selected = _select_by_card(names, split, subsets) if subsets else _select_by_name(names, split)
    # A name such as train-00000-of-00003.parquet says how many files there are; an offline cache may have only some.
    for name in selected:
        number = re.search(r"-\d{5}(-of-(\d{5})\.)", name)
        if number and sum(number[1] in other for other in selected) < int(number[2]):
            raise InputError(
                f"{split.place}: split {split.name!r} must have {int(number[2])} files, got {len(selected)}. The hub's "
                "cache may be incomplete. Run the command once with access to the hub."
            )
    if not selected:
        readable = [name for name in names if name.endswith(RECORD_SUFFIXES)]
        listed = ", ".join(readable[:MAX_LISTED_FILES]) + (", ..." if len(readable) > MAX_LISTED_FILES else "")
        raise InputError(
            f"{split.place}: no {', '.join(RECORD_SUFFIXES)} file of split {split.name!r}; it has "
            f"{listed or 'no file of these kinds'}. Pass the name of a split or a file."
        )
    return selected


Subset = tuple[dict[str, list[str]], bool]
"""Patterns of the files of each split, and whether the subset is the default."""


def _select_by_card(names: Sequence[str], split: Split, subsets: Mapping[str, Subset]) -> list[str]:
    """Return the files that the data set's card lists for a split."""
    # The subset that is named, or the default one, or the only one.
    subset = split.subset
    if subset is None:
        defaults = [name for name, (_, is_default) in subsets.items() if is_default]
        if not defaults and len(subsets) == 1:
            defaults = list(subsets)
        subset = next(iter(defaults), None)
    if subset is None or subset not in subsets:
        problem = "no subset is named" if subset is None else f"no subset {subset!r}"
        raise _subset_error(split, problem, subsets)
    # Files that the patterns of the split match.
    splits, _ = subsets[subset]
    if split.name not in splits:
        raise InputError(f"{split.place}: no split {split.name!r}. Pass one of: {', '.join(splits)}.")
    patterns = splits[split.name]
    selected = [name for name in sorted(names) if any(_matches_pattern(name, pattern) for pattern in patterns)]
    # A listed file of another kind is an error, because leaving it out would change the data.
    unreadable = [name for name in selected if not name.endswith(RECORD_SUFFIXES)]
    if unreadable:
        raise InputError(
            f"{split.place}: {unreadable[0]} cannot be read; supported files: {', '.join(RECORD_SUFFIXES)}"
        )
    return selected


def _select_by_name(names: Sequence[str], split: Split) -> list[str]:
    """Return the files with the split's name in theirs, of the first kind that there is."""
    in_subset = [name for name in sorted(names) if split.subset is None or name.startswith(f"{split.subset}/")]
    # The split's name as a word of its own, so that "train" does not select "training".
    word = re.compile(rf"(?:^|[-._ /\d]){re.escape(split.name)}(?:[-._ /\d]|$)")
    matching = [name for name in in_subset if word.search(os.path.splitext(name)[0])]
    by_kind = ([name for name in matching if name.endswith(suffix)] for suffix in RECORD_SUFFIXES)
    selected = next(filter(None, by_kind), [])
    # Files in several folders belong to several subsets, of which one must be named.
    folders = {name.partition("/")[0] for name in selected if "/" in name} - {"data", split.name}
    if split.subset is None and len(folders) > 1:
        raise _subset_error(split, "no subset is named", sorted(folders))
    return selected


def _subset_error(split: Split, problem: str, subsets: Mapping[str, Any] | Sequence[str]) -> InputError:
    return InputError(
        f"{split.place}: {problem}; available: {', '.join(subsets)}. Pass {split.place}/SUBSET:{split.name}."
    )


def _list_files(repository: str, revision: str | None, where: str) -> tuple[list[str], str | None]:
    """Return all files of a data set and its commit, from the hub or, if it cannot be reached, from its cache."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        info = HfApi().dataset_info(repository, revision=revision)
        return [file.rfilename for file in info.siblings or []], info.sha
    except Exception as error:  # of the hub's HTTP client, which differs between versions of huggingface_hub
        reason = first_line(error)
    # Fall back to the cache, in which the folder of a snapshot is named after its commit.
    with contextlib.suppress(Exception):
        root = Path(snapshot_download(repository, repo_type="dataset", revision=revision, local_files_only=True))
        return _relative_files(root), root.name
    raise InputError(f"{where}: cannot be listed ({reason}). Pass a data set that the hub or its cache has.")


def _relative_files(root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in sorted(root.rglob("*")) if path.is_file()]


def _read_card(path: Path) -> Mapping[str, Any]:
    """Return the YAML between the two lines ``---`` at the head of a card; empty if there is none."""
    head = re.match(r"---[ \t]*\r?\n(.*?)\n---", files.read_text(path), re.DOTALL)
    metadata = files.parse_yaml(head[1], where=f"{path}: its head", accepted="the card of a data set") if head else {}
    return metadata if isinstance(metadata, dict) else {}


def _parse_subsets(card: Mapping[str, Any]) -> dict[str, Subset]:
    """Return the subsets that a card describes.

    The card's ``data_files`` may be a pattern, a list of patterns or of objects with ``split`` and ``path``, or an
    object from split to pattern.
    """
    configs = card.get("configs")
    subsets: dict[str, Subset] = {}
    for config in configs if isinstance(configs, list) else []:
        # Without a list of files, an entry says nothing about the splits of its subset.
        if not isinstance(config, dict) or "data_files" not in config:
            continue
        name, data_files = str(config.get("config_name", "default")), config["data_files"]
        # Bring all forms into a list of entries.
        if isinstance(data_files, dict):
            data_files = [{"split": split, "path": path} for split, path in data_files.items()]
        if not isinstance(data_files, list):
            data_files = [data_files]
        folder = str(config.get("data_dir", "")).strip("/")
        splits: dict[str, list[str]] = {}
        # Collect the patterns of each split, relative to the folder of the data set.
        for item in data_files:
            entry = item if isinstance(item, dict) else {"path": item}
            split, path = entry.get("split", "train"), entry.get("path")
            patterns = path if isinstance(path, list) else [path]
            if not all(isinstance(pattern, str) for pattern in patterns):
                raise InputError(f"{CARD_NAME}: data_files of {name} must be names of files, got {shown(path)}")
            splits.setdefault(str(split), []).extend(
                f"{folder}/{pattern}" if folder else str(pattern) for pattern in patterns
            )
        # A subset is the default if the card marks it as such, or by its name.
        subsets[name] = splits, bool(config.get("default", name == "default"))
    return subsets


def _matches_pattern(file: str, pattern: str) -> bool:
    """Return whether a path matches a glob pattern in which only ``**`` matches a slash."""
    parts = re.split(r"(\*\*/?|\*|\?|\[!?[^\]/]+\])", pattern.removeprefix("./"))
    wildcards = {"**": ".*", "**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}
    # A set of characters, such as [0-9] or [!a], excludes with ^ in a regular expression.
    wildcards |= {part: re.sub(r"^\[!", "[^", part) for part in parts if part.startswith("[")}
    expression = "".join(wildcards.get(part) or re.escape(part) for part in parts)
    try:
        return re.fullmatch(expression, file) is not None
    except re.error:  # an empty range such as [z-a] matches nothing
        return False
