"""Finished runs of a matrix: reading them from a folder, and merging runs of one setting."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from rora_theory.errors import InputError
from rora_theory.lab.finetune.config import LossOn
from rora_theory.lab.sweep.methods import BASE, find_method
from rora_theory.runs import frames
from rora_theory.runs.files import naming_damage
from rora_theory.runs.reading import CELLS, FinishedCell, as_json, read_finished_cells, read_manifest
from rora_theory.scaling import exponent, scaling_factor
from rora_theory.stats.trained_runs import TrainedRun

FULL = "full"
"""Name of full fine-tuning, as a method and as the rule of a curve."""

RECORDS_FILE = "records.csv"
"""File with the numbers of tokens of the held-out records."""


@dataclass(frozen=True)
class Reading:
    """Losses of the held-out records after a number of steps.

    Attributes:
      step: Number of steps; 0 is the model before training.
      losses: Loss of each record in nats, summed over its tokens.
      answer_losses: Loss of each record in nats, summed over the tokens of its answer.
      parts: Columns of `change_parts.compute_part_rms`, to five figures; None if they were not measured, and for full
        fine-tuning and DoRA, whose change is not gamma B A x.
    """

    step: int
    losses: list[float]
    answer_losses: list[float]
    parts: dict[str, list[Any]] | None = None


@dataclass(frozen=True)
class ReadRun:
    """Fine-tuning run with its readings.

    Attributes:
      train_losses: Loss per token of every step, before its update.
      readings: Readings in the order of steps, up to a divergence.
      diverged_at: Step at which the training or held-out loss was not finite; None if the run did not diverge.
    """

    train_losses: list[float]
    readings: list[Reading]
    diverged_at: int | None = None


@dataclass(frozen=True)
class SweepRun:
    """Training run of a matrix with its read-outs.

    Attributes:
      rank: Rank of the adapter; None for methods without a rank.
      gain: G = gamma r of the adapter; None for methods without a rank.
      rate: Learning rate; 0 for the base model.
      seed: Seed; 0 for the base model.
      read: Losses of the run.
      steps: Planned number of steps under a schedule that decays, where a run of another length has other rates; None
        at a constant rate, where shorter runs are the first steps of longer ones.
      method: Name from `METHODS`, or `BASE`.
      alpha: Alpha; None for methods without a rank.
      model: Name of the model.
      axes: Further settings of the run, see `SweepCell`.
      key: Key of its cell.
      evaluation: Settings of the scoring; None if the tasks were not scored.
      result: Further figures of the run, such as ``levels`` of accuracy.
      read_at: Planned numbers of steps of the readings.
      loss_on: Tokens by whose loss the run is judged: those that it learned.
    """

    rank: int | None
    gain: float | None
    rate: float
    seed: int
    read: ReadRun
    steps: int | None = None
    method: str = "lora"
    alpha: float | None = None
    model: str = ""
    axes: tuple[tuple[str, Any], ...] = ()
    key: str = ""
    evaluation: Mapping[str, Any] | None = None
    result: Mapping[str, Any] = field(default_factory=dict)
    read_at: tuple[int, ...] = ()
    loss_on: LossOn = "all"

    @property
    def length(self) -> int:
        """Planned number of steps; that of the last reading if it is unknown."""
        return max((*self.read_at, *(reading.step for reading in self.read.readings)), default=0)

    @property
    def gamma(self) -> float | None:
        """Scaling of the adapter; None for methods without a rank."""
        return self.gain / self.rank if self.gain and self.rank else None

    @property
    def adapter(self) -> str:
        """Kind of adapter: rules of scaling are one kind, since runs of one G are the same."""
        return "" if self.method == BASE else find_method(self.method).settings["method"]

    @property
    def setting(self) -> tuple[Any, ...]:
        """Everything that identifies the run except for its length."""
        names = ("model", "method", "rank", "gain", "rate", "seed", "axes")
        return tuple(getattr(self, name) for name in names)

    def losses(self, step: int) -> list[float] | None:
        """Return the losses of the held-out records after a step; None if they were not measured there."""
        reading = next((reading for reading in self.read.readings if reading.step == step), None)
        if reading is None:
            return None
        return reading.answer_losses if self.loss_on == "answer" else reading.losses

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
          tokens: Number of tokens of each held-out record in the loss of ``loss_on``.
        """
        setting = self.adapter, self.rank or 0, self.gamma or 1.0, self.rate, self.seed
        losses = self.losses(step)
        if losses is None:  # the run diverged
            return TrainedRun(*setting, math.inf)
        sums, sizes = np.array(losses, np.float64), np.asarray(tokens, np.float64)
        return TrainedRun(*setting, float(sums.sum() / sizes.sum()), sums, sizes)


