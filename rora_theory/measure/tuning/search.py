"""Learning rate of a LoRA run: what public sweeps lead to expect, or a short probe on the model and data of the run.

tuned = tune(model, config=LoraConfig(r=128), steps=2000, batch_size=8)
print(tuned.sentence())
TrainingArguments(learning_rate=tuned.learning_rate, max_steps=2000, lr_scheduler_type="cosine", ...)
"""

import copy
import functools
import hashlib
import itertools
import json
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from rora_theory.advice.best_rate import Run
from rora_theory.defaults import TRAINER_BATCH_SIZE
from rora_theory.errors import InputError
from rora_theory.laws.random.seeds import check_seed
from rora_theory.measure.batches import Loss, loss_function
from rora_theory.measure.modules import check_weights, preserved_state, select_modules, unwrap
from rora_theory.measure.progress import announce, bar, one_line_if_interrupted
from rora_theory.measure.tuning.examples import (
    MAX_HELD_OUT_BATCHES,
    Data,
    Group,
    count_repeated,
    count_rows,
    count_tokens,
    digest,
    held_out_groups,
    preserved_generators,
    read_batches,
)
from rora_theory.measure.tuning.plan import (
    MAX_PROBE_STEPS,
    ProbePlan,
    explain_useless_probe,
    make_plan,
    next_trial,
)
from rora_theory.measure.tuning.prior import rate_prior
from rora_theory.measure.tuning.result import Tuning, conclude, conclude_without_probe
from rora_theory.measure.tuning.training import (
    MakeOptimizer,
    ProbeModel,
    ProbeSettings,
    check_no_adapters,
    config_gain,
    probe_config,
)
from rora_theory.measure.tuning.trial import ProbeRun
from rora_theory.optimizers import SCHEDULES, Schedule
from rora_theory.runs import files
from rora_theory.scaling import check_choice, check_instance, check_integer, check_not_negative
from rora_theory.validation.rules import check_warmup

logger = logging.getLogger(__name__)

PROBE_RANK = 8
"""Default rank of the probe's adapters."""

NOT_IDENTIFYING = ("base_model_name_or_path", "auto_mapping", "peft_version", "runtime_config")
"""Entries of a ``LoraConfig`` that have no effect on training."""

MIN_GROUPS = 2
"""Minimum number of groups of held-out rows that an evaluation must afford."""


