"""Descriptions of a fine-tuning run: its summary table, and the lines printed at its start and end."""

from collections.abc import Mapping, Sequence
from math import inf, isnan
from statistics import fmean, median
from typing import Any

from rora_theory.lab.finetune.config import FinetuneConfig
from rora_theory.optimizers import schedule_factor

LAST_STEPS = 10
"""Number of final steps over which the final training loss is averaged, to reduce the noise of single batches."""


def describe_losses(events: Sequence[Mapping[str, Any]], held_out: int) -> str:
    """Return a sentence with the losses of a run."""
    steps, validations = _steps_and_validations(events)
    if validations:
        named = _notable_validations(validations).items()
        losses = ", ".join(f"{event['loss']:.4f} at step {event['step']} ({name})" for name, event in named)
        losses = f"validation loss {losses}; nats per token over {held_out:,} held-out records"
    else:
        last = steps[-LAST_STEPS:]
        losses = (
            f"training loss {steps[0]['loss']:.4f} nats per token on the batch of step 1, before any update; "
            f"{fmean(step['loss'] for step in last):.4f}, the mean of the last {len(last)} steps"
        )
    return f"Trained for {len(steps):,} steps: {losses}."


def summary_rows(events: Sequence[Mapping[str, Any]], trainable: int) -> list[dict[str, Any]]:
    """Return the summary table of a run, with the keys ``what``, ``step`` and ``value`` in each row.

    Losses are in nats per token: the training loss of the first batch and the mean of the last steps; the first, best
    and last validation loss if there is one. Then follow the median of target tokens per second and the number of
    trainable parameters, for which ``step`` is None.
    """
    steps, validations = _steps_and_validations(events)
    rows: list[tuple[str, int | None, float]] = []
    # Training loss at both ends. The mean over the last steps averages out the noise between batches.
    if steps:
        last = steps[-LAST_STEPS:]
        rows += [("training loss, first", steps[0]["step"], steps[0]["loss"])]
        rows += [(f"training loss, mean of the last {len(last)}", last[-1]["step"], fmean(s["loss"] for s in last))]
    if validations:
        rows += [
            (f"validation loss, {name}", event["step"], event["loss"])
            for name, event in _notable_validations(validations).items()
        ]
    # Median speed: a mean would include the steps that compile the program.
    if speeds := [step["targets"] / step["seconds"] for step in steps if step["seconds"]]:
        rows += [("tokens/s, median", None, median(speeds))]
    rows += [("trainable parameters", None, trainable)]
    return [dict(zip(("what", "step", "value"), row, strict=True)) for row in rows]


def describe_start(config: FinetuneConfig, summary: Mapping[str, Any], steps: int, trainable: int, share: float) -> str:
    """Return the lines printed at the start of a run: trainable and total parameters, records and learning rate."""
    lines = [
        f"{trainable:,} trainable parameters of {round(trainable / share):,} ({share:.2%})",
        f"{summary['trained_on']} records, {steps} steps",
        f"learning rate {describe_learning_rate(config, steps)}",
    ]
    # The default cutoff, that of the published runs, is short for chats.
    if summary["truncated"] or summary["skipped"]:
        lines.append(
            f"{summary['truncated']} of {summary['records']} records were cut at {config.cutoff} tokens (cutoff); "
            f"{summary['skipped']} were left out, as they have no token to learn"
        )
    return "\n".join(lines)


def describe_learning_rate(config: FinetuneConfig, steps: int) -> str:
    """Return a phrase that describes the learning rate of `step.schedule` over all steps of a run."""
    peak, warmup = config.peak_learning_rate, config.warmup
    if 0 < steps <= warmup:
        last = float(peak * schedule_factor(config.schedule, steps - 1, steps=steps, warmup=warmup))
        return f"from 0 to {last:g} at the last step, within a warm-up of {warmup} steps to {peak:g}"
    shapes = {"constant": "constant", "linear": "linear decay", "cosine": "cosine decay"}
    shape = shapes[config.schedule] + ("" if config.schedule == "constant" else " to 0 after the last step")
    return f"{peak:g} after {warmup} steps of warm-up, then {shape}"


def _steps_and_validations(
    events: Sequence[Mapping[str, Any]],
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Return the events of optimizer steps and those of validations, each in their order."""
    steps, validations = ([event for event in events if event["event"] == kind] for kind in ("step", "validation"))
    return steps, validations


def _notable_validations(validations: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return the first, best and last validation event; a loss that is not a number is never the best."""
    best = min(validations, key=lambda event: inf if isnan(event["loss"]) else event["loss"])
    return {"first": validations[0], "best": best, "last": validations[-1]}
