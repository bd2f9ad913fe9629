"""Cells of a sweep, each with all settings that determine one fine-tuned and scored adapter."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from rora_theory.errors import InputError
from rora_theory.lab import llama
from rora_theory.lab.finetune import FinetuneConfig
from rora_theory.lab.sweep.design import BASE, METHODS, SweepGrid
from rora_theory.runs.cells import CELLS_FOLDER, ERROR_FILE
from rora_theory.runs.reading import key_of, read_finished_cells
from rora_theory.scaling import scaling_factor
from rora_theory.validation.rules import check_warmup


@dataclass(frozen=True)
class SweepCell:
    """Training run of a matrix with its read-outs. With what all runs of a folder share, it determines the result.

    Attributes:
      model: Name of the base model.
      method: Name from `METHODS`, or `BASE`.
      rank: Rank; None for `BASE` and for methods without a rank.
      alpha: Alpha; None for `BASE` and for methods without a rank.
      rate: Peak learning rate; None for `BASE`.
      seed: Seed; None for `BASE`.
      read_at: Numbers of steps after which the held-out records are evaluated; the run ends at the last. Empty for
        `BASE`.
      axes: Settings of the run in place of the shared ones, by names from `AXES`.
      evaluation: Protocol, tasks, limit and digests of the task files; None if the tasks are not scored.
    """

    model: str
    method: str
    rank: int | None = None
    alpha: float | None = None
    rate: float | None = None
    seed: int | None = None
    read_at: tuple[int, ...] = ()
    axes: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] | None = None

    def __str__(self) -> str:
        if self.method == BASE:
            return f"{self.model}: base"
        size = f"r={self.rank} alpha={self.alpha:g} gamma={self.gamma:.4g} " if self.rank is not None else ""
        axes = "".join(f" {name}={value}" for name, value in self.axes.items())
        return f"{self.model}: {self.method} {size}lr={self.rate:g}{axes} seed={self.seed}"

    @property
    def gamma(self) -> float | None:
        """Scaling of the adapter; None for methods without a rank."""
        if self.rank is None or self.alpha is None:
            return None
        return scaling_factor(METHODS[self.method].settings["rule"], alpha=self.alpha, rank=self.rank)

    def training(self, shared: FinetuneConfig) -> FinetuneConfig | None:
        """Return the fine-tuning configuration of the run; None for `BASE`.

        Args:
          shared: Settings that all runs share. Targets and dropout apply to methods with a rank; other methods adapt
            their published modules (full fine-tuning these targets) without dropout.

        Raises:
          InputError: If a value is out of range.
        """
        if self.method == BASE:
            return None
        settings: dict[str, Any] = dict(self.axes) | {"lr": self.rate, "seed": self.seed, "steps": self.read_at[-1]}
        settings |= METHODS[self.method].settings
        if self.rank is None:
            # Full fine-tuning is compared with adapters of the same modules; other methods have modules of their own.
            settings |= {"targets": shared.modules if settings["method"] == "full" else None, "dropout": 0.0}
        else:
            settings |= {"rank": self.rank, "alpha": self.alpha, "targets": shared.modules}
        return shared.with_method(**settings | {"held_out": 0})


def cells_of(
    grid: SweepGrid,
    shared: FinetuneConfig,
    *,
    train_records: int,
    evaluation: Mapping[str, Any] | None = None,
) -> list[SweepCell]:
    """Return the cells of a grid in the order of work: by seed, rank (methods without a rank first) and method.

    Args:
      grid: Settings that vary.
      shared: Settings that all training runs share.
      train_records: Number of training records, which determines the steps of a run of whole epochs.
      evaluation: Settings of the scoring, see `SweepCell`.

    Raises:
      InputError: If a value is out of range.
    """
    methods = grid.methods + (("full",) if grid.full_lrs and "full" not in grid.methods else ())
    cells = []
    for model in grid.model:
        # The base model is one cell without training.
        if BASE in methods:
            cells.append(SweepCell(model, BASE, evaluation=evaluation))
        # A value that all runs share anyway is no axis of the cell.
        variants = [
            {name: value for name, value in variant.items() if value != getattr(shared, name)}
            for variant in grid.variants()
        ]
        for seed, axes, rank, method in product(grid.seeds, variants, (None, *grid.ranks), methods):
            # Methods without a rank belong to the first turn of the loop, in which the rank is None.
            if method == BASE or METHODS[method].has_rank == (rank is None):
                continue
            alphas = (None,) if rank is None else grid.gains or (shared.alpha,)
            runs = product(alphas, _read_outs(grid, shared, axes, train_records), grid.rates(method, model))
            cells += [
                SweepCell(model, method, rank, alpha, rate, seed, read_at, axes, evaluation)
                for alpha, read_at, rate in runs
            ]
    return cells


def _read_outs(
    grid: SweepGrid, shared: FinetuneConfig, axes: Mapping[str, Any], train_records: int
) -> list[tuple[int, ...]]:
    """Return the numbers of steps of the read-outs of each run."""
    settings: dict[str, Any] = vars(shared) | dict(axes)
    epoch = -(-train_records // settings["batch_size"])
    steps: tuple[int, ...] = grid.read_at or (shared.steps or shared.epochs * epoch,)
    # The first step of a warm-up has the rate 0: after it there is no change to measure.
    if steps[0] == 1 and settings["warmup"]:
        raise InputError(
            f"read_at must begin at 2 or more with warmup {settings['warmup']}, under which the first step has the "
            "rate 0, got 1"
        )
    # A rate that decays depends on where the run ends: every read-out needs a run of its own.
    runs: list[tuple[int, ...]] = [steps] if settings["schedule"] == "constant" else [(step,) for step in steps]
    for run in runs:
        check_warmup(settings["warmup"], run[-1])
    return runs


def cell_states(cells: Sequence[SweepCell], folder: Path) -> list[dict[str, Any]]:
    """Return the cells with their ``key`` and their ``state``: done, failed or new."""
    rows, finished_cells = [], read_finished_cells(folder)
    for cell in cells:
        key = key_of(cell)
        has_failed = (folder / CELLS_FOLDER / key / ERROR_FILE).exists()
        state = "done" if key in finished_cells else "failed" if has_failed else "new"
        rows.append(vars(cell) | {"gamma": cell.gamma, "key": key, "state": state})
    return rows


def describe_models(
    cells: Sequence[SweepCell], shared: FinetuneConfig, located: Mapping[str, llama.ModelSource]
) -> dict[str, dict[str, int]]:
    """Check that all adapters fit their models, and return the number of parameters of each model.

    Raises:
      InputError: If a model is not available, or if an adapter does not fit it.
    """
    configs: dict[str, llama.LlamaConfig] = {}
    for cell in cells:
        if cell.model not in configs:
            configs[cell.model] = llama.model_config(located[cell.model])
        training = cell.training(shared)
        if training is not None:
            training.adapter().table(configs[cell.model])
    return {name: {"parameters": llama.count_parameters(config)} for name, config in configs.items()}