@one_line_if_interrupted("Interrupted. Call tune again with the same checkpoint to resume.")
def tune(
    model: torch.nn.Module,
    train: Data | None = None,
    held_out: Data | None = None,
    *,
    config: LoraConfig,
    steps: int = 2000,
    schedule: Schedule = "cosine",
    warmup: int = 0,
    tokenizer: Any = None,
    batch_size: int = TRAINER_BATCH_SIZE,
    accumulation: int = 1,
    max_length: int = 1024,
    learning_rate: float | None = None,
    family: str | None = None,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    make_optimizer: MakeOptimizer | None = None,
    loss: Loss | None = None,
    probe_rank: int = PROBE_RANK,
    budget: float = 0.0,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool = False,
) -> Tuning:
    """Return the learning rate of a planned LoRA run: what public sweeps lead to expect, or a short probe's update.

    The prior is the best rate of public models by size, transferred to the planned run (`measure.tuning.prior`). By
    default it is the result, and nothing is trained or read. With a ``budget``, a probe trains adapters of a small rank
    at the planned run's gain for a few steps, at several learning rates, on the same batches in the same order. Its
    held-out losses update the prior (`measure.tuning.posterior`): losses that say nothing leave it as it was. The cost
    is at most ``budget`` of the planned run, evaluations included; it is stated before the probe starts with what the
    probe is expected to gain, and with the budget that is expected to gain more if that is too little.

    In the test on cases that were kept apart, probes of a tenth of the run did not beat the prior as a criterion that
    was written before demands: `docs/how-to/find-the-learning-rate.md`.

    The model is trained in its own dtype, or by the caller's ``torch.autocast``, on its own device. Afterwards it is as
    it was: weights, buffers, modes, ``requires_grad`` and random generators.

    Args:
      model: Base model without adapters.
      train: Training batches with labels, such as a ``DataLoader``; or, with ``tokenizer``, records: texts, chats
        (``{"messages": [...]}``), ``{"text": ...}`` or ``{"input_ids": [...]}``. The first ones are used. Texts get
        the tokenizer's own special tokens only: append an end token if the trainer of the run does. None without a
        budget.
      held_out: Other batches or records, on which the rates are compared; None without a budget.
      config: Configuration of the planned run's adapters.
      steps: Number of optimizer steps of the planned run.
      schedule: Learning-rate schedule of the planned run: cosine, linear or constant.
      warmup: Number of warm-up steps of the planned run.
      tokenizer: Tokenizer of transformers for records.
      batch_size: Number of records of a batch, by default that of transformers' Trainer. In a probe, batches that are
        given keep their size.
      accumulation: Number of batches per optimizer step.
      max_length: Maximum number of tokens of a record; longer ones are truncated.
      learning_rate: Your own guess for the planned run, the median of a probe's prior; None is the public sweeps' rate.
      family: Family of the model, one of `rora_theory.evidence.starting_rates.families`; None is another.
      weight_decay: Decoupled weight decay of AdamW.
      max_grad_norm: Maximum norm of the gradient, as in transformers' Trainer; 0 disables clipping.
      make_optimizer: Function of the adapters' parameters and the learning rate that returns another optimizer, for
        which ``weight_decay`` has no effect. None is AdamW. The law behind the transfer is that of Adam.
      loss: Function of the model and a batch that returns the mean loss over its labels; None is
        ``model(**batch).loss``.
      probe_rank: Maximum rank of the probe's adapters; the rank of ``config`` if that is lower.
      budget: Maximum cost of a probe as a share of the planned run; 0 trains nothing.
      seed: Seed of the adapters' initialisation and of dropout, the same for every run.
      checkpoint: JSON file to which finished runs are saved and from which an interrupted probe resumes, if model,
        settings and batches are the same (give a shuffled ``DataLoader`` a seeded generator); None saves nothing.
      progress: Whether to show transformers' progress bar, below a sentence with the planned runs and their cost.
        Without it the sentence is logged at level ``INFO``.

    Returns:
      The learning rate with its range, the curve of losses, the assumptions and the cost; ``config`` is that of the
      planned run.

    Raises:
      InputError: If an argument is out of range, the budget is too small, there are data without a budget or a budget
        without data, the configuration trains more than LoRA adapters of one rank, the model already has adapters or
        offloaded weights, there are no labels, or the checkpoint belongs to another probe; if the first loss is not
        finite, every rate diverged, or all gave one loss.
    """
    # Validate all settings before reading data.
    check_integer("steps", steps)
    check_choice("schedule", schedule, SCHEDULES)
    check_warmup(warmup, steps)
    for name, value in (("batch_size", batch_size), ("accumulation", accumulation), ("probe_rank", probe_rank)):
        check_integer(name, value)
    check_integer("max_length", max_length, minimum=2)
    check_not_negative("weight_decay", weight_decay)
    check_not_negative("max_grad_norm", max_grad_norm)
    check_seed("seed", seed)
    check_instance("model", model, torch.nn.Module, "a torch.nn.Module")
    gain = config_gain(config)
    compute_loss = loss_function(loss)
    if make_optimizer is not None:
        check_instance("make_optimizer", make_optimizer, Callable, "a function")
    model = unwrap(model)
    check_no_adapters(model)
    check_weights(model, offloaded=False)
    # Report an entry that matches no module before any data are read.
    if config.target_modules is not None:
        targets = config.target_modules
        select_modules(model, targets if isinstance(targets, str) else sorted(targets))
    # A checkpoint that cannot be written is an error now, not after the first run.
    check_instance("checkpoint", checkpoint, str | Path | None, "the path of a file")
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None:
        files.check_folder(path.parent)
    # The planned run, whose best rate the law carries.
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    run = Run(config.r, gain, steps, schedule, batch_size * accumulation)
    if budget == 0:
        if train is not None or held_out is not None:
            raise InputError("train and held_out have no effect without a budget. Pass budget=0.1 or no data.")
        prior = rate_prior(run, family=family, parameters=parameters)
        return conclude_without_probe(prior, steps=steps, config=copy.deepcopy(config))
    if train is None or held_out is None:
        raise InputError(f"train and held_out must be given for a probe, got budget {budget:g} without them")
    announce("Reading the batches", shown=progress)
    # Reading a DataLoader draws from PyTorch's random generators, or from its own.
    with preserved_state(model), preserved_generators(train, held_out):
        read_options: dict[str, Any] = {"tokenizer": tokenizer, "batch_size": batch_size, "max_length": max_length}
        batches = read_batches(train, "train", **read_options, count=MAX_PROBE_STEPS * accumulation)
        groups = held_out_groups(model, read_batches(held_out, "held_out", **read_options, count=MAX_HELD_OUT_BATCHES))
    # Mean number of tokens of an optimizer step, which is the unit of the budget, and those of the probe's own steps.
    tokens = list(map(count_tokens, batches))
    batch_tokens = accumulation * sum(tokens) / len(tokens)
    repeated = itertools.cycle(tokens)
    step_tokens = [sum(itertools.islice(repeated, accumulation)) for _ in range(MAX_PROBE_STEPS)]
    # Batches that are given keep their size. A smaller rank at the same gain trains faster.
    rank = min(probe_rank, config.r)
    run = replace(run, batch_size=max(count_rows(batch) for batch in batches) * accumulation)
    plan_settings: dict[str, Any] = {
        "probe_rank": rank,
        "parameters": parameters,
        "family": family,
        "batch_tokens": batch_tokens,
        "step_tokens": step_tokens,
        "held_out_tokens": sum(group.tokens for group in groups),
        "learning_rate": learning_rate,
    }
    plan = make_plan(run, budget=budget, **plan_settings)
    explanation = explain_useless_probe(plan, **plan_settings)
    statement = plan.sentence() if explanation is None else f"{plan.sentence()} {explanation}"
    # Evaluate on as many held-out groups as the budget allows.
    affordable_groups = _affordable_groups(groups, plan.held_out_tokens(batch_tokens))
    settings = ProbeSettings(
        probe_config(config, rank),
        gain,
        steps,
        schedule,
        warmup,
        accumulation,
        make_optimizer or _adamw(weight_decay),
        max_grad_norm,
        seed,
    )
    repeats = _describe_repeats(count_repeated(affordable_groups, batches))
    for sentence in repeats:
        logger.warning(sentence)
    announce("Preparing the adapters", shown=progress)
    # A checkpoint belongs to one model, configuration, plan and data.
    probe = ProbeModel(model, settings, batches, affordable_groups, compute_loss)
    probe.check_labels(plan.probe_steps)
    optimizer, heads = probe.describe()
    identity = _identity(model, settings, plan) | {"optimizer": optimizer, "loss": _qualified_name(loss)}
    identity |= {"train": digest(batches), "held_out": digest(group.batch for group in affordable_groups)}
    runs = [] if path is None else _read_runs(path, identity)
    shown_total = math.ceil(plan.budget)
    description = f"Tuning the learning rate (at most {shown_total} training steps)"
    # Train one rate after the other, each chosen from the results so far, and save every result.
    with bar(shown_total, description=description, unit="step", shown=progress) as progress_bar:
        # State the cost before the first run.
        if progress:
            progress_bar.write(statement, file=sys.stderr)
        else:
            logger.info(statement)
        progress_bar.update(sum(run.diverged_at or run.steps for run in runs))
        while (trial := next_trial(plan, runs)) is not None:
            runs.append(probe.train(trial, progress_bar.update, progress_bar.set_postfix_str))
            if not progress:
                logger.info(_describe_run(runs[-1], affordable_groups))
            if path is not None:
                _write_runs(path, identity, runs)
    # Update the prior of the planned run's rate.
    return conclude(
        plan,
        runs,
        [group.targets for group in affordable_groups],
        config=copy.deepcopy(config),
        remarks=[
            *_remarks(plan, config, len(batches) / accumulation, affordable_groups, groups, heads),
            *repeats,
            *([] if explanation is None else [explanation]),
        ],
    )


