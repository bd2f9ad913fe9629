"""Print the learning rate that public sweeps lead to expect for a planned LoRA run; it needs no data.

    python -m sims.tune --model smollm2-135m --rank 128 --alpha 32 --steps 2000 --batch-size 8

The best rates of public models by size are transferred to the planned scaling, rank, batch, steps and schedule. The
command reads the model's configuration only, and with ``--parameters`` no model.
"""

from dataclasses import dataclass
from typing import Any

from rora_theory.advice.adapter_config import PAPER_TARGETS, peft_targets
from rora_theory.advice.best_rate import Run
from rora_theory.defaults import TRAIN_BATCH_SIZE
from rora_theory.errors import InputError
from rora_theory.evidence.rate_prior import ExpectedRate, expected_rate
from rora_theory.optimizers import Schedule
from rora_theory.scaling import Rule, scaling_factor
from rora_theory.validation.ranges import Count, Positive, check_ranges
from rora_theory.validation.rules import check_list, check_unread
from sims.common import answers, cli, tables
from sims.common.progress import progress_bar


@dataclass(frozen=True)
class TuneOptions:
    """Planned fine-tuning run.

    Raises:
      InputError: If a value is out of range.
    """

    model: cli.OptionalModelName = None
    revision: cli.Revision = None
    parameters: Positive | None = None
    """Number of parameters in billions, in place of a model"""
    rank: Count = 128
    """Rank of the planned run"""
    alpha: Positive = 16.0
    """Numerator of the scaling factor of the planned run"""
    rule: Rule = "lora"
    """Scaling rule of the planned run, alpha / rank**kappa: lora, rora or rslora, or a number for kappa"""
    steps: Count = 2000
    """Number of optimizer steps of the planned run"""
    batch_size: Count = TRAIN_BATCH_SIZE
    """Number of records per step"""
    schedule: Schedule = "cosine"
    """Learning-rate schedule of the planned run"""
    family: str | None = None
    """Family in the public sweeps: DeepSeek, gpt-oss, Kimi, Llama 3, Nemotron 3, Qwen3, or Qwen3.5 and 3.6; by default
    another"""
    targets: tuple[str, ...] = PAPER_TARGETS
    """Adapted modules, for the printed LoraConfig"""

    def __post_init__(self) -> None:
        check_ranges(self)
        check_list("targets", self.targets)
        _ = self.gain  # validates the rule
        if self.parameters is not None:
            check_unread(self, "model", "revision", conflicts_with="--parameters")
        elif self.model is None:
            raise InputError("model is needed, because the rate depends on its size. Add --model or --parameters.")

    @property
    def gain(self) -> float:
        """G, scaling times rank."""
        return scaling_factor(self.rule, alpha=self.alpha, rank=self.rank) * self.rank

    def peft_entries(self) -> dict[str, Any]:
        """Return the entries of PEFT's ``LoraConfig`` for the planned run: alpha / r of the same gamma."""
        return {
            "r": self.rank,
            "lora_alpha": self.gain,
            "use_rslora": False,
            "target_modules": peft_targets(self.targets),
        }


def tune_rate(config: TuneOptions) -> None:
    """Print the learning rate, PEFT's entries and the assumptions."""
    parameters = config.parameters
    if config.model is not None:
        parameters = read_parameters(config.model, config.revision, config.targets)
    run = Run(config.rank, config.gain, config.steps, config.schedule, config.batch_size)
    entries = config.peft_entries()
    expected = expected_rate(run, config=entries, family=config.family, parameters=parameters)
    answers.print_answer(expected.sentence(), (), tuning=result_entries(expected))
    settings = ", ".join(f"{name}={value!r}" for name, value in entries.items())
    tables.print_text(f"PEFT: LoraConfig({settings})")
    for sentence in expected.assumptions:
        tables.print_text(f"- {sentence}")


def read_parameters(name: str, revision: str | None, modules: tuple[str, ...]) -> float:
    """Return the number of parameters of a model in billions, from its configuration.

    Raises:
      InputError: If there is no such model, or if it lacks one of the modules.
    """
    with progress_bar("importing PyTorch and PEFT", 1):
        from rora_theory.measure.modules import count_parameters, select_modules
        from sims.common import inputs

    _, skeleton = inputs.open_model(name, revision, config_only=True)
    select_modules(skeleton, peft_targets(modules))
    return count_parameters(skeleton) / 1e9


def result_entries(expected: ExpectedRate) -> dict[str, Any]:
    """Return a result in JSON types."""
    return {
        "learning_rate": expected.learning_rate,
        "low": expected.low,
        "high": expected.high,
        "three_rates": list(expected.belief.three_rates),
        "expected_regret": expected.expected_regret,
        "expected_regret_of_three": expected.expected_regret_of_three,
        "config": expected.config,
        "assumptions": list(expected.assumptions),
    }


main = cli.command(TuneOptions, tune_rate, __doc__)

if __name__ == "__main__":
    main()
