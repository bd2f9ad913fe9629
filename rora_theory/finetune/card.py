"""What is said of a fine-tuning run, in its model card and at its end: data, optimizer, rate, length and losses."""

import re
from collections.abc import Mapping, Sequence
from math import inf, isnan
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rora_theory.adapters.card import Trained
from rora_theory.data.hub_files import HUB
from rora_theory.data.records import RecordSet
from rora_theory.finetune.config import FinetuneConfig

LAST = 10
"""Steps whose mean loss is called that of the end: of one batch it would be that batch's."""


def of_run(
    config: FinetuneConfig,
    records: RecordSet,
    sources: Sequence[str],
    summary: Mapping[str, Any],
    events: Sequence[Mapping[str, Any]],
    kept: int | None = None,
    license: str | None = None,  # noqa: A002 (the hub's name of it)
) -> Trained:
    """What a run's card has to say.

    Args:
      config: the run's.
      records, sources: what it read, and from where.
      summary: `TrainingData.summary`.
      events: of `metrics.Metrics`, all of the run.
      kept: step of the adapter, or of the weights, that are written; None is the last.
      license: as the hub names it.
    """
    steps = [event for event in events if event["event"] == "step"]
    tested = [event for event in events if event["event"] == "validation"]
    names = [source if source.startswith(HUB) else Path(source).name for source in sources]
    counts = f"{summary['records']:,}, SHA-256 `{records.sha256}`"
    held_out = summary["validated_on"]
    decay = f", weight decay {config.weight_decay:g}" if config.weight_decay else ""
    clip = "" if config.clip == float("inf") else f", gradients clipped at norm {config.clip:g}"
    what = "weights" if config.method == "full" else "adapter"
    rows = [
        (
            "quantization",
            f"the base's linear weights in {config.quantization} blocks, multiplied in {config.dtype}"
            if config.quantization != "none"
            else "",
        ),
        ("data", ", ".join(f"`{name}`" for name in names)),
        ("records", counts),
        ("trained on", f"{summary['trained_on']:,}; held out for the validation loss: {held_out:,}"),
        ("prompt", f"template {config.template}, at most {config.cutoff} tokens, loss on {config.loss_on} tokens"),
        (
            "optimizer",
            f"AdamW, betas {config.betas[0]:g} and {config.betas[1]:g}, epsilon {config.epsilon:g}{decay}{clip}",
        ),
        ("learning rate", rate_in_words(config, len(steps))),
        ("horizon", f"{len(steps):,} steps of {config.batch_size} records; {what} of step {kept or len(steps):,}"),
        (
            "rule as it was asked for",
            f"{config.rule}, alpha {config.alpha:g}" if config.method in ("lora", "dora") else "",
        ),
        ("training loss", _training_loss(steps)),
        ("validation loss", _validation_loss(tested, held_out)),
    ]
    datasets = dict.fromkeys(found[1] for source in sources if (found := re.match(rf"{HUB}([^/@:]+/[^/@:]+)", source)))
    return Trained([row for row in rows if row[1]], tuple(datasets), license)


def losses_in_words(events: Sequence[Mapping[str, Any]], held_out: int) -> str:
    """How far the losses came, in a sentence.

    Args:
      events: of `metrics.Metrics`, all of the run.
      held_out: records of the validation loss.
    """
    steps = [event for event in events if event["event"] == "step"]
    tested = [event for event in events if event["event"] == "validation"]
    said = (
        f"validation loss {_validation_loss(tested, held_out)}" if tested else f"training loss {_training_loss(steps)}"
    )
    return f"Trained for {len(steps):,} steps: {said}."


def figures(events: Sequence[Mapping[str, Any]], trainable: int) -> list[dict[str, Any]]:
    """What a run came to, a row a figure: ``what``, ``step`` (None of one that is of no step) and ``value``.

    Losses are nats a token: the training loss of the first batch and the mean of the last steps', the validation loss
    at first, best and last where there is one; then the median of tokens in the loss a second, and what was trained.

    Args:
      events: of `metrics.Metrics`, all of the run.
      trainable: parameters that were trained.
    """
    steps = [event for event in events if event["event"] == "step"]
    tested = [event for event in events if event["event"] == "validation"]
    rows: list[tuple[str, int | None, float]] = []
    if steps:
        last = steps[-LAST:]
        rows += [("training loss, first", steps[0]["step"], steps[0]["loss"])]
        rows += [(f"training loss, mean of the last {len(last)}", last[-1]["step"], fmean(s["loss"] for s in last))]
    if tested:
        found = {"first": tested[0], "best": _best(tested), "last": tested[-1]}
        rows += [(f"validation loss, {name}", one["step"], one["loss"]) for name, one in found.items()]
    if speeds := [one["targets"] / one["seconds"] for one in steps if one["seconds"]]:
        rows += [("tokens/s, median", None, median(speeds))]
    rows += [("trainable parameters", None, trainable)]
    return [dict(zip(("what", "step", "value"), row, strict=True)) for row in rows]


def begun_in_words(config: FinetuneConfig, summary: Mapping[str, Any], steps: int, trainable: int, share: float) -> str:
    """What is trained on what, and at which rate: a line each.

    Args:
      config: the run's.
      summary: `TrainingData.summary`.
      steps: of the whole run.
      trainable, share: parameters that are trained, and what part of all they are.
    """
    return (
        f"{trainable:,} trainable parameters, {share:.2%} of all\n"
        f"{summary['trained_on']} records, {steps} steps\n"
        f"learning rate {rate_in_words(config, steps)}"
    )


def rate_in_words(config: FinetuneConfig, steps: int) -> str:
    """How the rate of `step.schedule` went over all steps of a run."""
    peak, warmup = config.peak_learning_rate, config.warmup
    if 0 < steps <= warmup:
        last = peak * (steps - 1) / warmup
        return f"from 0 to {last:g} at the last step, within the {warmup} steps of warm-up to {peak:g}"
    shapes = {"constant": "constant", "linear": "linear decay", "cosine": "cosine decay"}
    shape = shapes[config.schedule] + ("" if config.schedule == "constant" else " to 0 after the last step")
    return f"{peak:g} after {warmup} steps of warm-up, then {shape}"


def _best(tested: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return min(tested, key=lambda event: inf if isnan(event["loss"]) else event["loss"])


def _training_loss(steps: Sequence[Mapping[str, Any]]) -> str:
    if not steps:
        return ""
    last = steps[-LAST:]
    return (
        f"{steps[0]['loss']:.4f} nats a token on the batch of step 1, before any update; "
        f"{fmean(step['loss'] for step in last):.4f}, the mean of the last {len(last)} steps"
    )


def _validation_loss(tested: Sequence[Mapping[str, Any]], held_out: int) -> str:
    if not tested:
        return "not measured: no record was held out"
    named = {"first": tested[0], "best": _best(tested), "last": tested[-1]}
    said = ", ".join(f"{event['loss']:.4f} at step {event['step']} ({name})" for name, event in named.items())
    return f"{said}; nats a token of {held_out:,} held-out records"
