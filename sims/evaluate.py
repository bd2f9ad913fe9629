"""Score a model, with or without an adapter, on the eight commonsense tasks.

    python -m sims.evaluate --data-dir DATA --protocol label --tasks boolq openbookqa --limit 200

The run folder holds `samples.jsonl` (one scored item a line), `results.json` and `results.csv` (accuracy and
its standard error a task, and their average). A run that was stopped goes on at the item it had reached.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rora_theory import adapters
from rora_theory.adapters import load_peft
from rora_theory.data import sources
from rora_theory.data.prompts import Template
from rora_theory.data.tasks import TASKS, Record, task_named
from rora_theory.errors import InputError
from rora_theory.evaluate.levels import Level, levels
from rora_theory.evaluate.scoring import Protocol, Sample, Scoring, score
from rora_theory.llama import Adapter, LlamaConfig, Located, load
from rora_theory.llama.tokenizer import Tokenizer
from sims.common import cli, tables
from sims.common.disk import Journal
from sims.common.progress import progress_bar
from sims.common.run_folder import RunFolder, as_json

NAME = "evaluate"
SAMPLES, RESULTS = "samples.jsonl", "results.json"
COLUMNS = ("protocol", "template", *(field.name for field in fields(Level)))


@dataclass(frozen=True)
class Config:
    """What to score, and how."""

    model: str = "smollm2-135m"
    """a folder in Hugging Face layout, a .gguf file, a hub id or a built-in name"""
    adapter: Path | None = None
    """folder in PEFT's format; none scores the model alone"""
    tasks: tuple[str, ...] = tuple(TASKS)
    """any of boolq piqa social_i_qa hellaswag winogrande ARC-Easy ARC-Challenge openbookqa"""
    protocol: Protocol = "generate"
    """generate: the papers' (beam search, first label in the text); label: likeliest label string; harness:
    lm-evaluation-harness's (likeliest choice text)"""
    template: Template | None = None
    """prompt of generate (none is eval, as published) and label (none is train): train, eval or clean"""
    limit: int | None = None
    """score only the first so many items of each task"""
    data_dir: str | None = None
    """folder in the LLM-Adapters schema, or hf://datasets/OWNER/NAME; none is the variable RORA_COMMONSENSE_DIR"""
    batch_size: int = 8
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
    revision: str | None = None
    """branch, tag or commit of a model on the hub"""
    out: Path | None = None
    """run folder; none is results/evaluate/RUN_ID"""

    def scoring(self) -> Scoring:
        """The protocol with its settings."""
        return Scoring(self.protocol, self.template, self.num_beams, self.max_new_tokens)


def check(config: Config) -> None:
    """Raise `InputError` where a setting is out of range."""
    if not config.tasks:
        raise InputError(f"tasks is empty; accepted are {', '.join(TASKS)}")
    for key in config.tasks:
        task_named(key)
    if len(set(config.tasks)) < len(config.tasks):
        raise InputError(f"tasks are {' '.join(config.tasks)}; accepted is each one once")
    cli.check_integers(config, limit=1, batch_size=1)
    if config.adapter is not None and not config.adapter.is_dir():
        raise InputError(f"{config.adapter}: is not a folder; accepted is an adapter in PEFT's format")
    config.scoring()


class Subject(NamedTuple):
    """What is scored: weights, and an adapter where it runs beside them."""

    params: dict[str, Any]
    config: LlamaConfig
    tokenizer: Tokenizer
    adapter: Adapter | None
    origin: Located


def prepare(config: Config) -> Subject:
    """Load the model and the adapter.

    Raises:
      InputError: either cannot be read.
    """
    model = load(config.model, config.dtype, config.revision)
    cli.tell(model.remarks)
    params, adapter = model.params, None
    if config.adapter is not None:
        adapter = load_peft(config.adapter, model.config, params)
        if config.merge and adapter.config.mergeable:
            params, adapter = adapter.merge(params), None
    return Subject(params, model.config, model.tokenizer, adapter, model.origin)


def evaluate(config: Config, folder: RunFolder, records: Sequence[Record], subject: Subject) -> list[Level]:
    """Score the records that the folder lacks, and write its results."""
    journal = Journal(folder.path / SAMPLES, folder.identity)
    samples = read_samples(journal, records, config.protocol)
    if len(samples) < len(records):
        score_rest(config, journal, records, samples, subject)
    ordered = sorted(samples, key=lambda sample: (list(TASKS).index(sample.task), sample.index))
    journal.rewrite([_entry(config.protocol, sample) for sample in ordered])
    folder.record(SAMPLES)
    found = levels(ordered, records)
    scoring = config.scoring()
    heads = {"protocol": scoring.protocol, "template": scoring.template}
    folder.write_rows(COLUMNS, [heads | asdict(level) for level in found])
    settings = {"model": config.model, "adapter": config.adapter, "dtype": config.dtype}
    summary = {"scoring": asdict(scoring), **settings, "levels": found}
    folder.write(RESULTS, json.dumps(as_json(summary), indent=2) + "\n")
    folder.finish(samples=len(ordered))
    return found