def _adamw(weight_decay: float) -> MakeOptimizer:
    return lambda parameters, rate: torch.optim.AdamW(parameters, lr=rate, weight_decay=weight_decay)


def _affordable_groups(groups: Sequence[Group], tokens: int) -> list[Group]:
    """Return the first groups with at most this number of tokens.

    Raises:
      InputError: If there are fewer than two groups, or the first two have more tokens.
    """
    affordable_groups, total = [], 0
    for group in groups:
        total += group.tokens
        if total > tokens:
            break
        affordable_groups.append(group)
    # The error of a loss comes from the spread between groups, which needs two of them.
    if len(groups) < MIN_GROUPS:
        raise InputError("held_out must have two rows or more with a label, got one. Pass more held-out rows.")
    if len(affordable_groups) < MIN_GROUPS:
        fewest = groups[:MIN_GROUPS]
        raise InputError(
            f"held_out must have rows of which two have at most {tokens} tokens, which the budget allows per "
            f"evaluation, got {sum(group.tokens for group in fewest)}. Raise budget, or pass shorter held-out rows."
        )
    return affordable_groups


def _describe_repeats(count: int) -> list[str]:
    """Return a warning if held-out rows equal training rows; their losses favour rates that memorise."""
    return [f"{count} held-out records equal training records: pass other held-out records."] if count else []


