"""Where a task's file lies: in a folder, or in a dataset of the hub that has the same layout."""

import os
from collections.abc import Sequence
from pathlib import Path

from rora_theory.data.hub_files import HUB, fetch
from rora_theory.data.tasks import TASKS, Task, TaskRecord, read_task, task_named
from rora_theory.errors import InputError
from rora_theory.io import digests

VARIABLE = "RORA_COMMONSENSE_DIR"
"""Environment variable that names the data where a command does not."""


def read_tasks(
    data: str | None,
    keys: Sequence[str],
    limit: int | None = None,
    *,
    otherwise: str = "a folder with TASK/test.json",
) -> tuple[dict[str, list[TaskRecord]], dict[str, str]]:
    """The test records of several tasks, and the SHA-256 of each task's file.

    Args:
      data: as `locate_task`; None is what `VARIABLE` names.
      keys: of `TASKS`.
      limit: only the first so many of each.
      otherwise: what is accepted where no data are named, for the error.

    Raises:
      InputError: no task, one twice or one that there is not, no data named, a file missing, or a bad record.
    """
    if not keys or len(set(keys)) < len(keys):
        raise InputError(f"tasks are {' '.join(keys)!r}; accepted are one or more, each once")
    for key in keys:
        task_named(key)
    data = data or os.environ.get(VARIABLE)
    if not data:
        raise InputError(f"--data-dir is not given and {VARIABLE} not set; accepted is {otherwise}")
    files = {key: locate_task(data, TASKS[key]) for key in keys}
    records = {key: read_task(file, TASKS[key])[:limit] for key, file in files.items()}
    return records, {key: digests.of_file(file) for key, file in files.items()}


def locate_task(data: str | Path, task: Task, split: str = "test") -> Path:
    """The file ``TASK/SPLIT.json`` of a folder, or of a hub dataset (fetched, or taken from the hub's cache).

    Raises:
      InputError: no such file here or there, or not the name of a hub dataset.
    """
    if not str(data).startswith(HUB):
        path = Path(data) / task.key / f"{split}.json"
        if not os.path.exists(path):
            raise InputError(
                f"{path}: no such file; accepted is a folder in the LLM-Adapters schema (TASK/{split}.json) "
                f"or {HUB}OWNER/NAME"
            )
        return path
    return _fetch(str(data), f"{task.key}/{split}.json")


def _fetch(data: str, name: str) -> Path:
    owner, *rest = data.removeprefix(HUB).strip("/").split("/", 2)
    if not owner or not rest:
        raise InputError(f"{data}: is not a dataset; accepted is {HUB}OWNER/NAME[@REVISION][/FOLDER]")
    repository, _, revision = rest[0].partition("@")
    file = "/".join([*rest[1:], name])
    accepted = "a dataset the hub or its cache has"
    return fetch(f"{owner}/{repository}", file, revision or None, where=f"{data}: {file}", accepted=accepted)
