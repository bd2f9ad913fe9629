"""Print the learning rate of a planned fine-tuning run: what public sweeps lead to expect, or a short probe's update.

    python -m sims.tune --model smollm2-135m --rank 128 --steps 2000
    python -m sims.tune --model smollm2-135m --data DATA/*/train.json --rank 128 --steps 2000 --budget 0.1

The prior is the best rate of public models of this size, transferred to the planned scaling, rank, batch, steps and
schedule. It needs no data. With --budget, a probe trains adapters of a small rank for a few steps at several learning
rates, on the same batches in the same order, and its held-out losses update the prior. It costs at most --budget of the
planned run, evaluations included. The same command resumes an interrupted probe.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rora_theory.advice.adapter_config import PAPER_TARGETS, peft_targets, without_list_of_all_linear
from rora_theory.defaults import TRAIN_BATCH_SIZE
from rora_theory.errors import InputError
from rora_theory.lab.data.batches import split_records
from rora_theory.lab.data.formats import TrainTemplate
from rora_theory.lab.data.records import DataConfig
from rora_theory.lab.finetune.config import LossOn
from rora_theory.laws.random.seeds import check_seed
from rora_theory.measure.tuning.plan import MAX_PROBE_STEPS
from rora_theory.measure.tuning.result import Tuning
from rora_theory.optimizers import Schedule
from rora_theory.runs.folder import RunFolder, check_free, path_of
from rora_theory.runs.reading import flatten
from rora_theory.runs.summary import KeyFigure
from rora_theory.scaling import Rule, check_between, scaling_factor
from rora_theory.validation.ranges import AtLeastTwo, Count, Natural, NotNegative, Positive, check_ranges
from rora_theory.validation.rules import check_list, check_warmup
from sims.common import answers, cli, inputs, prompts, record_batches, tables
from sims.common.progress import progress_bar
from sims.common.summaries import summarised

NAME = "tune"

CHECKPOINT = "probe.json"
"""File of the run folder with the finished runs of the probe."""

MIN_HELD_OUT = 16
"""Fewest held-out records: with fewer, the error of a loss is larger than the differences that it must show."""

UNITS = {
    "learning_rate": "peak learning rate of a run of the probe",
    "held_out_loss": "nats per learned token on held-out records; infinite if the run diverged",
    "stopped_early": "whether the rate was not trained for the probe's full number of steps, or diverged",
}


@dataclass(frozen=True)
class PlannedRun:
    """Planned fine-tuning run, and the probe that finds its learning rate.

    Raises:
      InputError: If a value is out of range.
    """

    steps: Count = 2000
    """Number of optimizer steps of the planned run"""
    rank: Count = 128
    """Rank of the planned run"""
    alpha: Positive = 16.0
    """Numerator of the scaling factor of the planned run"""
    rule: Rule = "lora"
    """Scaling rule of the planned run, alpha / rank**kappa: lora, rora or rslora, or a number for kappa"""
    targets: tuple[str, ...] = PAPER_TARGETS
    """Adapted modules"""
    dropout: float = 0.0
    """Dropout probability of the adapter's input"""
    batch_size: Count = TRAIN_BATCH_SIZE
    """Number of records per step"""
    warmup: Natural = 0
    """Number of warm-up steps of the planned run"""
    schedule: Schedule = "cosine"
    """Learning-rate schedule of the planned run"""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay of AdamW"""
    clip: NotNegative = 1.0
    """Maximum norm of the gradient; 0 disables clipping"""
    template: TrainTemplate | None = None
    """Prompt template, by default that of the records' format"""
    loss_on: LossOn = "all"
    """Tokens in the loss, in training and where rates are compared: all or answer"""
    cutoff: AtLeastTwo = 256
    """Maximum length of an example in tokens"""
    lr: Positive | None = None
    """Your own guess for the planned run, the middle of the search; by default the rate of public sweeps"""
    family: str | None = None
    """Family of the model in the public sweeps, such as Qwen3; by default another"""
    probe_rank: Count = 8
    """Maximum rank of the probe's adapters"""
    budget: NotNegative = 0.0
    """Maximum cost of a probe as a share of the planned run; 0 trains nothing"""
    held_out: AtLeastTwo = 96
    """Number of records that no run trains on; fewer are evaluated if the budget does not allow all"""
    seed: int = 0
    """Seed of the samples of records, of the order and of the initialisation"""

    def __post_init__(self) -> None:
        check_ranges(self)
        check_seed("seed", self.seed)
        check_list("targets", self.targets)
        check_warmup(self.warmup, self.steps)
        check_between("--dropout", self.dropout, 0, 1, closed="left")
        check_between("--budget", self.budget, 0, 1)
        _ = self.gain  # validates the rule
        if self.budget and self.held_out < MIN_HELD_OUT:
            raise InputError(
                f"--held-out must be at least {MIN_HELD_OUT}, got {self.held_out}: the error of fewer records hides "
                "the differences between rates. Pass more records, or no --budget for the rate of public sweeps."
            )

    @property
    def gain(self) -> float:
        """G, scaling times rank, of the planned run and of the probe."""
        return scaling_factor(self.rule, alpha=self.alpha, rank=self.rank) * self.rank

    def peft_entries(self) -> dict[str, Any]:
        """Return the entries of PEFT's ``LoraConfig`` for the planned run: alpha / r of the same gamma."""
        return {
            "r": self.rank,
            "lora_alpha": self.gain,
            "use_rslora": False,
            "lora_dropout": self.dropout,
            "target_modules": peft_targets(self.targets),
        }


