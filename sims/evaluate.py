"""Score a model, with or without an adapter, on the eight commonsense tasks.

    python -m sims.evaluate --data-dir DATA --protocol label --tasks boolq openbookqa --limit 200

The run folder contains `samples.jsonl` (one scored item per line) and `results.csv` (the accuracy of each task and
their average, with standard errors). The same command resumes an interrupted run.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rora_theory.defaults import SCORE_BATCH_SIZE
from rora_theory.errors import InputError
from rora_theory.lab import adapters
from rora_theory.lab.data import sources
from rora_theory.lab.data.prompts import Template
from rora_theory.lab.data.tasks import TASKS, TaskRecord
from rora_theory.lab.evaluate import Protocol, Samples, Scoring, TaskAccuracy, accuracies, samples
from rora_theory.lab.evaluate.accuracies import ACCURACY_COLUMNS, ACCURACY_UNITS, describe_accuracy
from rora_theory.lab.llama import Adapter, Model, ModelSource, load, locate
from rora_theory.runs import frames
from rora_theory.runs.folder import RunFolder, check_free, path_of
from rora_theory.runs.summary import KeyFigure
from rora_theory.validation.ranges import Count, check_ranges
from rora_theory.validation.rules import check_unread
from sims.common import answers, cli, tables
from sims.common.progress import progress_bar
from sims.common.summaries import summarised

NAME = "evaluate"


@dataclass(frozen=True)
class EvaluateOptions:
    model: cli.ModelName = "smollm2-135m"
    adapter: Path | None = None
    """Folder of an adapter in PEFT's format; by default, the model is scored without an adapter"""
    tasks: tuple[str, ...] = tuple(TASKS)
    """Tasks: any of boolq piqa social_i_qa hellaswag winogrande ARC-Easy ARC-Challenge openbookqa"""
    protocol: Protocol = "generate"
    """Protocol: generate (as in the papers: beam search, first label in the text), label (label with the highest
    likelihood) or harness (as in lm-evaluation-harness: choice with the highest likelihood)"""
    template: Template | None = None
    """Prompt template of generate and label: train, eval or clean; by default eval for generate, train for label"""
    limit: Count | None = None
    """Maximum number of items per task, taken from the start"""
    data_dir: str | None = None
    """Folder in the LLM-Adapters schema, or hf://datasets/OWNER/NAME; by default, the environment variable
    RORA_COMMONSENSE_DIR"""
    batch_size: Count = SCORE_BATCH_SIZE
    """Number of prompts per batch for generate; number of device calls in flight for label and harness"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the weights and activations; log-probabilities are float32"""
    merge: bool = True
    """Merge the adapter into the weights first, as in the published evaluation; prefix, series and parallel adapters
    are never merged"""
    num_beams: int = 4
    """Number of beams for generate"""
    max_new_tokens: int = 32
    """Maximum number of tokens of an answer for generate"""
    revision: cli.Revision = None
    out: cli.Out = None

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.adapter is not None and not self.adapter.is_dir():
            raise InputError(f"adapter must be the folder of an adapter in PEFT's format, got {self.adapter}")
        self.scoring()
        if self.protocol != "generate":
            check_unread(self, "num_beams", "max_new_tokens", conflicts_with=f"--protocol {self.protocol}")

    def scoring(self) -> Scoring:
        """Return the protocol with its settings."""
        return Scoring(self.protocol, self.template, self.num_beams, self.max_new_tokens)


def load_scored_model(config: EvaluateOptions, origin: ModelSource) -> tuple[Model, Adapter | None]:
    """Load the model to score, and its adapter.

    Returns:
      The model, and the adapter unless there is none or it is merged into the model.

    Raises:
      InputError: If the model or the adapter cannot be read.
    """
    model = load(origin, config.dtype)
    cli.print_notes(origin.terms)
    if config.adapter is None:
        return model, None
    adapter = adapters.load_adapter(config.adapter, model)
    if config.merge and adapter.config.mergeable:
        return adapters.merged(adapter, model), None
    return model, adapter


