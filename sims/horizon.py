"""How the best learning rate under Adam moves with gamma r, and how that depends on the number of steps.

    python -m sims.horizon --data DATA/*/train.json --ranks 8 128 --strengths 64 724 --lrs 3e-4 1e-3 3e-3

A real model is fine-tuned at every rank, strength gamma r and rate, at a constant rate after a short warm-up, and the
held-out records are read after each of ``--read-at`` steps of the same run. ``--full-lrs`` trains the same modules in
full beside them. A cell that is done is not done again: further strengths, ranks, rates and seeds extend the folder.
"""

from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from rora_theory import llama
from rora_theory.cluster import ClusterConfig
from rora_theory.data.records import DataConfig
from rora_theory.evaluate.scoring import Scoring
from rora_theory.finetune import FinetuneConfig
from rora_theory.horizon import judgement as horizons
from rora_theory.horizon import law as horizon_law
from rora_theory.horizon import readings
from rora_theory.horizon import runs as horizon_runs
from rora_theory.horizon.grid import HorizonCell, HorizonGrid
from rora_theory.runs import devices
from rora_theory.runs.folder import RunFolder
from rora_theory.runs.summary import key_figures
from rora_theory.sweep.memory import cell_memory
from rora_theory.sweep.records import draw_records
from rora_theory.sweep.workbench import Workbench
from sims.common import answers, cli, prompts, tables
from sims.common.cells import run_with_bar
from sims.common.summaries import summarised

NAME = "horizon"


@dataclass(frozen=True)
class Config:
    """Which runs, and on which records."""

    data: cli.Data
    reading: DataConfig = field(default_factory=DataConfig)
    model: cli.ModelName = "smollm2-135m"
    grid: HorizonGrid = field(default_factory=HorizonGrid)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    train_records: int = 2048
    """a seeded sample of so many training records"""
    held_out: int = 96
    """records that no run trains on"""
    data_seed: int = 42
    """seed of the two samples"""
    regime: Path | None = None
    """run folder of sims.regime: its takeover distances and linear terms give the law's exponents"""
    beside: Path | None = None
    """run folder of this command on the same records, other in one setting, as in --targets: its runs beside these"""
    out: cli.Out = None


def run(config: Config) -> None:
    """Do every run that the folder lacks, then judge all that it has."""
    grid, model = config.grid, config.model

    def plan(cell: HorizonCell) -> int:
        return cell_memory(llama.model_config(located[model]), grid.training(cell), FinetuneConfig.dtype)

    runner = config.cluster.runner(plan)
    takeovers, linear_terms = horizon_law.read_regime(config.regime) if config.regime else ([], [])
    cells = list(grid.cells())
    sample = {name: getattr(config, name) for name in ("held_out", "train_records")}
    split = draw_records(config.data, **sample, seed=config.data_seed, config=config.reading)
    located = {model: llama.locate(model)}
    identity = grid.identity() | sample | {"model": config.model, "data_seed": config.data_seed}
    identity |= {"records": split.summary, "model_sha256": located[config.model].sha256}
    extra = {"units": horizons.UNITS, "device": devices.describe(devices.pick(1))}
    others = dict([horizon_runs.read_beside(config.beside, identity)] if config.beside else [])
    folder = RunFolder.open(NAME, identity, out=config.out, extra=extra, models=located.values())
    bench = Workbench(grid.training(cells[0]), split, {}, located, scoring=Scoring("label", None))
    cli.tell(bench.open(config.model))
    prompts.tell(split.source, split.source.template(grid.template))
    prompts.keep(folder, bench.train_examples, bench.model.tokenizer, show=config.reading.show)
    tokens, answered = readings.token_counts(bench)
    names = pd.DataFrame([(source, index) for source, index, _ in split.held_out], columns=["source", "index"])
    folder.write_frame(names.assign(tokens=tokens, answer_tokens=answered), "records.csv")

    def work(cell: HorizonCell, _: Path) -> dict[str, Any]:
        bench.open(model)
        return asdict(readings.read_run(bench, grid.training(cell), cell.read_at))

    words = partial(readings.describe_run, tokens=tokens)
    run_with_bar(cells, work, folder, runner=runner, title="runs", words=words)
    runs = horizon_runs.distinct(horizon_runs.read_finished(folder.path))
    folder.write_frame(horizon_runs.horizon_table(runs, tokens, answered), "results.csv")
    law = {"takeovers": takeovers, "linear_terms": linear_terms}
    judged = horizons.judge_runs(runs, tokens, **law, warmup=grid.warmup, others=others)
    for name, frame in judged.files().items():
        folder.write_frame(frame, name)
    samples, regret = "seeds and held-out records", "largest regret, nats per token"
    scope = ("changed", "policy", "pairs", "lower_bounds")
    figures = key_figures(judged.policies, regret, "largest", "largest_error", over=samples, scope=scope)
    scope = ("step", "over", "at", "first", "second", "law_low", "law_high", "verdict")
    figures += key_figures(judged.exponents, "exponent of the best rate", "exponent", over="error_over", scope=scope)
    with summarised(folder, figures):
        report(len(runs), judged, law=bool(takeovers))
    folder.finish()
    answers.tell_files(folder.path)


