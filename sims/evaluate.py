"""Score a model, with or without an adapter, on the eight commonsense tasks.

    python -m sims.evaluate --data-dir DATA --protocol label --tasks boolq openbookqa --limit 200

The run folder holds `samples.jsonl` (one scored item a line), `results.json` and `results.csv` (accuracy and
its standard error a task, and their average). A run that was stopped goes on at the item it had reached.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rora_theory import adapters
from rora_theory.data import sources
from rora_theory.data.prompts import Template
from rora_theory.data.tasks import TASKS, TaskRecord
from rora_theory.errors import InputError
from rora_theory.evaluate import Protocol, Samples, Scoring, TaskAccuracy, accuracies, samples
from rora_theory.evaluate.accuracies import ACCURACY_COLUMNS, ACCURACY_UNITS, describe_accuracy
from rora_theory.io import frames
from rora_theory.llama import Adapter, Model, ModelSource, load, locate
from rora_theory.runs.folder import RunFolder, check_free, path_of
from rora_theory.runs.reading import as_json
from rora_theory.runs.summary import KeyFigure
from rora_theory.validation.ranges import Count, check_ranges
from sims.common import answers, cli, tables
from sims.common.progress import progress_bar
from sims.common.summaries import summarised

NAME = "evaluate"
RESULTS = "results.json"


@dataclass(frozen=True)
class Config:
    """What to score, and how."""

    model: cli.ModelName = "smollm2-135m"
    adapter: Path | None = None
    """folder in PEFT's format; none scores the model alone"""
    tasks: tuple[str, ...] = tuple(TASKS)
    """any of boolq piqa social_i_qa hellaswag winogrande ARC-Easy ARC-Challenge openbookqa"""
    protocol: Protocol = "generate"
    """generate: the papers' (beam search, first label in the text); label: likeliest label string; harness:
    lm-evaluation-harness's (likeliest choice text)"""
    template: Template | None = None
    """prompt of generate (none is eval, as published) and label (none is train): train, eval or clean"""
    limit: Count | None = None
    """score only the first so many items of each task"""
    data_dir: str | None = None
    """folder in the LLM-Adapters schema, or hf://datasets/OWNER/NAME; none is the variable RORA_COMMONSENSE_DIR"""
    batch_size: Count = 8
    """generate: prompts at once; label and harness: device calls in flight"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """type of the weights and activations; log-probabilities are float32"""
    merge: bool = True
    """add the adapter into the weights first, as the published evaluation does; False runs it beside them, as a prefix,
    series or parallel adapter always is"""
    num_beams: int = 4
    """beams of generate"""
    max_new_tokens: int = 32
    """longest answer of generate, in tokens"""
    revision: cli.Revision = None
    out: cli.Out = None

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.adapter is not None and not self.adapter.is_dir():
            raise InputError(f"{self.adapter}: is not a folder; accepted is an adapter in PEFT's format")
        self.scoring()

    def scoring(self) -> Scoring:
        """The protocol with its settings."""
        return Scoring(self.protocol, self.template, self.num_beams, self.max_new_tokens)


def subject(config: Config, origin: ModelSource) -> tuple[Model, Adapter | None]:
    """The model that is scored, and an adapter where it runs beside the weights.

    Raises:
      InputError: either cannot be read.
    """
    model = load(origin, config.dtype)
    cli.tell(model.remarks)
    return (
        (model, None)
        if config.adapter is None
        else adapters.load_with_adapter(config.adapter, model, merge=config.merge)
    )


def evaluate(
    config: Config, folder: RunFolder, tasks: dict[str, list[TaskRecord]], model: Model, adapter: Adapter | None
) -> list[TaskAccuracy]:
    """Score the records that the folder lacks, and write its results."""
    scoring, records = config.scoring(), [record for items in tasks.values() for record in items]
    kept = Samples(folder.path / samples.FILE, folder.identity, records, config.protocol)
    right = sum(sample.correct for sample in kept.found)
    with progress_bar("scoring", len(records), fields="{task}  accuracy {accuracy:.1%}") as bar:
        bar.advance(len(kept.found))
        for sample in kept.score(model, tasks, scoring, adapter=adapter, batch_size=config.batch_size):
            right += sample.correct
            bar.advance(1, task=TASKS[sample.task].name, accuracy=right / len(kept.found))
    folder.record_files(samples.FILE)
    found = accuracies(kept.found, records)
    heads = {"protocol": scoring.protocol, "template": scoring.template}
    folder.write_frame(frames.from_rows([heads | asdict(level) for level in found], ACCURACY_COLUMNS))
    settings = {"model": config.model, "adapter": config.adapter, "dtype": config.dtype}
    summary = {"scoring": asdict(scoring), **settings, "levels": found}
    folder.write(RESULTS, json.dumps(as_json(summary), indent=2) + "\n")
    return found


def identity(config: Config, data: dict[str, str], origin: ModelSource) -> dict[str, Any]:
    """What determines the results: the settings, and the content of data, adapter and model."""
    plain = asdict(config)
    for name in ("out", "batch_size", "data_dir", "adapter", "revision"):
        del plain[name]
    plain |= asdict(config.scoring()) | origin.identity()
    if config.adapter is not None:
        plain["adapter_sha256"] = adapters.adapter_digest(config.adapter)
    return plain | {"data": data}


def show(found: Sequence[TaskAccuracy], scoring: Scoring) -> None:
    """Print the average and the table of a run: percentages, ± one standard error."""
    answers.say(describe_accuracy(found, scoring.protocol))
    forms = {"task": "{name}", "n": "{n}", "accuracy %": "{accuracy:.1f} ± {error:.1f}"}
    if any(level.accuracy_norm is not None for level in found):
        forms["per character %"] = "{accuracy_norm:.1f} ± {error_norm:.1f}"
    forms |= {f"{name} %": f"{{{name}:.1f}}" for name in ("unparsed", "chance", "majority")}
    rows = [level.in_percent() for level in found]
    template = f", template {scoring.template}" if scoring.template else ""
    tables.print_records(f"{scoring.protocol}{template}; ± one standard error", rows, forms, missing="-")
    if scoring.protocol == "harness" and any(level.task == "boolq" for level in found):
        tables.print_text(
            "BoolQ: these data have no passages, and lm-evaluation-harness's template is filled with an empty one; its "
            "published BoolQ accuracies are with the passage."
        )


def run(config: Config) -> None:
    """Read the records, then the model; score, print, and say where the results are."""
    tasks, data = sources.read_tasks(config.data_dir, config.tasks, config.limit)
    origin = locate(config.model, config.revision)
    known = identity(config, data, origin)
    check_free(path_of(NAME, known, config.out))
    model, adapter = subject(config, origin)
    extra = {"protocol": config.protocol, "units": ACCURACY_UNITS}
    folder = RunFolder.open(NAME, known, out=config.out, extra=extra, models=[origin])
    found = evaluate(config, folder, tasks, model, adapter)
    errors = [
        KeyFigure("accuracy", level.accuracy, level.error, "items", scope={"task": level.task, "n": level.n})
        for level in found
    ]
    with summarised(folder, errors):
        show(found, config.scoring())
    folder.finish(samples=sum(map(len, tasks.values())))
    answers.tell_files(folder.path)


main = cli.command(Config, run, __doc__)

if __name__ == "__main__":
    main()
