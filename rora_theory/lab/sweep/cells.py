"""Cells of a sweep, each with all settings that determine one fine-tuned and scored adapter."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from rora_theory.lab import llama
from rora_theory.lab.finetune import FinetuneConfig
from rora_theory.lab.sweep.design import BASE, METHODS, Design, rates_of
from rora_theory.lab.sweep.records import RecordSplit
from rora_theory.runs import frames
from rora_theory.runs.cells import CELLS_FOLDER, ERROR_FILE
from rora_theory.runs.reading import as_json, key_of, read_finished_cells, read_manifest
from rora_theory.scaling import scaling_factor

NOT_SHARED = (
    "method", "rule", "rank", "alpha", "lr", "seed", "held_out", "steps", "epochs", "batch_size", "evaluate_every",
    "checkpoint_every",
)  # fmt: skip
"""Settings of a fine-tuning run that vary by cell, change no result, or have another name in a sweep's identity."""


@dataclass(frozen=True)
class SweepCell:
    """Settings that determine the result of one cell; their hash is the cell's key.

    Attributes:
      method: Name from `METHODS`, or `BASE`.
      rank: Rank; None for `BASE` and for methods without a rank.
      alpha: Alpha; None for `BASE` and for methods without a rank.
      gamma: Scaling, which follows from the rule, alpha and rank; None for `BASE` and for methods without a rank.
      learning_rate: Peak learning rate; None for `BASE`.
      seed: Seed; None for `BASE`.
      model: Name of the base model.
      revision: Revision of the base model.
      dtype: Type of the base weights.
      training: Configuration of the fine-tuning run; None for `BASE`.
      data: Digests and sizes of the training and held-out records.
      evaluation: Protocol, tasks, limit and digests of the task files; None if the tasks are not scored.
    """

    method: str
    rank: int | None
    alpha: float | None
    gamma: float | None
    learning_rate: float | None
    seed: int | None
    model: str
    revision: str | None
    dtype: str
    training: FinetuneConfig | None
    data: Mapping[str, Any]
    evaluation: Mapping[str, Any] | None

    def __str__(self) -> str:
        """Return a short description of the cell."""
        if self.training is None:
            return f"{self.model}: base"
        size = f"r={self.rank} alpha={self.alpha:g} gamma={self.gamma:.4g} " if self.rank is not None else ""
        return f"{self.model}: {self.method} {size}lr={self.learning_rate:g} seed={self.seed}"


def cells_of(
    design: Design,
    shared: FinetuneConfig,
    *,
    revision: str | None = None,
    data: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None,
    stage: int,
    best: pd.DataFrame | None = None,
) -> list[SweepCell]:
    """Return the cells of a design in the order of work: by seed, rank (methods without a rank first) and method.

    Args:
      design: Settings that vary.
      shared: Settings that all fine-tuning runs share, see `training_of`.
      revision: Revision of the models.
      data: Digests and sizes of the records, see `SweepCell`.
      evaluation: Settings of the scoring, see `SweepCell`.
      stage: 0 for all cells or, in a tuned design, for those of the first seed without accuracy; 1 for the other seeds
        of a tuned design at the chosen rates.
      best: Learning rate of each model, method and rank for stage 1, see `rora_theory.lab.sweep.results.marked_rates`.

    Raises:
      InputError: If a value is out of range.
    """
    # A tuned design compares rates at the first seed, which needs no accuracies unless it is the only seed.
    is_tuning = design.tuned and stage == 0
    seeds = design.seeds[:1] if is_tuning else design.seeds[1:] if design.tuned else design.seeds
    seed_evaluation = None if is_tuning and len(design.seeds) > 1 else evaluation
    common: dict[str, Any] = {"revision": revision, "dtype": design.dtype, "data": dict(data)}
    cells = []
    # Stage 1 repeats the rates that were best at the first seed.
    best_rates: dict[Any, tuple[float, ...]] = {
        (row["model"], row["method"], row["rank"]): (row["learning_rate"],)
        for row in ([] if best is None else frames.rows(best))
    }
    for model in design.models:
        # The base model is one cell without training.
        if BASE in design.methods and stage == 0:
            untrained: dict[str, Any] = dict.fromkeys(("rank", "alpha", "gamma", "learning_rate", "seed", "training"))
            cells.append(SweepCell(method=BASE, model=model, evaluation=evaluation, **untrained, **common))
        for seed in seeds:
            for rank in (None, *design.ranks):
                for method in design.methods:
                    # Methods without a rank belong to the first turn of the loop, in which the rank is None.
                    if method == BASE or METHODS[method].has_rank == (rank is None):
                        continue
                    # Rates: the best one of stage 0, those of the options, or the published ones of the method.
                    if stage == 1:
                        rates = best_rates.get((model, method, rank), ())
                    else:
                        rates = design.lrs or rates_of(method, model, tuned=design.tuned)
                    for rate in rates:
                        training = training_of(design, shared, method, rank, rate, seed)
                        # Alpha and gamma exist only for methods with a rank.
                        strength: dict[str, Any] = {"alpha": None, "gamma": None}
                        if rank is not None:
                            gamma = scaling_factor(training.rule, alpha=training.alpha, rank=rank)
                            strength = {"alpha": training.alpha, "gamma": gamma}
                        cells.append(
                            SweepCell(
                                method=method,
                                rank=rank,
                                learning_rate=rate,
                                seed=seed,
                                model=model,
                                training=training,
                                evaluation=seed_evaluation,
                                **strength,
                                **common,
                            )
                        )
    return cells