def score_rest(
    config: Config, journal: Journal, records: Sequence[Record], samples: list[Sample], subject: Subject
) -> None:
    """Score the records without a sample, appending each to ``samples`` and to ``journal`` as it comes."""
    done = {(sample.task, sample.index) for sample in samples}
    right = sum(sample.correct for sample in samples)
    with progress_bar("scoring", len(records), fields="{task}  accuracy {accuracy:.1%}") as bar:
        bar.advance(len(done))
        for key in config.tasks:  # a task's own items share calls, so that no other task changes a bit of them
            items = [record for record in records if record.task == key]
            for sample in score(
                subject.params,
                subject.config,
                subject.tokenizer,
                items,
                config.scoring(),
                adapter=subject.adapter,
                batch_size=config.batch_size,
                done=done,
            ):
                journal.append(_entry(config.protocol, sample), sync=False)
                samples.append(sample)
                right += sample.correct
                bar.advance(1, task=TASKS[key].name, accuracy=right / len(samples))


def read_records(config: Config) -> tuple[list[Record], dict[str, str]]:
    """Records of the tasks, and the SHA-256 of each task's file.

    Raises:
      InputError: no data folder named, a file missing, or a bad record.
    """
    by_task, digests = sources.read_tasks(config.data_dir, config.tasks, config.limit)
    return [record for records in by_task.values() for record in records], digests


def read_samples(journal: Journal, records: Sequence[Record], protocol: str) -> list[Sample]:
    """The samples that an earlier part of the run wrote.

    Raises:
      InputError: a line is of a record or protocol that this run does not score.
    """
    gold = {(record.task, record.index): record.answer for record in records}
    samples: dict[tuple[str, int], Sample] = {}
    for number, line in enumerate(journal.entries, start=1):
        plain = dict(line)
        named = plain.pop("protocol")
        pairs = tuple((label, float(value)) for label, value in plain.pop("log_likelihoods"))
        sample = Sample(**plain, log_likelihoods=pairs)
        key = (sample.task, sample.index)
        if named != protocol or gold.get(key) != sample.gold or key in samples:
            raise InputError(
                f"{journal.path}: line {number} is of {named} {key}, which this run does not score, or scores once"
            )
        samples[key] = sample
    return list(samples.values())


def _entry(protocol: str, sample: Sample) -> dict[str, Any]:
    return {"protocol": protocol} | asdict(sample)


def identity(config: Config, data: dict[str, str], subject: Subject) -> dict[str, Any]:
    """What determines the results: the settings, and the content of data, adapter and model."""
    plain = asdict(config)
    for name in ("out", "batch_size", "data_dir", "adapter", "revision"):
        del plain[name]
    plain |= asdict(config.scoring())
    plain |= subject.origin.identity()
    if config.adapter is not None:
        plain["adapter_sha256"] = adapters.digest(config.adapter)
    return plain | {"data": data}


def show(found: Sequence[Level], scoring: Scoring) -> None:
    """Print the table of a run: percentages, ± one standard error."""
    normed = any(level.accuracy_norm is not None for level in found)
    columns = [
        "task",
        "n",
        "accuracy %",
        *(["per character %"] if normed else []),
        "unparsed %",
        "chance %",
        "majority %",
    ]
    rows = []
    for level in found:
        name = TASKS[level.task].name if level.task in TASKS else level.task
        norm = [_percent(level.accuracy_norm, level.error_norm)] if normed else []
        rest = [f"{100 * value:.1f}" for value in (level.unparsed, level.chance, level.majority)]
        rows.append([name, level.n, _percent(level.accuracy, level.error), *norm, *rest])
    template = f", template {scoring.template}" if scoring.template else ""
    tables.print_table(f"{scoring.protocol}{template}; ± one standard error", columns, rows)
    if scoring.protocol == "harness" and any(level.task == "boolq" for level in found):
        tables.print_text(
            "BoolQ: these data have no passages, and lm-evaluation-harness's template is filled with an empty one; its "
            "published BoolQ accuracies are with the passage."
        )


def _percent(value: float | None, error: float | None) -> str:
    return "-" if value is None or error is None else f"{100 * value:.1f} ± {100 * error:.1f}"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""

    def run() -> None:
        config = cli.parse(Config, argv, description=__doc__ or "")
        check(config)
        records, data = read_records(config)
        subject = prepare(config)
        extra = {
            "protocol": config.protocol,
            "units": "accuracies are shares of 1; error is one standard error",
        }
        folder = RunFolder.open(NAME, identity(config, data, subject), out=config.out, extra=extra)
        show(evaluate(config, folder, records, subject), config.scoring())
        print(f"results in {folder.path}")

    cli.run(run)


if __name__ == "__main__":
    main()