@dataclass(frozen=True)
class TuneOptions:
    """Planned run and its records."""

    data: tuple[str, ...] = ()
    """Training records of a probe, as for the other commands"""
    reading: DataConfig = field(default_factory=DataConfig)
    model: cli.ModelName = "smollm2-135m"
    revision: cli.Revision = None
    planned: PlannedRun = field(default_factory=PlannedRun)
    out: cli.Out = None

    def __post_init__(self) -> None:
        if self.planned.budget and not self.data:
            raise InputError("--data must name training records. Pass no --budget for a rate without a probe.")
        if self.data and not self.planned.budget:
            raise InputError("--data has no effect without --budget. Pass --budget 0.1 for a probe, or no --data.")


def tune_rate(config: TuneOptions) -> None:
    """Report the learning rate of the public sweeps, or run what the probe lacks."""
    planned = config.planned
    if not planned.budget:
        report(rate_without_probe(config), planned)
        return
    with progress_bar("importing PyTorch and PEFT", 1):
        from peft import LoraConfig

        from rora_theory.measure.modules import select_modules
        from rora_theory.measure.tuning.search import tune

    source = inputs.read_inputs(
        config.data, config.model, config.reading, template=planned.template, revision=config.revision
    )
    records = source.records.records
    train_records, held_out = split_records(records, min(planned.held_out, len(records) // 2), planned.seed)
    if len(held_out) < MIN_HELD_OUT:
        raise InputError(
            f"--data must hold at least {2 * MIN_HELD_OUT} records, of which half are held out, got {len(records)}. "
            "Pass more records, or no --budget for the rate of public sweeps."
        )
    identity = flatten(planned) | source.identity | {"template": source.template}
    check_free(path_of(NAME, identity, config.out))
    # The adapters have to fit the model.
    select_modules(source.model, without_list_of_all_linear(planned.targets))
    folder = RunFolder.open(
        NAME, identity, out=config.out, seed=planned.seed, extra={"units": UNITS}, models=[source.origin]
    )
    answer_only = planned.loss_on == "answer"
    train = source.encode(
        train_records[: MAX_PROBE_STEPS * planned.batch_size], cutoff=planned.cutoff, answer_only=answer_only
    )
    prompts.save_prompts(folder, train, source.tokenizer, show=config.reading.show)
    evaluated = source.encode(held_out, cutoff=planned.cutoff, answer_only=answer_only)
    result = tune(
        source.model,
        batches_of(train, planned.batch_size),
        batches_of(evaluated, planned.batch_size),
        config=LoraConfig(task_type="CAUSAL_LM", **planned.peft_entries()),
        steps=planned.steps,
        schedule=planned.schedule,
        warmup=planned.warmup,
        batch_size=planned.batch_size,
        learning_rate=planned.lr,
        family=planned.family,
        weight_decay=planned.weight_decay,
        max_grad_norm=planned.clip,
        probe_rank=planned.probe_rank,
        budget=planned.budget,
        seed=planned.seed,
        checkpoint=Path(folder.path) / CHECKPOINT,
        progress=True,
    )
    folder.write_frame(result.curve)
    folder.write("tuning.json", json.dumps(result_entries(result, planned), indent=2) + "\n")
    figure = KeyFigure(
        "learning rate",
        result.learning_rate,
        over="models, held-out records, seeds and exponents of the law",
        low=result.low,
        high=result.high,
        scope={"steps": planned.steps, "rank": planned.rank, "gain": planned.gain},
    )
    with summarised(folder, [figure]):
        report(result, planned)
    folder.finish()
    answers.print_files(folder.path)


def rate_without_probe(config: TuneOptions) -> Tuning:
    """Return the rate of the public sweeps for the planned run, from the model's configuration alone."""
    from rora_theory.advice.best_rate import Run
    from rora_theory.lab import llama
    from rora_theory.measure.tuning.prior import rate_prior
    from rora_theory.measure.tuning.result import conclude_without_probe

    planned = config.planned
    parameters = llama.count_parameters(llama.model_config(llama.locate(config.model, config.revision))) / 1e9
    run = Run(planned.rank, planned.gain, planned.steps, planned.schedule, planned.batch_size)
    prior = rate_prior(run, family=planned.family, parameters=parameters)
    return conclude_without_probe(prior, steps=planned.steps, config=planned.peft_entries())


def batches_of(examples: Any, size: int) -> list[record_batches.Batch]:
    """Return the batches of examples in their order; the last may be smaller."""
    return [
        record_batches.make_batch(examples, range(start, min(start + size, len(examples))))
        for start in range(0, len(examples), size)
    ]


def result_entries(result: Tuning, planned: PlannedRun) -> dict[str, Any]:
    """Return a result without its curve, in JSON types."""
    return {
        "learning_rate": result.learning_rate,
        "low": result.low,
        "high": result.high,
        "config": planned.peft_entries(),
        "prior": asdict(result.posterior.prior),
        "posterior": asdict(result.posterior.belief),
        "probe_steps": result.probe_steps,
        "displacement_constant": result.displacement_constant,
        "expected_regret": result.expected_regret,
        "cost": asdict(result.cost) | {"share": result.cost.share},
        "assumptions": list(result.assumptions),
    }


def report(result: Tuning, planned: PlannedRun) -> None:
    """Print the learning rate, PEFT's entries, the curve and the assumptions."""
    answers.print_answer(result.sentence(), (), tuning=result_entries(result, planned))
    settings = ", ".join(f"{name}={value!r}" for name, value in planned.peft_entries().items())
    tables.print_text(f"PEFT: LoraConfig({settings})")
    if result.displacement_constant is not None:
        constant = f"{result.displacement_constant:.3g}"
        tables.print_text(
            f"Displacement constant K = {constant}, for `rora transfer --displacement-constant {constant}`."
        )
    if len(result.curve):
        tables.print_records(
            "Runs of the probe",
            result.curve,
            {
                "learning rate": "{learning_rate:.3g}",
                "steps": "{steps}",
                "held-out loss": "{held_out_loss:.4f}",
                "stopped early": "{stopped_early}",
            },
            left=0,
        )
    for sentence in result.assumptions:
        tables.print_text(f"- {sentence}")


main = cli.command(TuneOptions, tune_rate, __doc__)

if __name__ == "__main__":
    main()
