"""Files of the hub's data sets, and which files of a data set are a split of it."""

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rora_theory.errors import InputError, first_line, shown
from rora_theory.io import files

HUB = "hf://datasets/"
"""Begins the name of a data set of the hub, or of what is in it."""

CONVERTED = "refs/convert/parquet"
"""Where the hub keeps a copy in Parquet of data sets that are written otherwise."""

SUFFIXES = (".parquet", ".jsonl", ".json")
"""Files that hold records, those that are taken first where a split has several kinds."""

CARD = "README.md"


def fetch(repository: str, file: str, revision: str | None, *, where: str, accepted: str) -> Path:
    """A file of a data set of the hub, fetched or taken from the hub's cache.

    Args:
      repository: ``OWNER/NAME``.
      file: its path there.
      revision: branch, tag or commit; None is ``main``.
      where, accepted: for the error.

    Raises:
      InputError: neither the hub nor the cache has it.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, file, repo_type="dataset", revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(f"{where} cannot be fetched ({first_line(error)}); accepted is {accepted}") from error


class Part(NamedTuple):
    """A split of a data set: ``PLACE[/SUBSET]:SPLIT``."""

    place: str
    subset: str | None
    split: str


def part_of(source: str) -> Part | None:
    """The split that a source names; None where it names a file.

    Examples:
      >>> part_of("hf://datasets/me/chats@v1/english:train")
      Part(place='hf://datasets/me/chats@v1', subset='english', split='train')
    """
    place, colon, split = source.rpartition(":")
    if not colon or not re.fullmatch(r"[A-Za-z0-9_.-]+", split) or os.path.exists(source):
        return None
    if place.startswith(HUB):
        owner, name, subset = [*place.removeprefix(HUB).strip("/").split("/", 2), "", ""][:3]
        return Part(f"{HUB}{owner}/{name}", subset or None, split) if owner and name else None
    if os.path.isdir(place):
        return Part(place, None, split)
    folder, _, subset = place.rpartition("/")
    return Part(folder, subset, split) if os.path.isdir(folder) else None


def locate_split(part: Part) -> list[Path]:
    """The files of a split, of a folder or of a data set of the hub, in the order of their names.

    A data set's own card (`README.md`) says which files are a split; without a card's word it is the files of one kind
    that have the split's name in theirs. A data set of the hub that has no such file is read from the hub's copy in
    Parquet, where it has one and no revision is asked for.

    Raises:
      InputError: no such data set, subset or split; names those that are there.
    """
    if not part.place.startswith(HUB):
        root = Path(part.place)
        names = [path.relative_to(root).as_posix() for path in sorted(root.rglob("*")) if path.is_file()]
        return [root / name for name in choose_files(names, part, _read_card(root / CARD) if CARD in names else {})]
    repository, _, revision = part.place.removeprefix(HUB).partition("@")
    names, commit = _listing(repository, revision or None, part.place)
    accepted = "a data set the hub or its cache has"

    def get(file: str, at: str | None) -> Path:
        return fetch(repository, file, at, where=f"{part.place}: {file}", accepted=accepted)

    card = _read_card(get(CARD, commit)) if CARD in names else {}
    if not revision and not any(name.endswith(SUFFIXES) for name in names):
        revision, card = CONVERTED, {}
        names, commit = _listing(repository, revision, part.place)
    found = choose_files(names, part, card)
    get(found[0], revision or None)  # by its name, so that the cache knows the branch where the hub can't be asked
    return [get(name, commit) for name in found]


def choose_files(names: Sequence[str], part: Part, card: Mapping[str, Any]) -> list[str]:
    """The files of a split.

    Args:
      names: of all files, as paths in the data set.
      part: what is asked for.
      card: the head of the data set's card.

    Raises:
      InputError: no such subset or split; names those that are there.

    Examples:
      >>> files = ["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet", "README.md"]
      >>> choose_files(files, Part("them/set", None, "train"), {})
      ['data/train-00000-of-00001.parquet']
    """
    subsets = _subsets(card)
    if subsets:
        name = part.subset or next((name for name, one in subsets.items() if one[1]), None)
        name = next(iter(subsets)) if name is None and len(subsets) == 1 else name
        if name not in subsets:
            asked = "no subset is named" if name is None else f"has no subset {name!r}"
            raise InputError(f"{part.place}: {asked}; accepted are {', '.join(subsets)} (as {_example(part)})")
        splits = subsets[name][0]
        if part.split not in splits:
            raise InputError(f"{part.place}: has no split {part.split!r}; accepted are {', '.join(splits)}")
        found = [file for file in sorted(names) if any(_matches(file, one) for one in splits[part.split])]
        if wrong := [file for file in found if not file.endswith(SUFFIXES)]:
            raise InputError(f"{part.place}: {wrong[0]} cannot be read; accepted are {', '.join(SUFFIXES)}")
    else:
        inside = [name for name in sorted(names) if part.subset is None or name.startswith(f"{part.subset}/")]
        word = re.compile(rf"(?:^|[-._ /\d]){re.escape(part.split)}(?:[-._ /\d]|$)")
        named = [name for name in inside if name.endswith(SUFFIXES) and word.search(os.path.splitext(name)[0])]
        found = next(([one for one in named if one.endswith(kind)] for kind in SUFFIXES if _any(named, kind)), [])
        heads = {name.partition("/")[0] for name in found if "/" in name} - {"data", part.split}
        if part.subset is None and len(heads) > 1:
            folders = sorted(heads)
            raise InputError(
                f"{part.place}: no subset is named; accepted are {', '.join(folders)} (as {_example(part)})"
            )
    for name in found:
        number = re.search(r"-\d{5}(-of-(\d{5})\.)", name)
        if number and sum(number[1] in one for one in found) < int(number[2]):
            raise InputError(
                f"{part.place}: has {len(found)} of {int(number[2])} files of split {part.split!r}; "
                "accepted are all: the cache may have a part, where the hub can't be reached"
            )
    if not found:
        there = [name for name in names if name.endswith(SUFFIXES)]
        listed = ", ".join(there[:8]) + (", ..." if len(there) > 8 else "") or "no file of these kinds"
        raise InputError(
            f"{part.place}: no {', '.join(SUFFIXES)} file of split {part.split!r}; it has {listed}; accepted is the "
            "name of a split or of a file"
        )
    return found


def _listing(repository: str, revision: str | None, where: str) -> tuple[list[str], str | None]:
    """All files of a data set of the hub and the commit; of the cached files where the hub can't be asked."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        found = HfApi().dataset_info(repository, revision=revision)
        return [one.rfilename for one in found.siblings or []], found.sha
    except Exception as error:  # of the hub's HTTP client, which differs between versions of huggingface_hub
        reason = first_line(error)
    with contextlib.suppress(Exception):
        root = Path(snapshot_download(repository, repo_type="dataset", revision=revision, local_files_only=True))
        return [path.relative_to(root).as_posix() for path in sorted(root.rglob("*")) if path.is_file()], root.name
    raise InputError(f"{where}: cannot be listed ({reason}); accepted is a data set the hub or its cache has")