def replace_with_scored(cells: Sequence[SweepCell], folder: Path) -> list[SweepCell]:
    """Replace each cell without scoring by the same cell with scoring, if a run folder has finished that one."""
    manifest = read_manifest(folder, ("config",))
    evaluation, finished_cells = manifest and manifest["config"].get("evaluation"), read_finished_cells(folder)
    scored_cells = [cell if cell.evaluation else replace(cell, evaluation=evaluation) for cell in cells]
    return [
        scored if key_of(scored) in finished_cells else cell for cell, scored in zip(cells, scored_cells, strict=True)
    ]


def cell_states(cells: Sequence[SweepCell], folder: Path) -> list[dict[str, Any]]:
    """Return the cells, see `replace_with_scored`, with their ``key`` and their ``state``: done, failed or new."""
    rows, finished_cells = [], read_finished_cells(folder)
    for cell in replace_with_scored(cells, folder):
        key = key_of(cell)
        has_failed = (folder / CELLS_FOLDER / key / ERROR_FILE).exists()
        state = "done" if key in finished_cells else "failed" if has_failed else "new"
        rows.append(vars(cell) | {"key": key, "state": state})
    return rows


def training_of(
    design: Design, shared: FinetuneConfig, method: str, rank: int | None, rate: float, seed: int
) -> FinetuneConfig:
    """Return the fine-tuning configuration of a cell.

    Args:
      design: Design with the rule for alpha and the dtype.
      shared: Settings that all cells share. Targets and dropout apply to methods with a rank; other methods adapt their
        published modules (full fine-tuning these targets) without dropout.
      method: Name of the method.
      rank: Rank; None for a method without a rank.
      rate: Peak learning rate.
      seed: Seed of the run.

    Raises:
      InputError: If a value is out of range.
    """
    settings: dict[str, Any] = {"lr": rate, "seed": seed, "dtype": design.dtype} | dict(METHODS[method].settings)
    if rank is None:
        # Full fine-tuning is compared with adapters of the same modules; other methods have modules of their own.
        settings |= {"targets": shared.modules if settings["method"] == "full" else None, "dropout": 0.0}
    else:
        alpha = 2.0 * rank if design.alpha_rule == "2r" else shared.alpha
        settings |= {"rank": rank, "alpha": alpha, "targets": shared.modules}
    # Settings that change no result must not change the cell's key.
    settings |= {"held_out": 0, "checkpoint_every": FinetuneConfig.checkpoint_every}
    return shared.with_method(**settings)


def describe_models(cells: Sequence[SweepCell], located: Mapping[str, llama.ModelSource]) -> dict[str, dict[str, int]]:
    """Check that all adapters fit their models, and return the number of parameters of each model.

    Raises:
      InputError: If a model is not available, or if an adapter does not fit it.
    """
    configs: dict[str, llama.LlamaConfig] = {}
    for cell in cells:
        if cell.model not in configs:
            configs[cell.model] = llama.model_config(located[cell.model])
        if cell.training is not None:
            cell.training.adapter().table(configs[cell.model])
    return {name: {"parameters": llama.count_parameters(config)} for name, config in configs.items()}


def sweep_identity(
    design: Design,
    shared: FinetuneConfig,
    records: RecordSplit,
    located: Mapping[str, llama.ModelSource],
    *,
    revision: str | None = None,
) -> dict[str, Any]:
    """Return the settings that all cells of a sweep share, except those of the scoring.

    Models are identified by the digests of their files.
    """
    settings = {name: value for name, value in as_json(shared).items() if name not in NOT_SHARED}
    return {
        "models": sorted(design.models),
        "revision": revision,
        "commits": {name: location.commit for name, location in located.items()},
        "model_sha256": {name: location.sha256 for name, location in located.items()},
        "data": records.summary,
        "training": {"steps": shared.steps, "epochs": shared.epochs, "batch": shared.batch_size},
        "settings": settings | {"targets": shared.modules, "dtype": design.dtype},
    }
