"""Find the learning rate of a planned fine-tuning run by a short probe on the same model and data.

    python -m sims.tune --model smollm2-135m --data DATA/*/train.json --rank 128 --steps 2000

The probe trains adapters of a small rank, at the same product of scaling and rank as the planned run, for a few steps
at several learning rates. All see the same batches in the same order. The best rate is carried to the planned number
of steps. The probe costs at most --budget of the planned run, evaluations included. The same command resumes an
interrupted probe.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rora_theory.lab import llama
from rora_theory.lab.data.records import DataConfig
from rora_theory.lab.evaluate.scoring import Scoring
from rora_theory.lab.horizon.probe import Probe, ProbeConfig, evenly_spaced
from rora_theory.lab.sweep.records import draw_records
from rora_theory.lab.sweep.workbench import Workbench
from rora_theory.measure.tuning.plan import ProbeRun, Trial, next_trial
from rora_theory.measure.tuning.result import Tuning, conclude
from rora_theory.runs import devices
from rora_theory.runs.folder import RunFolder
from rora_theory.runs.reading import flatten
from rora_theory.runs.summary import KeyFigure
from sims.common import answers, cli, prompts, tables
from sims.common.cells import run_with_bar
from sims.common.summaries import summarised

NAME = "tune"

UNITS = {
    "learning_rate": "peak learning rate of a run of the probe",
    "held_out_loss": "nats per token on held-out records; infinite if the run diverged",
    "stopped_early": "whether the rate was not trained for the probe's full number of steps, or diverged",
}


@dataclass(frozen=True)
class Config:
    """Planned run and its records."""

    data: cli.Data
    reading: DataConfig = field(default_factory=DataConfig)
    model: cli.ModelName = "smollm2-135m"
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    out: cli.Out = None


def run(config: Config) -> None:
    """Train the runs of the probe that the folder lacks, and report the learning rate."""
    probe_config, model = config.probe, config.model
    # Records: a held-out sample, and training records for the longest run, in proportion to the files.
    sample: dict[str, Any] = {"held_out": probe_config.held_out, "seed": probe_config.seed}
    split = draw_records(config.data, **sample, shares="proportional", config=config.reading)
    chosen = evenly_spaced(len(split.train), probe_config.train_records)
    split = replace(split, train=[split.train[index] for index in chosen])
    located = {model: llama.locate(model)}
    # The adapters of the probe have to fit the model.
    training = probe_config.training(Trial(1.0, probe_config.steps))
    training.adapter().table(llama.model_config(located[model]))
    identity = flatten(probe_config) | {"model": model, "records": split.summary}
    identity |= {"model_sha256": located[model].sha256}
    extra = {"units": UNITS, "device": devices.describe(devices.pick(1))}
    sources = located.values()
    folder = RunFolder.open(NAME, identity, out=config.out, seed=probe_config.seed, extra=extra, models=sources)
    bench = Workbench(training, split, {}, located, scoring=Scoring("label", None))
    cli.print_notes(bench.open(model))
    prompts.print_summary(split.source, split.source.template(training.template))
    prompts.save_prompts(folder, bench.train_examples, bench.model.tokenizer, show=config.reading.show)
    # State the cost, then train one run after another.
    probe = Probe(probe_config, bench)
    tables.print_text(probe.plan.sentence())

    def work(trial: Trial, _: Path) -> dict[str, Any]:
        return probe.run(trial).as_json()

    def describe_run(value: dict[str, Any]) -> str:
        if value["diverged_at"] is not None:
            return f"diverged at {value['diverged_at']}"
        return f"held-out loss {sum(value['losses']) / sum(probe.tokens):.4f}"

    # The plan chooses each rate from the runs before. Finished cells of the folder are not trained again.
    trials: list[Trial] = []
    runs: list[ProbeRun] = []
    while (trial := next_trial(probe.plan, runs)) is not None:
        trials.append(trial)
        values = run_with_bar(trials, work, folder, title="probe", describe=describe_run)
        runs = [ProbeRun.from_json(value) for value in values]
    # Fit the best rate and carry it to the planned run.
    result = conclude(
        probe.plan,
        runs,
        probe.tokens,
        config=probe_config.peft_entries(),
        rank=probe_config.rank,
        probe_rank=training.rank,
        remarks=[probe.remark],
    )
    folder.write_frame(result.curve)
    folder.write("tuning.json", json.dumps(entries(result), indent=2) + "\n")
    figure = KeyFigure(
        "learning rate",
        result.learning_rate,
        over="held-out records, seeds and exponents in the steps",
        low=result.low,
        high=result.high,
        scope={"steps": probe_config.steps, "rank": probe_config.rank, "gamma r": probe_config.strength},
    )
    with summarised(folder, [figure]):
        report(result)
    folder.finish()
    answers.print_files(folder.path)


def entries(result: Tuning) -> dict[str, Any]:
    """Return a result without its curve, in JSON types."""
    return {
        "learning_rate": result.learning_rate,
        "low": result.low,
        "high": result.high,
        "config": result.config,
        "probe": asdict(result.probe) | {"steps": result.probe_steps},
        "displacement_constant": result.displacement_constant,
        "expected_regret": asdict(result.expected_regret),
        "cost": asdict(result.cost) | {"share": result.cost.share},
        "assumptions": list(result.assumptions),
    }


def report(result: Tuning) -> None:
    """Print the learning rate, PEFT's entries, the curve and the assumptions."""
    # The rate, and what to paste into PEFT.
    answers.print_answer(result.sentence(), (), tuning=entries(result))
    settings = ", ".join(f"{name}={value!r}" for name, value in result.config.items())
    tables.print_text(f"PEFT: LoraConfig({settings})")
    if result.displacement_constant is not None:
        constant = f"{result.displacement_constant:.3g}"
        tables.print_text(
            f"Displacement constant K = {constant}, for `rora transfer --displacement-constant {constant}`."
        )
    # The evidence: losses of the probe's runs, the expected regret, and the assumptions.
    tables.print_records(
        f"Runs of the probe (best rate at {result.probe_steps} steps: {result.probe.learning_rate:.3g})",
        result.curve,
        {
            "learning rate": "{learning_rate:.3g}",
            "steps": "{steps}",
            "held-out loss": "{held_out_loss:.4f}",
            "stopped early": "{stopped_early}",
        },
        left=0,
    )
    for sentence in (result.expected_regret.sentence(), *result.assumptions):
        tables.print_text(f"- {sentence}")


main = cli.command(Config, run, __doc__)

if __name__ == "__main__":
    main()