def _read_card(path: Path) -> Mapping[str, Any]:
    """The YAML between the two lines ``---`` that a card begins with; empty where it has none."""
    head = re.match(r"---[ \t]*\r?\n(.*?)\n---", files.read_text(path), re.DOTALL)
    found = files.parse_yaml(head[1], where=f"{path}: its head", accepted="the card of a data set") if head else {}
    return found if isinstance(found, dict) else {}


def _subsets(card: Mapping[str, Any]) -> dict[str, tuple[dict[str, list[str]], bool]]:
    """Of each subset that a card describes: the patterns of every split's files, and whether it is the default."""
    listed = card.get("configs")
    found: dict[str, tuple[dict[str, list[str]], bool]] = {}
    for one in listed if isinstance(listed, list) else []:
        if not isinstance(one, dict) or "data_files" not in one:
            continue
        name, data = str(one.get("config_name", "default")), one["data_files"]
        if isinstance(data, dict):
            data = [{"split": split, "path": path} for split, path in data.items()]
        data = data if isinstance(data, list) else [data]
        splits: dict[str, list[str]] = {}
        for given in data:
            entry = given if isinstance(given, dict) else {"path": given}
            split, path = entry.get("split", "train"), entry.get("path")
            patterns = path if isinstance(path, list) else [path]
            if not all(isinstance(pattern, str) for pattern in patterns):
                raise InputError(f"{CARD}: data_files of {name} has {shown(path)}; accepted are names of files")
            folder = str(one.get("data_dir", "")).strip("/")
            splits.setdefault(str(split), []).extend(f"{folder}/{path}" if folder else str(path) for path in patterns)
        found[name] = splits, bool(one.get("default", name == "default"))
    return found


def _matches(file: str, pattern: str) -> bool:
    """Whether a path fits a pattern in which ``*`` and ``?`` stand for what has no slash and ``**`` for anything."""
    parts = re.split(r"(\*\*/?|\*|\?)", pattern.removeprefix("./"))
    kinds = {"**": ".*", "**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}
    return re.fullmatch("".join(kinds.get(part) or re.escape(part) for part in parts), file) is not None


def _any(names: Sequence[str], suffix: str) -> bool:
    return any(name.endswith(suffix) for name in names)


def _example(part: Part) -> str:
    return f"{part.place}/SUBSET:{part.split}"
