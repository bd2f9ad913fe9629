"""Measure from which rank on the gradient dominates each module's first step, from one batch and without training.

    python -m sims.regime --model smollm2-135m --data DATA/ARC-Easy/train.json

For each module, the command computes the signal (the part of the step along the gradient of the full weight), the
cross-talk (the part that A's random directions add) and the crossing rank r*, at which they are equal, under SGD and
Adam, on the batch and on held-out records; the predicted rms of the first change of the output at each rank; and the
steps after which A dominates under Adam. It then draws adapters at every rank, takes their first step, and compares the
measured change with the prediction. Attention sinks, and held-out tokens with the same beginning as a training text,
are left out. `--adapter` measures the model with a trained adapter merged into its weights; for a model that was
trained in full, pass its folder as `--model`.

The run folder contains:

- `results.csv`: a row per module, split, optimizer, initialisation, rule and rank
- `crossing_ranks.csv`: crossing ranks, which `sims.transfer --regime` reads
- `crossing_distances.csv`: distances at which A dominates
- `crossing_summary.csv`, `crossing_distance_summary.csv`: medians and ranges over the layers, by type of module
- `tokens.csv`: numbers of tokens, and of tokens left out
- `judge.csv`, `verdict.json`: agreement between measurement and prediction by rank, and the verdict

`python -m figures.regime RUN` draws the results.
"""

import json
import math
import sys
import warnings as python_warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from rora_theory.advice.adapter_config import PAPER_TARGETS, without_list_of_all_linear
from rora_theory.errors import InputError
from rora_theory.lab import adapters
from rora_theory.lab.data.formats import TrainTemplate
from rora_theory.lab.data.records import DataConfig
from rora_theory.measure.regimes import tables as regime_tables
from rora_theory.measure.regimes import thin
from rora_theory.measure.regimes.module_regime import Regime, RegimeConfig, RegimeRows
from rora_theory.runs.folder import RunFolder, check_free, path_of
from rora_theory.runs.reading import flatten
from rora_theory.runs.summary import key_figures
from rora_theory.scaling import check_integer
from rora_theory.validation.rules import check_list, listed
from sims.common import answers, cli, inputs, prompts, record_batches, tables
from sims.common.cells import run_with_bar
from sims.common.progress import progress_bar
from sims.common.record_batches import PairConfig
from sims.common.summaries import summarised

NAME = "regime"

LAYERS_PER_CELL = 8
"""Number of layers that are measured, and saved, together. Each group takes two forward passes and a backward pass."""


@dataclass(frozen=True)
class RegimeOptions:
    data: cli.Data
    model: cli.ModelName = "smollm2-135m"
    revision: cli.Revision = None
    adapter: Path | None = None
    """Folder of a trained adapter in PEFT's format to merge first: measures the regime after that training"""
    reading: DataConfig = field(default_factory=DataConfig)
    template: TrainTemplate | None = None
    """Prompt template: train (as published), clean, chat (the model's chat template) or plain (the prompt followed
    directly by the response); by default train for alpaca, chat for chats, plain for other
    formats"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the weights and activations"""
    targets: tuple[str, ...] = PAPER_TARGETS
    """Modules to measure, as target_modules; all-linear for all linear modules"""
    layers: tuple[int, ...] | None = None
    """Layers to measure; by default all"""
    batches: PairConfig = field(default_factory=PairConfig)
    measured: RegimeConfig = field(default_factory=RegimeConfig)
    out: cli.Out = None

    def __post_init__(self) -> None:
        check_list("targets", self.targets)
        if self.layers is not None:
            check_list("layers", self.layers, partial(check_integer, minimum=0))
        if self.adapter is not None and not self.adapter.is_dir():
            raise InputError(f"adapter must be the folder of an adapter in PEFT's format, got {self.adapter}")


@dataclass(frozen=True)
class RegimeCell:
    """Layers that are measured together."""

    layers: tuple[int, ...]

    def __str__(self) -> str:
        return f"layers {listed(self.layers)}"


