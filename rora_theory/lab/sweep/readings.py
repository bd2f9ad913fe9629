"""Fine-tuning run with the loss of every held-out record after several numbers of steps.

At a constant learning rate, the first 16 steps of a run of 256 steps are a run of 16 steps: one run provides the losses
of all horizons.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from rora_theory.errors import InputError
from rora_theory.lab import led
from rora_theory.lab.adapters import LoraAdapter
from rora_theory.lab.finetune import FinetuneConfig, NonFiniteLossError, Paused, StepCompleted, Trainer
from rora_theory.lab.finetune import metrics as metrics_file
from rora_theory.lab.finetune.held_out import RecordLoss, record_losses
from rora_theory.lab.sweep.workbench import Workbench
from rora_theory.runs.reading import CHECKPOINTS
from rora_theory.stats.paired import mean_per_token
from rora_theory.validation.rules import check_steps

CHECKPOINT_EVERY = 128
"""Number of steps between the checkpoints of a long run."""


@dataclass(frozen=True)
class Reading:
    """Losses of the held-out records after a number of steps.

    Attributes:
      step: Number of steps; 0 is the model before training.
      losses: Loss of each record in nats, summed over its tokens.
      answer_losses: Loss of each record in nats, summed over the tokens of its answer.
      parts: Columns of `lab.led.compute_led_rms`, to five figures; None if they were not measured, and for full
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


def read_run(
    bench: Workbench,
    training: FinetuneConfig,
    steps: Sequence[int],
    *,
    inputs: dict[str, Float[np.ndarray, "layers tokens p_in"]] | None = None,
    folder: Path | None = None,
) -> ReadRun:
    """Train to the last of ``steps``, and compute the losses of the held-out records after each.

    A run of more than `CHECKPOINT_EVERY` steps with one reading resumes after an interruption if it has a folder.

    Args:
      bench: Workbench with an open model.
      training: Fine-tuning configuration with an adapter that can be merged.
      steps: Numbers of steps in ascending order. A schedule that decays allows one number only.
      inputs: Inputs of the modules, at which the parts of the change are measured; None computes
        `lab.led.module_inputs` of the held-out records.
      folder: Folder of the run for checkpoints; with None an interrupted run starts over.

    Returns:
      The losses of the run and its readings. A run that diverged ends with its last finite reading.

    Raises:
      InputError: If the steps do not ascend or do not suit the schedule.
    """
    check_steps(steps, "read_at")
    if training.schedule != "constant" and len(steps) > 1:
        raise InputError(
            f"read_at must be a single step with schedule {training.schedule!r}, got {' '.join(map(str, steps))}"
        )
    # Train as many steps as the last reading needs, and no more.
    training = replace(training, steps=steps[-1], checkpoint_every=CHECKPOINT_EVERY)
    adapter, batches = bench.begin(training)
    model = bench.model
    # Keep A before training, and the inputs of the modules, to split the change into its parts.
    start: LoraAdapter | None = None
    if isinstance(adapter, LoraAdapter) and not adapter.config.use_dora:
        # Copy to the host: training donates the arrays of the adapter.
        start = adapter.replace(jax.device_get(adapter.params))
        if inputs is None:
            inputs = led.module_inputs(model.params, model.config, bench.held_out, adapter)
    # Earlier readings are not saved, so that a run with several starts over.
    resumes = len(steps) == 1 and steps[0] > CHECKPOINT_EVERY
    saved = folder / CHECKPOINTS if folder is not None and resumes else None
    checkpoints = None if saved is None else saved / "steps"
    trainer = Trainer(
        model.params, model.config, adapter, training, batches, None, checkpoints, shared=bench.steps, pauses=steps
    )
    run = ReadRun([], [])
    try:
        # The losses of the steps before the checkpoint are those of the metrics file.
        metrics = None if saved is None else metrics_file.Metrics(saved / metrics_file.FILE, trainer, "reading")
        if metrics is not None:
            run.train_losses.extend(event["loss"] for event in metrics.events)
        # A run that was interrupted in its reading has no step left.
        events = trainer.run() if trainer.step < steps[-1] else iter([Paused(steps[-1])])
        for event in events:
            if metrics is not None:
                metrics.add(event)
            if isinstance(event, StepCompleted):
                run.train_losses.append(event.loss)
            elif isinstance(event, Paused):
                # Evaluate the adapter merged into the weights, which is faster than beside them.
                trained = trainer.adapter("last")
                reading = read_held_out(bench, event.step, trained.merge(model.params))
                # The last update may diverge, which no loss of the training shows.
                if not math.isfinite(math.fsum(reading.losses)):
                    return replace(run, diverged_at=event.step)
                if start is not None and inputs is not None:
                    parts = led.compute_led_rms(start, trained, inputs)
                    reading = replace(reading, parts=parts.to_dict("list"))
                run.readings.append(reading)
    except NonFiniteLossError as error:
        return replace(run, diverged_at=error.step)
    finally:
        trainer.close()
    return run


def read_held_out(bench: Workbench, step: int, params: object) -> Reading:
    """Compute the losses of the held-out records with a model's weights."""
    losses: list[RecordLoss] = record_losses(params, bench.model.config, bench.held_out)
    return Reading(step, [record.loss for record in losses], [record.answer_loss for record in losses])


def describe_run(run: Mapping[str, Any], tokens: Sequence[int]) -> str:
    """Describe the losses of a run's readings.

    Args:
      run: `ReadRun` in JSON types.
      tokens: Number of tokens of each held-out record.
    """
    readings = run["readings"]
    losses = [f"{mean_per_token(reading['losses'], tokens).value:.4f} at {reading['step']}" for reading in readings]
    diverged_at = run["diverged_at"]
    return ", ".join(losses + ([] if diverged_at is None else [f"diverged at {diverged_at}"]))


def token_counts(bench: Workbench) -> tuple[list[int], list[int]]:
    """Return the numbers of tokens of each held-out record: all that have a loss, and those of the answer."""
    return bench.held_out.input_lengths.tolist(), bench.held_out.target_counts.tolist()
