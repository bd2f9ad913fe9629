"""Cells of a sweep of language models, each one fine-tuned and scored adapter."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from rora_theory.errors import InputError
from rora_theory.lab import llama
from rora_theory.lab.data.batches import count_epoch_steps
from rora_theory.lab.finetune import FinetuneConfig
from rora_theory.lab.sweep.grid import SweepCell, SweepGrid
from rora_theory.lab.sweep.methods import BASE
from rora_theory.runs.cells import CELLS_FOLDER, ERROR_FILE
from rora_theory.runs.reading import key_of, read_finished_cells
from rora_theory.validation.rules import check_warmup


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
    cells = []
    for model in grid.model:
        # The base model is one cell without training.
        if BASE in grid.methods:
            cells.append(SweepCell(model, BASE, evaluation=evaluation))
        # A value that all runs share anyway is no axis of the cell.
        variants = [
            {name: value for name, value in variant.items() if value != getattr(shared, name)}
            for variant in grid.variants()
        ]
        settings = list(grid.settings(model, variants, lambda method: grid.gains or (shared.alpha,)))
        for seed, setting in product(grid.seeds, settings):
            runs = product(_read_outs(grid, shared, setting.axes, train_records), grid.rates(setting.method, model))
            cells += [
                replace(setting, rate=rate, seed=seed, read_at=read_at, evaluation=evaluation) for read_at, rate in runs
            ]
    return cells


def _read_outs(
    grid: SweepGrid, shared: FinetuneConfig, axes: Mapping[str, Any], train_records: int
) -> list[tuple[int, ...]]:
    """Return the numbers of steps of the read-outs of each run; an epoch has all records, before any is left out."""
    settings: dict[str, Any] = vars(shared) | dict(axes)
    epoch = count_epoch_steps(train_records, settings["batch_size"])
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
