"""Which regime a real model is in: one batch of real data, no training, every adapted module of every layer.

    python -m sims.regime --model smollm2-135m --data DATA/ARC-Easy/train.json

For each module: signal, cross-talk and crossing rank r* under SGD and Adam, on the batch itself and on held-out
records, the predicted rms of the first output change against rank, and the steps after which A leads under Adam. Then
the judge: adapters are drawn and stepped at every rank, and what they measure must agree with the prediction.
Held-out tokens that the training batch has with the same beginning, and attention sinks, are left out. `--adapter`
measures the model with a trained adapter in its weights; of a model trained in full name the folder.

`results.csv` has a row a module, split, optimizer, init, rule and rank; `crossing_ranks.csv` what `sims.transfer
--regime` reads; `takeover.csv` the distances at which A leads; `tokens.csv` how many tokens were read and left out;
`judge.csv` the agreement by rank, and `verdict.json` whether it holds. `crossing_summary.csv` and
`takeover_summary.csv` have medians and ranges over the layers by type of module. `python -m figures.regime RUN` draws
it.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rora_theory import adapters
from rora_theory.adapters.lora import PAPER_TARGETS
from rora_theory.cluster import ClusterConfig
from rora_theory.data.formats import TrainTemplate
from rora_theory.data.records import DataConfig
from rora_theory.errors import InputError
from rora_theory.measure import record_batches, unseen
from rora_theory.measure.record_batches import PairConfig
from rora_theory.measure.regimes import model as regimes
from rora_theory.measure.regimes import tables as regime_tables
from rora_theory.measure.regimes import thin
from rora_theory.measure.regimes.model import RegimeCell
from rora_theory.measure.regimes.module_regime import LayerRegime, Regime, RegimeConfig
from rora_theory.measure.regimes.tables import JudgeConfig
from rora_theory.runs.devices import describe
from rora_theory.runs.folder import RunFolder, check_free, path_of
from rora_theory.runs.reading import flat, key_of, read_finished_cells
from rora_theory.runs.summary import key_figures
from rora_theory.scaling import check_integer
from rora_theory.validation.rules import check_list
from sims.common import answers, cli, prompts, tables
from sims.common.cells import run_with_bar
from sims.common.summaries import summarised

NAME = "regime"


@dataclass(frozen=True)
class Config:
    """What to measure, and how finely."""

    data: cli.Data
    model: cli.ModelName = "smollm2-135m"
    revision: cli.Revision = None
    adapter: Path | None = None
    """folder of a trained adapter in PEFT's format, added into the weights first: the regime after that training"""
    reading: DataConfig = field(default_factory=DataConfig)
    template: TrainTemplate | None = None
    """prompt: train (the published one), clean, chat (the model's chat template) or plain (the response at once behind
    the prompt); none is the data format's: train for alpaca, chat for chats and prompt-response, else plain"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """type of the weights and activations"""
    targets: tuple[str, ...] = PAPER_TARGETS
    """modules to measure, as target_modules; all-linear is every one"""
    layers: tuple[int, ...] | None = None
    """layers to measure; none is all. Not with --targets all-linear, which is every layer"""
    batches: PairConfig = field(default_factory=PairConfig)
    measured: RegimeConfig = field(default_factory=RegimeConfig)
    judged: JudgeConfig = field(default_factory=JudgeConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    out: cli.Out = None

    def __post_init__(self) -> None:
        check_list("--targets", self.targets)
        for layer in self.layers or ():
            check_integer("--layers", layer, minimum=0)
        if self.adapter is not None and not self.adapter.is_dir():
            raise InputError(f"{self.adapter}: is not a folder; accepted is an adapter in PEFT's format")


def run(config: Config) -> None:
    """Measure, or go on with, a run; exit status 1 where the judge finds that the law fails."""
    runner = config.cluster.runner()
    options = {name: getattr(config, name) for name in ("template", "dtype", "revision")}
    read = prompts.read_inputs(config.data, config.model, config.reading, **options)
    identity, seed = flat(config.batches) | flat(config.measured) | read.identity, config.measured.seed
    identity |= {name: getattr(config, name) for name in ("dtype", "targets", "layers")} | {"template": read.template}
    if config.adapter is not None:
        identity["adapter_sha256"] = adapters.adapter_digest(config.adapter)
    check_free(path_of(NAME, identity, config.out))
    pair = record_batches.pair(config.batches, **read.texts(), seed=seed)
    if config.measured.mask:
        unseen.check_unseen(pair.held_out, [pair.train])
    model = read.model
    if config.adapter is not None:
        model = adapters.merged(adapters.load_peft(config.adapter, model.config, model.params), model)
    targets = "all-linear" if config.targets == ("all-linear",) else config.targets
    modules = regimes.modules_by_layer(model.config, targets, config.layers)
    extra: dict[str, Any] = {"units": regime_tables.UNITS, "device": describe(read.places)}
    extra["data"] = [Path(name).name for name in config.data]
    folder = RunFolder.open(NAME, identity, out=config.out, seed=seed, extra=extra, models=[model.origin])
    prompts.keep(folder, pair.examples, model.tokenizer, show=config.reading.show)
    folder.update(model_layers=model.config.num_hidden_layers)
    cells = [RegimeCell(index) for index in modules]
    done = read_finished_cells(folder.path)
    if any(key_of(cell) not in done for cell in cells):
        recorded = regimes.record_modules(model.params, model.config, pair.train, pair.held_out, regimes.kinds(modules))
        folder.update(training_loss=recorded.train.loss, heldout_loss=recorded.held_out.loss)

    def assemble(parts: list[Any]) -> Regime:
        losses = (folder.entry(name) for name in ("training_loss", "heldout_loss"))
        return Regime.of([LayerRegime(*part) for part in parts], *losses)

    def write(parts: list[Any]) -> None:
        for name, frame in assemble(parts).files().items():
            folder.write_frame(frame, name)

    def work(cell: RegimeCell, _: Path) -> LayerRegime:
        return recorded.measure(config.measured, cell.layer, modules[cell.layer])

    found = assemble(run_with_bar(cells, work, folder, runner=runner, title="layers", write=write))
    verdict = regime_tables.judge_regime(found.results, config.judged)
    if verdict is not None:
        folder.write_frame(regime_tables.measured_over_predicted(found.results), regime_tables.JUDGE)
        folder.write(regime_tables.VERDICT, json.dumps(verdict, indent=2, sort_keys=True) + "\n")
    summaries = regime_tables.summaries(found.crossings, found.takeover)
    for name, frame in summaries.items():
        folder.write_frame(frame, name)
    words = thin.regime_warnings(found.crossings, model.config.num_hidden_layers)
    bounds, scope = ("crossing_rank_low", "crossing_rank_high"), ("kind", "split", "optimizer", "init")
    crossings, name = summaries[regime_tables.CROSSING_SUMMARY], "crossing rank, median over layers"
    ranks = key_figures(crossings, name, "crossing_rank", None, over="layers", bounds=bounds, scope=scope)
    with summarised(folder, ranks):
        report(config.measured, found, verdict, words)
    folder.finish(warnings=words)
    answers.tell_files(folder.path)
    if verdict is not None and verdict["verdict"] == "fails":
        sys.exit(1)


def report(config: RegimeConfig, found: Regime, verdict: dict[str, Any] | None, words: Sequence[str] = ()) -> None:
    """Print which part leads, the judge's verdict and what is thin; crossing ranks and takeover by type and depth."""
    said = [found.sentence(optimizer, config.inits[0]) for optimizer in config.optimizers]
    answers.say(" ".join(said + ([] if verdict is None else [f"{regime_tables.in_words(verdict)}."])), words)
    init = config.inits[0]
    for optimizer in config.optimizers:
        tables.print_table(*regime_tables.format_crossings(found.crossings, found.tokens, optimizer, init), left=2)
    if len(found.takeover):
        tables.print_table(*regime_tables.format_takeovers(found.takeover, init, config.lr), left=2)
    if verdict is not None:
        for optimizer in config.optimizers:
            tables.print_table(*regime_tables.format_ratios(found.results, optimizer))


main = cli.command(Config, run, __doc__)

if __name__ == "__main__":
    main()