def report(runs: int, judged: horizons.HorizonJudgement, *, law: bool = True) -> None:
    """Print the answer, then a table of each frame of the judgement that has rows."""
    answers.say(horizons.describe_horizons(runs, judged.best, judged.exponents, law=law))
    who = {"steps": "{step}", "rank": "{size}", "gamma r": "{strength:g}"}
    found = judged.exponents
    exponents = {
        "steps": "{step}",
        "best rate against": "{against} {at:g}",
        "exponent, 95%": "{exponent:+.2f} ± {half_width:.2f}",
        "the law's": "{law_low:+.2f} to {law_high:+.2f}",
        "verdict": "{verdict}",
    } | ({"by measured parts": "{by_parts:+.2f}"} if "by_parts" in found and found["by_parts"].notna().any() else {})
    led = who | {
        "rate": "{learning_rate:.3g}",
        "seed": "{seed}",
        "A-led over B-led": "{ratio:.2g} ({ratio_low:.2g} to {ratio_high:.2g})",
        "rms change": "{change:.3g}",
        "exponent that keeps it": "{exponent:+.2f} ({exponent_low:+.2f} to {exponent_high:+.2f})",
    }
    steps = who | {"steps": "{first} to {second}", "exponent, 95%": exponents["exponent, 95%"]}
    steps |= {"constant gradient's": "{law_low:+.2f} to {law_high:+.2f}", "verdict": "{verdict}"}
    beside = who | {"beside": "{beside}", "ratio of best rates": "{ratio:.3g}", "verdict": "{verdict}"}
    one_rate = who | {"beside": "{beside}", "rate": "{learning_rate:.3g}"}
    one_rate |= {"loss less, nats, 95%": "{difference:+.3f} ± {half_width:.3f}", "seeds": "{seeds}"}
    change = {"rate": "{best_rate:.3g}", "rms change": "{change:.3g}", "log2 s.e.": "{log2_error:.2f}"}
    change |= {"edge": "{edge}"}
    estimators = {"steps": "{step}", "ranks": "{at}", "gamma r": "{first:g} to {second:g}", "estimator": "{estimate}"}
    estimators |= {"exponent": "{exponent:+.3f}", "s.e.": "{standard_error:.3f}", "seeds": "{seeds}"}
    best = who | {"rate": "{best_rate:.3g}", "loss": "{best_loss:.4f}", "edge": "{edge}"}
    policies = {"what changes": "{changed}", "policy": "{policy}"}
    policies |= {"median": "{median:.4f}", "largest": "{largest:.4f}", "at least": "{lower_bounds}"}
    for title, frame, columns in (
        ("Best rates (parabola through the least three)", judged.best, best),
        ("Beside others, each at its own best rate", judged.beside, beside),
        ("Two gamma r at one rate: loss less that beside it", judged.one_rate, one_rate),
        ("How the best rate moves", found, exponents),
        ("Exponents in gamma r by estimator, ranks pooled with seeds as clusters", pooled(judged), estimators),
        ("How the best rate moves with the steps; -1/2 where entries walk at random", judged.steps, steps),
        ("Which part of the change leads, median over modules (5% to 95%)", judged.led, led),
        ("Size of the change at the best rate: equal where the best rate keeps it", judged.change, who | change),
        (
            "Regret in nats per token, by policy; at least: pairs with a rate outside the grid",
            judged.policies,
            policies,
        ),
    ):
        if not frame.empty:
            left = 2 if frame is found else list(columns).index("beside") + 1 if "beside" in columns else 0
            words = horizons.against_in_words if frame is found else horizons.size_in_words
            tables.print_records(title, words(frame), columns, left=left)


def pooled(judged: horizons.HorizonJudgement) -> pd.DataFrame:
    """Return the exponents in gamma r that are pooled over the largest number of ranks, by every estimator."""
    table = judged.estimators
    if table.empty:
        return table
    rows = table[(table["over"] == "strength") & table["standard_error"].notna()]
    return rows[rows["pairs"] == rows.groupby(["step", "first", "second"])["pairs"].transform("max")]


main = cli.command(Config, run, __doc__)

if __name__ == "__main__":
    main()
