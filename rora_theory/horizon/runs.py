"""Finished runs of a grid of horizons: read from a folder, made one of each setting, and as a table."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from rora_theory.errors import InputError
from rora_theory.horizon.readings import Reading, ReadRun
from rora_theory.io import frames
from rora_theory.io.files import naming_damage
from rora_theory.runs.reading import CELLS, as_json, finished, read_manifest
from rora_theory.stats.paired import mean_per_token


@dataclass(frozen=True)
class HorizonRun:
    """One fine-tuning run of the grid, as far as it was read.

    Attributes:
      rank, strength, rate, seed: which; gamma is the strength over the rank. Full fine-tuning has neither.
      read: its readings.
    """

    rank: int | None
    strength: float | None
    rate: float
    seed: int
    read: ReadRun

    def losses(self, step: int) -> list[float] | None:
        """Of every held-out record after a step; None where the run was not read there, or diverged before."""
        return next((one.losses for one in self.read.readings if one.step == step), None)

    def reaches(self, step: int) -> bool:
        """Whether the run says something of a step: that it was read there, or diverged on the way."""
        return self.losses(step) is not None or (self.read.diverged_at is not None and self.read.diverged_at <= step)


def read_finished(folder: Path) -> list[HorizonRun]:
    """Read the runs of the finished cells of a run folder.

    Raises:
      InputError: A line is not as the run wrote it, or holds values of the wrong type.
    """
    runs = []
    for one in finished(folder).values():
        with naming_damage(f"{folder / CELLS}: key {one.key}"):
            runs.append(_run_of(one.cell, one.value))
    return runs


def _run_of(cell: Any, value: Any) -> HorizonRun:
    """Convert a cell and its result from JSON types. Values of another type raise."""

    def number(item: Any) -> float | None:
        return None if item is None else float(item)

    def whole(item: Any) -> int | None:
        return None if item is None else int(item)

    def floats(items: Any) -> list[float]:
        return [float(item) for item in items]

    readings = [
        Reading(int(one["step"]), floats(one["losses"]), floats(one["answer_losses"]), one.get("parts"))
        for one in value["readings"]
    ]
    read = ReadRun(floats(value["train_losses"]), readings, whole(value["diverged_at"]))
    return HorizonRun(whole(cell["rank"]), number(cell["strength"]), float(cell["rate"]), int(cell["seed"]), read)


def distinct(runs: Iterable[HorizonRun]) -> list[HorizonRun]:
    """A run for each rank, strength, rate and seed: the longest, with the readings of all of them.

    At a constant rate runs that differ in their length alone are one run, up to rounding. Of two readings at one step
    that of the longer run is kept, or one that has the parts of the change where the other has not.
    """
    by: dict[tuple[Any, ...], list[HorizonRun]] = {}
    for run in runs:
        by.setdefault((run.rank, run.strength, run.rate, run.seed), []).append(run)
    found = []
    for same in by.values():
        same = sorted(same, key=lambda run: len(run.read.train_losses))
        kept: dict[int, Reading] = {}
        for one in (one for run in same for one in run.read.readings):
            if one.step not in kept or one.parts is not None or kept[one.step].parts is None:
                kept[one.step] = one
        found.append(replace(same[-1], read=replace(same[-1].read, readings=[kept[step] for step in sorted(kept)])))
    return found


def horizon_table(runs: Sequence[HorizonRun], tokens: Sequence[int], answer_tokens: Sequence[int]) -> pd.DataFrame:
    """A row a run and reading: losses a token with their errors over records; a diverged run has one row more.

    Args:
      runs: of the grid.
      tokens, answer_tokens: of every held-out record.
    """
    rows: list[dict[str, Any]] = []
    for run in runs:
        gamma = run.strength / run.rank if run.strength and run.rank else None
        who: dict[str, Any] = {"rank": run.rank, "strength": run.strength, "gamma": gamma}
        who |= {"learning_rate": run.rate, "seed": run.seed}
        for one in run.read.readings:
            loss, answer = mean_per_token(one.losses, tokens), mean_per_token(one.answer_losses, answer_tokens)
            rows.append(
                who
                | {"step": one.step, "status": "complete"}
                | {"validation_loss": loss.value, "validation_error": loss.error}
                | {"answer_loss": answer.value, "answer_error": answer.error}
            )
        if run.read.diverged_at is not None:
            rows.append(who | {"step": run.read.diverged_at, "status": "diverged"})
    return frames.of(rows, list(dict.fromkeys(name for row in rows for name in row)))


def read_beside(path: Path, identity: Mapping[str, Any]) -> tuple[str, list[HorizonRun]]:
    """The runs of another folder of ``sims.horizon``, of the same model and records, and what they differ in.

    Args:
      path: the folder.
      identity: the settings of these runs, as their own manifest has them.

    Returns:
      The settings of those runs that differ, in words, and the runs.

    Raises:
      InputError: no such run, one of another model or of other records, or one that differs in nothing.
    """
    manifest = read_manifest(path, ("experiment", "config"))
    if manifest is None or manifest["experiment"] != "horizon":
        raise InputError(f"--beside {path}: accepted is a run folder of sims.horizon")
    other, own = manifest["config"], as_json(identity)
    for name in ("model_sha256", "records"):
        if other.get(name) != own[name]:
            raise InputError(f"--beside {path}: has another {name}; accepted is a run of the same model and records")
    differ = [name for name in own if name != "model" and own[name] != other.get(name)]
    if not differ:
        raise InputError(f"--beside {path}: differs in no setting; accepted is a run that does, as in --targets")
    values = {name: other.get(name) for name in differ}
    words = [f"{key} {' '.join(each) if isinstance(each, list) else each}" for key, each in values.items()]
    return ", ".join(words), read_finished(path)