def read_runs(folder: Path) -> list[SweepRun]:
    """Read the runs of the finished cells of a run folder, see `merge_repeated_runs`.

    Raises:
      InputError: If a line was modified or holds values of a wrong type.
    """
    config = (read_manifest(folder, ()) or {}).get("config", {})
    runs = []
    for cell in read_finished_cells(folder).values():
        with naming_damage(f"{folder / CELLS}: key {cell.key}"):
            runs.append(_convert_run(cell, config))
    # A run without a value of an axis has the one that the others share.
    settings = config.get("settings", {})
    shared = {name: settings.get(name) for run in runs for name, _ in run.axes}
    loss_on: LossOn = settings.get("loss_on", "all")
    return merge_repeated_runs(
        replace(run, axes=tuple(sorted((shared | dict(run.axes)).items())), loss_on=loss_on) for run in runs
    )


def _convert_run(cell: FinishedCell, config: Mapping[str, Any]) -> SweepRun:
    """Convert a finished cell from JSON types; values of a wrong type raise an error."""

    def optional_float(item: Any) -> float | None:
        return None if item is None else float(item)

    def optional_int(item: Any) -> int | None:
        return None if item is None else int(item)

    def floats(items: Any) -> list[float]:
        return [float(item) for item in items]

    fields, value = cell.cell, dict(cell.value)
    readings = [
        Reading(int(reading["step"]), floats(reading["losses"]), floats(reading["answer_losses"]), reading.get("parts"))
        for reading in value.pop("readings")
    ]
    read = ReadRun(floats(value.pop("train_losses")), readings, optional_int(value.pop("diverged_at")))
    rank = optional_int(fields["rank"])
    alpha = gain = optional_float(fields["alpha"])
    if rank is not None and alpha is not None:
        rule = find_method(fields["method"]).rule
        # Under alpha / r, G is alpha itself, without the rounding of a division.
        gain = alpha if exponent(rule) == 1 else rank * scaling_factor(rule, alpha=alpha, rank=rank)
    axes = dict(fields["axes"])
    decays = (axes | {"schedule": axes.get("schedule", config.get("settings", {}).get("schedule"))})["schedule"]
    steps = int(fields["read_at"][-1]) if decays not in (None, "constant") and fields["read_at"] else None
    for level in value.get("levels", ()):
        float(level["accuracy"])
    return SweepRun(
        rank,
        gain,
        float(fields["rate"] or 0.0),
        int(fields["seed"] or 0),
        read,
        steps,
        fields["method"],
        alpha,
        fields["model"],
        tuple(sorted(axes.items())),
        cell.key,
        fields["evaluation"],
        value,
        tuple(map(int, fields["read_at"])),
    )


def merge_repeated_runs(runs: Iterable[SweepRun]) -> list[SweepRun]:
    """Merge runs of the same setting into the longest, with the readings of all of them.

    At a constant rate, runs that differ only in length are the same run, up to rounding; under a schedule that decays
    they are different runs, and are not merged. Of two readings at one step, the one with parts of the change is used,
    or else that of the longer run.
    """
    by_setting: dict[tuple[Any, ...], dict[int, list[SweepRun]]] = {}
    for run in runs:
        by_setting.setdefault(run.setting, {}).setdefault(run.steps or 0, []).append(run)
    merged = []
    for setting_runs in (by_length[steps] for by_length in by_setting.values() for steps in sorted(by_length)):
        # From the shortest to the longest run, so that the readings of longer runs replace those of shorter ones.
        setting_runs = sorted(setting_runs, key=lambda run: run.length)
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


def read_tokens(folder: Path) -> dict[str, tuple[list[int], list[int]]]:
    """Read the numbers of tokens of the held-out records of a run folder, and of their answers, by model.

    Raises:
      InputError: If the file is missing or damaged.
    """
    frame = frames.read_csv(folder / RECORDS_FILE, accepted="a run folder of sims.sweep")
    columns = ("model", "tokens", "answer_tokens")
    frames.check_columns(folder / RECORDS_FILE, frame, columns, advice="Use the file of a sweep.")
    return {
        str(model): (rows["tokens"].astype(int).tolist(), rows["answer_tokens"].astype(int).tolist())
        for model, rows in frame.groupby("model", sort=False)
    }


def read_comparison_runs(path: Path, identity: Mapping[str, Any]) -> tuple[str, list[SweepRun]]:
    """Read the runs of another folder of the same model and records.

    Returns:
      A description of the settings in which the other runs differ, and the runs.

    Raises:
      InputError: If there is no such run, its model or records differ, or no setting differs.
    """
    manifest = read_manifest(path, ("config",))
    if manifest is None or "model_sha256" not in manifest["config"] or "settings" not in manifest["config"]:
        raise InputError(f"compare_to must be a run folder of sims.sweep, got {path}")
    other, this = manifest["config"], as_json(identity)
    # Losses can be compared for one model and the same records only.
    for name in ("model_sha256", "data"):
        first, second = (sorted(map(str, config[name].values())) for config in (other, this))
        if first != second:
            raise InputError(f"compare_to {path}: {name} differs. Use a run of the same model and records.")
    values = {name: value for name, value in other["settings"].items() if this["settings"].get(name) != value}
    if not values:
        raise InputError(f"compare_to {path}: no setting differs. Use a run with another setting, such as targets.")
    descriptions = [f"{name} {' '.join(value) if isinstance(value, list) else value}" for name, value in values.items()]
    return ", ".join(descriptions), read_runs(path)