def evaluate(
    config: EvaluateOptions,
    folder: RunFolder,
    tasks: dict[str, list[TaskRecord]],
    model: Model,
    adapter: Adapter | None,
) -> list[TaskAccuracy]:
    """Score the records that the run folder lacks, and write the results.

    Args:
      config: Options of the evaluation.
      folder: Run folder.
      tasks: Records of each task.
      model: Model to score.
      adapter: Adapter that is not merged into the model.
    """
    scoring, records = config.scoring(), [record for items in tasks.values() for record in items]
    # Samples of an earlier part of this run are read from its file and not scored again.
    saved = Samples(folder.path / samples.FILE, records, config.protocol)
    correct_count = sum(sample.correct for sample in saved.scored)
    with progress_bar("scoring", len(records), fields="{task}  accuracy {accuracy:.1%}") as bar:
        bar.advance(len(saved.scored))
        for sample in saved.score(model, tasks, scoring, adapter=adapter, batch_size=config.batch_size):
            correct_count += sample.correct
            bar.advance(1, task=TASKS[sample.task].name, accuracy=correct_count / len(saved.scored))
    levels = accuracies(saved.scored, records)
    protocol_columns = {"protocol": scoring.protocol, "template": scoring.template}
    folder.write_frame(frames.from_rows([protocol_columns | asdict(level) for level in levels], ACCURACY_COLUMNS))
    return levels


def identity(config: EvaluateOptions, data: dict[str, str], origin: ModelSource) -> dict[str, Any]:
    """Return the settings and the digests of data, adapter and model, which together determine the results."""
    settings = asdict(config)
    for name in ("out", "batch_size", "data_dir", "adapter", "revision"):
        del settings[name]
    settings |= asdict(config.scoring()) | origin.identity()
    if config.adapter is not None:
        settings["adapter_sha256"] = adapters.adapter_digest(config.adapter)
    return settings | {"data": data}


def report(levels: Sequence[TaskAccuracy], scoring: Scoring) -> None:
    """Print the average accuracy and a table of the tasks, in percent, with their standard errors."""
    answers.print_answer(describe_accuracy(levels, scoring.protocol))
    # Columns of the table; the accuracy per character only if a task has one.
    forms = {"task": "{name}", "n": "{n}", "accuracy %": "{accuracy:.1f} ({error:.1f})"}
    if any(level.accuracy_norm is not None for level in levels):
        forms["per character %"] = "{accuracy_norm:.1f} ({error_norm:.1f})"
    forms |= {f"{name} %": f"{{{name}:.1f}}" for name in ("unparsed", "chance", "majority")}
    rows = [level.in_percent() for level in levels]
    template = f", template {scoring.template}" if scoring.template else ""
    tables.print_records(f"{scoring.protocol}{template}; standard errors in brackets", rows, forms, missing="-")
    if scoring.protocol == "harness" and any(level.task == "boolq" for level in levels):
        tables.print_text(
            "The BoolQ records of this data set have no passage, so the template of lm-evaluation-harness has an empty "
            "one. Published BoolQ accuracies use the passage."
        )


def evaluate_model(config: EvaluateOptions) -> None:
    """Score the tasks and report the accuracies."""
    tasks, data = sources.read_tasks(config.data_dir, config.tasks, config.limit)
    # The identity contains digests, so the folder can be checked before the weights are loaded.
    origin = locate(config.model, config.revision)
    known = identity(config, data, origin)
    check_free(path_of(NAME, known, config.out))
    model, adapter = load_scored_model(config, origin)
    extra = {"protocol": config.protocol, "units": ACCURACY_UNITS}
    folder = RunFolder.open(NAME, known, out=config.out, extra=extra, models=[origin])
    levels = evaluate(config, folder, tasks, model, adapter)
    # Key figures: the accuracy of each task, with its error over items.
    figures = [
        KeyFigure("accuracy", level.accuracy, level.error, "items", scope={"task": level.task, "n": level.n})
        for level in levels
    ]
    with summarised(folder, figures):
        report(levels, config.scoring())
    folder.finish(samples=sum(map(len, tasks.values())))
    answers.print_files(folder.path)


main = cli.command(EvaluateOptions, evaluate_model, __doc__)

if __name__ == "__main__":
    main()
