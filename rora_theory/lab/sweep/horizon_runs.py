"""Finished runs of a grid of horizons: reading them from a folder, merging runs of one setting, and their table."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from rora_theory.errors import InputError
from rora_theory.lab.sweep.horizon_grid import VARIANTS
from rora_theory.lab.sweep.readings import Reading, ReadRun
from rora_theory.runs import frames
from rora_theory.runs.files import naming_damage
from rora_theory.runs.reading import CELLS, as_json, read_finished_cells, read_manifest
from rora_theory.stats.paired import mean_per_token
from rora_theory.stats.trained_runs import TrainedRun

FULL = "full"
"""Value of `TrainedRun.method` and `Curve.rule` for full fine-tuning, which has no rule."""


@dataclass(frozen=True)
class HorizonRun:
    """Fine-tuning run of the grid with its readings.

    Attributes:
      rank: Rank of the adapter; None for full fine-tuning.
      strength: Strength gamma r of the adapter; None for full fine-tuning.
      rate: Learning rate.
      seed: Seed.
      read: Readings of the run.
      steps: Planned number of steps under a schedule that decays, where a run of another length has other rates; None
        at a constant rate, where shorter runs are the first steps of longer ones.
    """

    rank: int | None
    strength: float | None
    rate: float
    seed: int
    read: ReadRun
    steps: int | None = None

    @property
    def gamma(self) -> float | None:
        """Scaling of the adapter; None for full fine-tuning, which has neither a rank nor a strength."""
        return self.strength / self.rank if self.strength and self.rank else None

    def losses(self, step: int) -> list[float] | None:
        """Return the losses of the held-out records after a step; None if they were not measured there."""
        return next((reading.losses for reading in self.read.readings if reading.step == step), None)

    def reaches(self, step: int) -> bool:
        """Return whether the run has losses after a step, or shows that a run of this many steps diverges."""
        if self.losses(step) is not None:
            return True
        diverged_at = self.read.diverged_at
        return diverged_at is not None and diverged_at <= step and self.steps in (None, step)

    def at(self, step: int, tokens: Sequence[int]) -> TrainedRun:
        """Return the run as it is after a step that it `reaches`; full fine-tuning has rank 0 and a scaling of 1.

        Args:
          step: Number of steps.
          tokens: Number of tokens of each held-out record.
        """
        return self._with_records(self.losses(step), tokens)

    def in_training_at(self, step: int) -> TrainedRun | None:
        """Return the run with the training losses of the second half of the steps up to ``step`` as its records.

        Runs of one seed train on the same batches, so that these losses are paired like those of held-out records.

        Returns:
          The run, or None if it ends before ``step`` without having diverged.
        """
        has_diverged = self.losses(step) is None and self.reaches(step)
        losses = self.read.train_losses[step // 2 : step]
        if not has_diverged and len(self.read.train_losses) < step:
            return None
        return self._with_records(None if has_diverged else losses, [1] * len(losses))

    def _with_records(self, losses: Sequence[float] | None, tokens: Sequence[int]) -> TrainedRun:
        method, rank = ("lora", self.rank) if self.rank else (FULL, 0)
        return TrainedRun.from_records(method, rank, self.gamma or 1.0, self.rate, self.seed, losses, tokens)


def read_finished(folder: Path) -> list[HorizonRun]:
    """Read the runs of the finished cells of a run folder.

    Raises:
      InputError: If a line was modified or holds values of a wrong type.
    """
    # A manifest leaves out variants at their default.
    settings = VARIANTS | (read_manifest(folder, ()) or {}).get("config", {})
    decays = settings["schedule"] != "constant"
    runs = []
    for cell in read_finished_cells(folder).values():
        with naming_damage(f"{folder / CELLS}: key {cell.key}"):
            runs.append(_convert_run(cell.cell, cell.value, decays=decays))
    return runs


def _convert_run(cell: Any, value: Any, *, decays: bool) -> HorizonRun:
    """Convert a cell and its result from JSON types; values of a wrong type raise an error."""

    def optional_float(item: Any) -> float | None:
        return None if item is None else float(item)

    def optional_int(item: Any) -> int | None:
        return None if item is None else int(item)

    def floats(items: Any) -> list[float]:
        return [float(item) for item in items]

    readings = [
        Reading(int(reading["step"]), floats(reading["losses"]), floats(reading["answer_losses"]), reading.get("parts"))
        for reading in value["readings"]
    ]
    read = ReadRun(floats(value["train_losses"]), readings, optional_int(value["diverged_at"]))
    rank, strength = optional_int(cell["rank"]), optional_float(cell["strength"])
    steps = int(cell["read_at"][-1]) if decays else None
    return HorizonRun(rank, strength, float(cell["rate"]), int(cell["seed"]), read, steps)


def merge_repeated_runs(runs: Iterable[HorizonRun]) -> list[HorizonRun]:
    """Merge runs of the same rank, strength, rate and seed into the longest, with the readings of all of them.

    At a constant rate, runs that differ only in length are the same run, up to rounding; under a schedule that decays
    they are different runs, and are not merged. Of two readings at one step, the one with parts of the change is used,
    or else that of the longer run.
    """
    by_setting: dict[tuple[Any, ...], dict[int, list[HorizonRun]]] = {}
    for run in runs:
        by_length = by_setting.setdefault((run.rank, run.strength, run.rate, run.seed), {})
        by_length.setdefault(run.steps or 0, []).append(run)
    merged = []
    for setting_runs in (by_length[steps] for by_length in by_setting.values() for steps in sorted(by_length)):
        # From the shortest to the longest run, so that the readings of longer runs replace those of shorter ones.
        setting_runs = sorted(setting_runs, key=lambda run: len(run.read.train_losses))
        readings: dict[int, Reading] = {}
        for reading in (reading for run in setting_runs for reading in run.read.readings):
            # A reading with the parts of the change is not replaced by one without them.
            previous = readings.get(reading.step)
            if previous is None or reading.parts is not None or previous.parts is None:
                readings[reading.step] = reading
        longest = setting_runs[-1]
        # A run that diverged early may be shorter than one that ended as planned.
        divergences = [run.read.diverged_at for run in setting_runs if run.read.diverged_at is not None]
        read = replace(
            longest.read,
            readings=[readings[step] for step in sorted(readings)],
            diverged_at=min(divergences, default=None),
        )
        merged.append(replace(longest, read=read))
    return merged


def horizon_table(runs: Sequence[HorizonRun], tokens: Sequence[int], answer_tokens: Sequence[int]) -> pd.DataFrame:
    """Return a row for each run and reading, and one for each divergence.

    Losses are in nats per token, with standard errors over records.

    Args:
      runs: Runs of the grid.
      tokens: Number of tokens of each held-out record.
      answer_tokens: Number of tokens of each held-out record's answer.
    """
    rows: list[dict[str, Any]] = []
    for run in runs:
        # The setting of the run, in every row.
        labels: dict[str, Any] = {"rank": run.rank, "strength": run.strength, "gamma": run.gamma}
        labels |= {"learning_rate": run.rate, "seed": run.seed}
        for reading in run.read.readings:
            loss = mean_per_token(reading.losses, tokens)
            answer = mean_per_token(reading.answer_losses, answer_tokens)
            rows.append(
                labels
                | {"step": reading.step, "status": "complete"}
                | {"validation_loss": loss.value, "validation_error": loss.error}
                | {"answer_loss": answer.value, "answer_error": answer.error}
            )
        # A divergence has no loss.
        if run.read.diverged_at is not None:
            rows.append(labels | {"step": run.read.diverged_at, "status": "diverged"})
    return frames.from_rows(rows, list(dict.fromkeys(name for row in rows for name in row)))


def read_comparison_runs(path: Path, identity: Mapping[str, Any]) -> tuple[str, list[HorizonRun]]:
    """Read the runs of another folder of ``sims.horizon`` with the same model and records.

    Args:
      path: Folder of the other runs.
      identity: Settings of these runs, as in their manifest.

    Returns:
      A description of the settings in which the other runs differ, and the runs.

    Raises:
      InputError: If there is no such run, its model or records differ, or no setting differs.
    """
    manifest = read_manifest(path, ("experiment", "config"))
    if manifest is None or manifest["experiment"] != "horizon":
        raise InputError(f"--compare-to must be a run folder of sims.horizon, got {path}")
    other_settings, settings = manifest["config"], as_json(identity)
    # Losses can be compared for one model and the same records only.
    for name in ("model_sha256", "records"):
        if other_settings.get(name) != settings[name]:
            raise InputError(f"--compare-to {path}: {name} differs. Use a run of the same model and records.")
    different = [name for name in settings if name != "model" and settings[name] != other_settings.get(name)]
    if not different:
        raise InputError(f"--compare-to {path}: no setting differs. Use a run with another setting, such as --targets.")
    # A manifest leaves out variants at their default.
    values = {name: other_settings.get(name, VARIANTS.get(name)) for name in different}
    descriptions = [f"{name} {' '.join(value) if isinstance(value, list) else value}" for name, value in values.items()]
    return ", ".join(descriptions), read_finished(path)