def _describe_run(run: ProbeRun, groups: Sequence[Group]) -> str:
    """Describe a finished run for the log."""
    if run.diverged_at is not None:
        result = f"diverged at step {run.diverged_at}"
    else:
        result = f"held-out loss {run.total / sum(group.targets for group in groups):.4f}"
    return f"learning rate {run.learning_rate:.3g}, {run.steps} steps: {result}"


def _remarks(
    plan: ProbePlan,
    config: LoraConfig,
    batch_steps: float,
    affordable_groups: Sequence[Group],
    groups: Sequence[Group],
    heads: Sequence[str],
) -> list[str]:
    """Return the assumptions that depend on the data and the configuration.

    Args:
      plan: Plan of the probe.
      config: Configuration of the planned run's adapters.
      batch_steps: Number of steps before the training batches repeat.
      affordable_groups: Held-out rows that are evaluated.
      groups: All held-out rows.
      heads: Names of the modules that are trained beside the adapters.
    """
    tokens = sum(group.targets for group in affordable_groups)
    remarks = [f"Held-out losses are over {tokens:,} labels."]
    if len(affordable_groups) < len(groups):
        total = sum(group.targets for group in groups)
        remarks = [f"Held-out losses are over {tokens:,} of {total:,} labels, as the budget allows."]
    if batch_steps < plan.probe_steps:
        remarks.append(f"The batches of {batch_steps:g} steps were repeated over {plan.probe_steps}.")
    if heads:
        remarks.append(f"PEFT trains {', '.join(heads)} too, at the same learning rate; the law was measured without.")
    if config.use_dora:
        remarks.append("DoRA's magnitudes are trained too; the law was measured without them.")
    return remarks


def _identity(model: torch.nn.Module, settings: ProbeSettings, plan: ProbePlan) -> dict[str, Any]:
    """Return the model, settings and plan that identify the probe of a checkpoint, in JSON types."""
    # The first entries of every weight identify the model without reading all weights.
    state = hashlib.sha256()
    for name, parameter in model.named_parameters():
        sample = parameter.detach().reshape(-1)[:8].cpu()
        state.update(f"{name} {parameter.dtype} {tuple(parameter.shape)} {sample.tolist()}".encode())
    # Sets are sorted: their order differs between processes.
    entries = {
        name: sorted(value) if isinstance(value, set) else value for name, value in vars(settings.config).items()
    }
    names = ("schedule", "warmup", "accumulation", "max_grad_norm", "seed")
    return {
        "model": state.hexdigest(),
        "config": {name: repr(value) for name, value in entries.items() if name not in NOT_IDENTIFYING},
        "settings": {name: getattr(settings, name) for name in names},
        "plan": asdict(plan),
    }


def _qualified_name(function: Any) -> str | None:
    """Return the name of a function, or of the class of another callable; None for None."""
    while isinstance(function, functools.partial):
        function = function.func
    return None if function is None else getattr(function, "__qualname__", type(function).__qualname__)


def _read_runs(path: Path, identity: Mapping[str, Any]) -> list[ProbeRun]:
    """Return the runs in a checkpoint; none if the file does not exist.

    Raises:
      InputError: If the file is damaged or belongs to another probe.
    """
    if not path.exists():
        return []
    saved = files.read_object(path, accepted="a checkpoint of tune")
    with files.naming_damage(path):
        different = [name for name, value in identity.items() if saved["identity"].get(name) != _plain(value)]
        if different:
            raise InputError(
                f"{path}: is the checkpoint of another probe, which differs in {', '.join(different)}. Pass another "
                "checkpoint, or delete the file."
            )
        return [ProbeRun.from_json(run) for run in saved["runs"]]


def _write_runs(path: Path, identity: Mapping[str, Any], runs: Sequence[ProbeRun]) -> None:
    content = {"identity": identity, "runs": [run.as_json() for run in runs]}
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_whole(path, json.dumps(content, indent=2) + "\n")


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))
