"""The cells of a sweep: all that determines one fine-tuned and scored adapter, in the order of work."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from rora_theory import adapters, llama
from rora_theory.finetune import FinetuneConfig
from rora_theory.io import frames
from rora_theory.runs.cells import ERROR, FOLDERS
from rora_theory.runs.reading import as_json, finished, key_of, read_manifest
from rora_theory.scaling import scaling_factor
from rora_theory.sweep.design import BASE, METHODS, Design, rates_of
from rora_theory.sweep.records import RecordSplit

NOT_SHARED = (
    "method", "rule", "rank", "alpha", "lr", "seed", "held_out", "steps", "epochs", "batch_size", "evaluate_every",
    "checkpoint_every",
)  # fmt: skip
"""Settings of a fine-tuning run that are a cell's, change no result, or are in a sweep's identity by another name."""


@dataclass(frozen=True)
class SweepCell:
    """Everything that determines one cell's result; its key is the hash of this.

    Attributes:
      method: a name of `METHODS`, or `BASE`.
      rank, alpha, gamma, learning_rate, seed: None for `BASE`; the first three also for a method without a rank. gamma
        follows from the rule, alpha and the rank.
      model, revision, dtype: the base model.
      training: the whole fine-tuning run; None for `BASE`.
      data: digests and sizes of the training and held-out records.
      evaluation: protocol, tasks, limit and digests of the task files; None where the tasks are not scored.
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
        """In words, for a line of output."""
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
    """The cells of a design in the order of work: by seed, then rank (those without one first), then method.

    Args:
      design: what varies.
      shared: what all fine-tuning runs share, see `training_of`.
      revision: of the models.
      data, evaluation: see `SweepCell`.
      stage: 0 is everything, or, for a tuned design, the first seed at every rank without accuracy; 1 is the other
        seeds at the chosen rates.
      best: of stage 1, the learning rate of each model, method and rank, see `rora_theory.sweep.results.marked_rates`.

    Raises:
      InputError: a value out of range.
    """
    first = design.tuned and stage == 0
    seeds = design.seeds[:1] if first else design.seeds[1:] if design.tuned else design.seeds
    measured = None if first and len(design.seeds) > 1 else evaluation
    common: dict[str, Any] = {"revision": revision, "dtype": design.dtype, "data": dict(data)}
    found = []
    chosen: dict[Any, tuple[float, ...]] = {
        (row["model"], row["method"], row["rank"]): (row["learning_rate"],)
        for row in ([] if best is None else frames.rows(best))
    }
    for model in design.models:
        if BASE in design.methods and stage == 0:
            nothing: dict[str, Any] = dict.fromkeys(("rank", "alpha", "gamma", "learning_rate", "seed", "training"))
            found.append(SweepCell(method=BASE, model=model, evaluation=evaluation, **nothing, **common))
        for seed in seeds:
            for rank in (None, *design.ranks):
                for method in design.methods:
                    if method == BASE or METHODS[method].ranked == (rank is None):
                        continue
                    if stage == 1:
                        several = chosen.get((model, method, rank), ())
                    else:
                        several = design.lrs or rates_of(method, model, tuned=design.tuned)
                    for rate in several:
                        training = training_of(design, shared, method, rank, rate, seed)
                        strength: dict[str, Any] = {"alpha": None, "gamma": None}
                        if rank is not None:
                            gamma = scaling_factor(training.rule, alpha=training.alpha, rank=rank)
                            strength = {"alpha": training.alpha, "gamma": gamma}
                        found.append(
                            SweepCell(
                                method=method,
                                rank=rank,
                                learning_rate=rate,
                                seed=seed,
                                model=model,
                                training=training,
                                evaluation=measured,
                                **strength,
                                **common,
                            )
                        )
    return found


def stand_ins(cells: Sequence[SweepCell], folder: Path) -> list[SweepCell]:
    """The cells, with the scored twin of one that is not to be scored in its place where a run folder has that."""
    manifest = read_manifest(folder, ("config",))
    evaluation, done = manifest and manifest["config"].get("evaluation"), finished(folder)
    twins = [cell if cell.evaluation else replace(cell, evaluation=evaluation) for cell in cells]
    return [twin if key_of(twin) in done else cell for cell, twin in zip(cells, twins, strict=True)]


def cell_states(cells: Sequence[SweepCell], folder: Path) -> list[dict[str, Any]]:
    """The cells, or their `stand_ins`, each with its ``key`` and its ``state`` in a run folder: done, failed or new."""
    rows, done = [], finished(folder)
    for cell in stand_ins(cells, folder):
        key = key_of(cell)
        state = "done" if key in done else "failed" if (folder / FOLDERS / key / ERROR).exists() else "new"
        rows.append(vars(cell) | {"key": key, "state": state})
    return rows


def training_of(
    design: Design, shared: FinetuneConfig, method: str, rank: int | None, rate: float, seed: int
) -> FinetuneConfig:
    """The fine-tuning run of a cell.

    Args:
      design: whose rule for alpha and dtype it has.
      shared: everything else, but what changes no result. Its targets and dropout are those of methods with a rank; the
        others have their published modules, full fine-tuning these targets, and no dropout.
      method, rank, rate, seed: the cell's; no rank for a method that has none.

    Raises:
      InputError: a value out of range.
    """
    own: dict[str, Any] = {"lr": rate, "seed": seed, "dtype": design.dtype} | dict(METHODS[method].settings)
    if rank is None:
        # Full fine-tuning is beside the adapters of the same modules; the others have their own.
        own |= {"targets": shared.modules if own["method"] == "full" else None, "dropout": 0.0}
    else:
        alpha = 2.0 * rank if design.alpha_rule == "2r" else shared.alpha
        own |= {"rank": rank, "alpha": alpha, "targets": shared.modules}
    own |= {"held_out": 0, "checkpoint_every": FinetuneConfig.checkpoint_every}
    return shared.of_method(**own)


def check_cells(cells: Sequence[SweepCell], located: Mapping[str, llama.Located]) -> dict[str, dict[str, int]]:
    """Number of parameters of each model.

    Raises:
      InputError: a model is not to be had, or an adapter does not fit it.
    """
    configs: dict[str, llama.LlamaConfig] = {}
    for cell in cells:
        if cell.model not in configs:
            configs[cell.model] = llama.model_config(located[cell.model])
        if cell.training is not None:
            adapters.table(cell.training.adapter(), configs[cell.model])
    return {name: {"parameters": llama.count_parameters(config)} for name, config in configs.items()}


def sweep_identity(
    design: Design,
    shared: FinetuneConfig,
    records: RecordSplit,
    located: Mapping[str, llama.Located],
    *,
    revision: str | None = None,
) -> dict[str, Any]:
    """What all cells of a sweep share, beside how they are scored; a model enters with what its files hold."""
    settings = {name: value for name, value in as_json(shared).items() if name not in NOT_SHARED}
    return {
        "models": sorted(design.models),
        "revision": revision,
        "commits": {name: found.commit for name, found in located.items()},
        "model_sha256": {name: found.sha256 for name, found in located.items()},
        "data": records.summary,
        "training": {"steps": shared.steps, "epochs": shared.epochs, "batch": shared.batch_size},
        "settings": settings | {"targets": shared.modules, "dtype": design.dtype},
    }
