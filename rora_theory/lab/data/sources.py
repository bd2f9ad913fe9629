"""Locate and read the tasks' files, in a folder or in a data set of the hub with the same layout."""

import os
from collections.abc import Sequence
from pathlib import Path

from rora_theory.errors import InputError
from rora_theory.lab.data.hub_files import HUB_PREFIX, download_file
from rora_theory.lab.data.tasks import TASKS, Task, TaskRecord, get_task, read_task
from rora_theory.runs import digests
from rora_theory.validation.rules import check_list

DATA_DIR_VARIABLE = "RORA_COMMONSENSE_DIR"
"""Environment variable with the default of ``--data-dir``."""


def read_tasks(
    data: str | None, keys: Sequence[str], limit: int | None = None
) -> tuple[dict[str, list[TaskRecord]], dict[str, str]]:
    """Read the test records of several tasks.

    Args:
      data: Folder or data set of the hub, see `locate_task`; None selects the value of `DATA_DIR_VARIABLE`.
      keys: Keys of the tasks in `TASKS`.
      limit: Maximum number of records per task; None reads all.

    Returns:
      The records of each task, and the SHA-256 of each task's file.

    Raises:
      InputError: There is no task, a task is repeated or does not exist, no data are named, a file is missing, or a
        record is bad.
    """
    check_list("tasks", keys)
    for key in keys:
        get_task(key)
    data = data or os.environ.get(DATA_DIR_VARIABLE)
    if not data:
        raise InputError(
            f"data_dir is not given and {DATA_DIR_VARIABLE} is not set. Pass a folder with TASK/test.json."
        )
    # Locate all files before reading any, so that a missing one is reported at once.
    files = {key: locate_task(data, TASKS[key]) for key in keys}
    records = {key: read_task(file, TASKS[key])[:limit] for key, file in files.items()}
    return records, {key: digests.of_file(file) for key, file in files.items()}


def locate_task(data: str | Path, task: Task) -> Path:
    """Return the path of a task's file ``TASK/test.json``.

    Args:
      data: Folder, or data set of the hub as ``hf://datasets/OWNER/NAME[@REVISION][/FOLDER]``, of which the file is
        downloaded or taken from the hub's cache.
      task: Task of the file.

    Raises:
      InputError: The file does not exist, or ``data`` is not the name of a data set.
    """
    if not str(data).startswith(HUB_PREFIX):
        path = Path(data) / task.key / "test.json"
        if not os.path.exists(path):
            raise InputError(
                f"{path}: no such file. Pass a folder in the LLM-Adapters schema (TASK/test.json) "
                f"or {HUB_PREFIX}OWNER/NAME."
            )
        return path
    return download_file(f"{str(data).rstrip('/')}/{task.key}/test.json")