def measure_regime(config: RegimeOptions) -> None:
    """Measure the layers that the run folder lacks, and report.

    Raises:
      SystemExit: If the measurement contradicts the prediction, with status 1.
    """
    with progress_bar("importing PyTorch and PEFT", 1):
        from rora_theory.measure.batches import check_unseen
        from rora_theory.measure.modules import layer_index, select_modules
        from rora_theory.measure.regimes import model as regimes

    options = {name: getattr(config, name) for name in ("template", "dtype", "revision")}
    source = inputs.read_inputs(config.data, config.model, config.reading, **options)
    # The identity contains digests of model, records and adapter, so that the run can be resumed anywhere.
    identity, seed = (
        flatten(config.batches) | flatten(config.measured) | source.identity,
        config.measured.seed,
    )
    identity |= {name: getattr(config, name) for name in ("dtype", "targets", "layers")} | {"template": source.template}
    if config.adapter is not None:
        identity["adapter_sha256"] = adapters.adapter_digest(config.adapter)
    check_free(path_of(NAME, identity, config.out))
    # Batches and modules, then the model with a merged adapter.
    pair = record_batches.make_batch_pair(config.batches, source, seed=seed)
    targets = without_list_of_all_linear(config.targets)
    layers = sorted({layer_index(name) for name in select_modules(source.skeleton, targets, config.layers)})
    all_layers = {layer_index(name) for name in select_modules(source.skeleton, None)}
    model = source.model
    if config.adapter is not None:
        model = inputs.merge_adapter(model, config.adapter)
    if config.measured.mask:
        check_unseen(model, pair.held_out, pair.train)
    extra: dict[str, Any] = {"units": regime_tables.UNITS, "device": inputs.describe_device(model)}
    extra["data"] = [Path(name).name for name in config.data]
    folder = RunFolder.open(NAME, identity, out=config.out, seed=seed, extra=extra, models=[source.origin])
    prompts.print_prompts(pair.examples, source.tokenizer, config.reading.show)
    folder.update(model_layers=len(all_layers))
    groups = [layers[start : start + LAYERS_PER_CELL] for start in range(0, len(layers), LAYERS_PER_CELL)]

    def work(cell: RegimeCell, _: Path) -> dict[str, Any]:
        # The command warns about all layers together.
        with python_warnings.catch_warnings():
            python_warnings.simplefilter("ignore", thin.ThinWarning)
            measured = regimes.regime(
                model, pair.train, pair.held_out, targets, config=config.measured, layers=cell.layers
            )
        # Cells without a value, such as those of the rules without adapters, are left out of a row.
        frames = {name: getattr(measured, name).to_dict("records") for name in RegimeRows._fields}
        rows = {
            name: [{column: value for column, value in row.items() if value == value} for row in frame]
            for name, frame in frames.items()
        }
        return rows | {"losses": [measured.training_loss, measured.held_out_loss], "left_out": measured.left_out}

    def assemble(parts: list[Any]) -> Regime:
        rows = [RegimeRows(*(part[name] for name in RegimeRows._fields)) for part in parts]
        return Regime.from_rows(rows, *(parts[0]["losses"] if parts else (math.nan, math.nan)))

    def write(parts: list[Any]) -> None:
        for name, frame in assemble(parts).files().items():
            folder.write_frame(frame, name)

    parts = run_with_bar([RegimeCell(tuple(group)) for group in groups], work, folder, title="layers", write=write)
    measured = assemble(parts)
    folder.update(training_loss=measured.training_loss, heldout_loss=measured.held_out_loss)
    # Compare with the prediction, and summarise over layers.
    verdict = regime_tables.judge_regime(measured.results)
    ratios = regime_tables.measured_over_predicted(measured.results)
    if verdict is not None:
        folder.write_frame(ratios, regime_tables.JUDGE)
        folder.write(regime_tables.VERDICT, json.dumps(verdict, indent=2, sort_keys=True) + "\n")
    summaries = regime_tables.summaries(measured.crossings, measured.crossing_distances)
    for name, frame in summaries.items():
        folder.write_frame(frame, name)
    warnings = thin.regime_warnings(measured.crossings, len(all_layers))
    warnings += [f"{name} was not measured: {reason}." for part in parts for name, reason in part["left_out"].items()]
    # Key figures and report.
    bounds, scope = ("crossing_rank_low", "crossing_rank_high"), ("kind", "split", "optimizer", "init")
    crossings, name = summaries[regime_tables.CROSSING_SUMMARY], "crossing rank, median over layers"
    ranks = key_figures(crossings, name, "crossing_rank", None, over="layers", bounds=bounds, scope=scope)
    with summarised(folder, ranks):
        report(config.measured, measured, verdict, ratios, warnings)
    folder.finish(warnings=warnings)
    answers.print_files(folder.path)
    # The files are written in any case; the status tells scripts of a contradiction.
    if verdict is not None and verdict["verdict"] == "fails":
        sys.exit(1)


