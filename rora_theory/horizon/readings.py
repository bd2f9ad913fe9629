"""One fine-tuning run, read at several steps: after each, the loss of every held-out record.

At a constant rate the first 16 steps of a run of 256 are a run of 16, so that one run answers for every horizon.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax

from rora_theory.adapters import LoraAdapter
from rora_theory.errors import InputError
from rora_theory.finetune import FinetuneConfig, NonFiniteLossError, Paused, Stepped, Trainer
from rora_theory.finetune.held_out import RecordLoss, record_losses
from rora_theory.measure import led
from rora_theory.stats.paired import mean_per_token
from rora_theory.sweep.workbench import Workbench


@dataclass(frozen=True)
class Reading:
    """The held-out records after ``step`` steps.

    Attributes:
      step: 0 is the model before training.
      losses: summed over each record's tokens, nats; in the order of the records.
      answer_losses: summed over each record's answer.
      parts: columns of `measure.led.led_parts`, to five figures; None where the run has no A and B of its own change
        (full fine-tuning, DoRA), or was read before this was measured.
    """

    step: int
    losses: list[float]
    answer_losses: list[float]
    parts: dict[str, list[Any]] | None = None


@dataclass(frozen=True)
class ReadRun:
    """A run and its readings.

    Attributes:
      train_losses: of every step taken, before its update, a token.
      readings: in the order of steps; those after a divergence are missing.
      diverged_at: the step whose loss, or whose held-out loss, was no number; None where there was none.
    """

    train_losses: list[float]
    readings: list[Reading]
    diverged_at: int | None = None


def read_run(bench: Workbench, training: FinetuneConfig, steps: Sequence[int]) -> ReadRun:
    """Train to the last of ``steps`` and read the held-out records after each.

    Args:
      bench: with the model open.
      training: Fine-tuning configuration with an adapter that can be merged. With a schedule that decays the run ends
        at the only step that is read.
      steps: ascending, 1 or more.

    Raises:
      InputError: steps that do not ascend, or a schedule that depends on the last.
    """
    if not steps or steps[0] < 1 or list(steps) != sorted(set(steps)):
        raise InputError(f"read_at is {' '.join(map(str, steps))!r}; accepted are ascending integers of 1 or more")
    if training.schedule != "constant" and len(steps) > 1:
        raise InputError(
            f"read_at must be a single step with schedule {training.schedule!r}, got {' '.join(map(str, steps))}"
        )
    training = replace(training, steps=steps[-1])
    adapter, batches = bench.begin(training)
    if len(batches) < steps[-1]:
        raise InputError(f"read_at ends at {steps[-1]}; accepted are the {len(batches)} steps that the records give")
    model = bench.model
    inputs = None
    if isinstance(adapter, LoraAdapter) and not adapter.config.use_dora:
        start = adapter.replace(jax.device_get(adapter.params))  # training takes the arrays' memory
        inputs = led.module_inputs(model.params, model.config, bench.held_out, adapter)
    trainer = Trainer(
        model.params, model.config, adapter, training, batches, None, None, shared=bench.steps, pauses=steps
    )
    found = ReadRun([], [])
    try:
        for event in trainer.run():
            if isinstance(event, Stepped):
                found.train_losses.append(event.loss)
            elif isinstance(event, Paused):
                trained = trainer.adapter("last")
                reading = read_held_out(bench, event.step, trained.merge(model.params))
                if not math.isfinite(math.fsum(reading.losses)):
                    return replace(found, diverged_at=event.step)
                if inputs is not None:
                    parts = led.led_parts(start, trained, inputs)
                    reading = replace(reading, parts=parts.to_dict("list"))
                found.readings.append(reading)
    except NonFiniteLossError as error:
        return replace(found, diverged_at=error.step)
    finally:
        trainer.close()
    return found


def read_held_out(bench: Workbench, step: int, params: object) -> Reading:
    """The held-out records under some weights."""
    losses: list[RecordLoss] = record_losses(params, bench.model.config, bench.held_out)
    return Reading(step, [one.loss for one in losses], [one.answer_loss for one in losses])


def read_run_in_words(found: Mapping[str, Any], tokens: Sequence[int]) -> str:
    """The losses of a run's readings.

    Args:
      found: a `ReadRun` in JSON types.
      tokens: of every held-out record.
    """
    losses = [f"{mean_per_token(one['losses'], tokens).value:.4f} at {one['step']}" for one in found["readings"]]
    ended = found["diverged_at"]
    return ", ".join(losses + ([] if ended is None else [f"diverged at {ended}"]))


def token_counts(bench: Workbench) -> tuple[list[int], list[int]]:
    """Tokens of every held-out record that a loss is summed over: all, and those of the answer."""
    return bench.held_out.sizes.tolist(), bench.held_out.targets.tolist()