def report(
    config: RegimeConfig,
    regime: Regime,
    verdict: dict[str, Any] | None,
    ratios: pd.DataFrame,
    warnings: Sequence[str] = (),
) -> None:
    """Print which term dominates and the verdict, then crossing ranks and distances by type of module.

    Args:
      config: Settings of the measurement.
      regime: Measured regime.
      verdict: Verdict on the prediction, if adapters were drawn.
      ratios: Frame of `measured_over_predicted`, which has a table if there is a verdict.
      warnings: Sentences about the limits of the measurement.
    """
    # The answer: which term dominates under each optimizer, and the verdict.
    sentences = [regime.sentence(optimizer, config.inits[0]) for optimizer in config.optimizers]
    if verdict is not None:
        sentences.append(f"{regime_tables.describe_verdict(verdict)}.")
    answers.print_answer(" ".join(sentences), warnings)
    init = config.inits[0]
    # Crossing ranks and distances, medians and ranges over the layers.
    summaries = {
        name: frame[frame["init"] == init]
        for name, frame in regime_tables.summaries(regime.crossings, regime.crossing_distances).items()
    }
    heads = {"module": "{kind}", "layers": "{layers}", "tokens": "{split}"}
    ranks = {
        "r* of all tokens": "{crossing_rank:.1f} ({crossing_rank_low:.1f}-{crossing_rank_high:.1f})",
        "r* of a token": "{median:.1f} ({median_low:.1f}-{median_high:.1f})",
    }
    tables.print_records(
        f"Crossing rank r* of all tokens together, and median r* of a token, A {init}: median over layers (range)",
        summaries[regime_tables.CROSSING_SUMMARY],
        heads | {"optimizer": "{optimizer}"} | ranks,
        left=4,
    )
    left_out = regime.tokens[regime.tokens["split"] == "heldout"]
    if len(left_out):
        tables.print_text(
            f"Left out of {left_out['all'].max()} held-out tokens: {left_out['seen'].max()} that repeat the beginning "
            f"of a training record, and {left_out['sinks'].min()} to {left_out['sinks'].max()} attention sinks of a "
            "module."
        )
    if regime_tables.CROSSING_DISTANCE_SUMMARY in summaries:
        distances = summaries[regime_tables.CROSSING_DISTANCE_SUMMARY]
        steps = distances.assign(
            **{name: distances[name] / config.lr for name in distances if name.startswith(("crossing", "turn"))}
        )
        tables.print_records(
            f"Adam, A {init}: number of steps t_A until A dominates, at the constant rate {config.lr:g} and a constant "
            "gradient, median over layers (range); turn: number of steps until 5% of the entries of G A^T have changed "
            "sign, far beyond which the law is only approximate",
            steps,
            heads
            | {"rank": "{rank}"}
            | {"t_A": "{crossing_distance:.1f} ({crossing_distance_low:.1f}-{crossing_distance_high:.1f})"}
            | {"turn": "{turn_5:.1f}"},
            left=3,
        )
    if verdict is not None:
        tables.print_records(
            "Ratio of measured to predicted rms at held-out tokens, mean over modules, standard error in brackets, and "
            "largest single deviation",
            ratios[ratios["split"] == "heldout"],
            {"optimizer": "{optimizer}", "A": "{init}", "rank": "{rank}"}
            | {"ratio": "{mean_ratio:.4f} ({standard_error:.4f})", "largest deviation": "{largest_deviation:.1%}"},
            left=2,
        )


main = cli.command(RegimeOptions, measure_regime, __doc__)

if __name__ == "__main__":
    main()
