"""Fine-tune a LLaMA model with LoRA, RoRA, DoRA, prefix tuning, series or parallel adapters, or in full.

    python -m sims.finetune --model smollm2-135m --data DATA/ARC-Easy/train.json DATA/ARC-Challenge/train.json

The defaults are the published protocol. The run folder holds `metrics.jsonl` (a line a step and a validation),
`results.csv` (the same as a table), `checkpoints/` and, at the end, `adapter/` in PEFT's format (`--method full`:
`merged/`, a model). A run that was stopped or killed goes on where its last checkpoint was, to the same numbers;
`python -m figures.loss_curves RUN` draws it.
"""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import jax

from rora_theory import adapters, llama
from rora_theory.data.records import DataConfig, read_record_set
from rora_theory.finetune import (
    FinetuneConfig,
    Metrics,
    card,
    distributed,
    metrics,
    prepare,
    sharding,
    split_records,
    trackers,
)
from rora_theory.finetune.checkpoints import silence_checkpoint_logs
from rora_theory.finetune.distributed import ProcessConfig
from rora_theory.finetune.loop import NonFiniteLossError, StepCompleted, Trainer, ValidationCompleted, resumption
from rora_theory.finetune.outputs import OutputConfig, write_outputs
from rora_theory.finetune.trackers import TrackerName
from rora_theory.runs.folder import RunFolder, check_free, path_of
from rora_theory.runs.summary import KeyFigure
from rora_theory.validation.ranges import Count, check_ranges
from sims.common import answers, cli, prompts, tables
from sims.common.progress import progress_bar
from sims.common.summaries import summarised

NAME = "finetune"


@dataclass(frozen=True)
class Config:
    """What to train, and how."""

    data: cli.Data
    model: cli.ModelName = "smollm2-135m"
    revision: cli.Revision = None
    reading: DataConfig = field(default_factory=DataConfig)
    training: FinetuneConfig = field(default_factory=FinetuneConfig)
    out: cli.Out = None
    log_to: TrackerName | None = None
    """show losses, rate, gradient norm and tokens/s in TensorBoard (event files in the run folder) or Weights & Biases
    too"""
    output: OutputConfig = field(default_factory=OutputConfig)
    fsdp: Count = 1
    """devices that share one copy of the base weights; the others hold further copies"""
    processes: ProcessConfig = field(default_factory=ProcessConfig)

    def __post_init__(self) -> None:
        check_ranges(self, str)
        trackers.check_tracker(self.log_to)
        self.output.check_training(self.training)


def run(config: Config) -> None:
    """Check everything that can be checked, train to the end, and write the adapter.

    With several processes each calls this and joins the others; the first alone prints and writes.
    """
    if config.processes.join():
        config.output.check_several(config.training, config.out)
    silence_checkpoint_logs()
    if (first := distributed.is_first()) and config.out is not None:
        check_free(config.out)
    found = read_record_set(config.data, config.reading)
    training = replace(config.training, template=found.template(config.training.template))
    split_records(found.records, training.held_out, training.seed)  # too few are refused before the weights are read
    origin = llama.locate(config.model, config.revision)
    llama_config = llama.model_config(origin)
    adapted = adapters.table(training.adapter(), llama_config)
    if first:
        prompts.tell(found, training.template)
        forms = {name: f"{{{name}}}" for name in ("module", "layers", "rule", "rank")}
        forms |= {"alpha": "{alpha:g}", "scaling": "{scaling:.6g}"}
        rows = [row._asdict() for row in adapted]
        tables.print_records(f"{training.method} on {config.model}", rows, forms, left=3, missing="-")
    tokenizer = llama.model_tokenizer(origin)
    chat = found.chat(tokenizer, training.template)
    identity = origin.identity() | {"data": config.data} | found.identity(chat) | training.settings()
    if first:
        check_free(path_of(NAME, identity, config.out))
    data = prepare(found.records, tokenizer, training, chat)  # bad records are refused before the weights are read
    layout, shardings = sharding.layout_over_all_devices(llama_config, training, fsdp=config.fsdp)
    model = llama.load(origin, training.dtype, shardings=shardings, quantization=training.quantization)
    cli.tell(model.remarks if first else [])
    folder, path = None, config.out
    if first:
        folder = RunFolder.open(NAME, identity, out=config.out, seed=training.seed, models=[origin])
        path = folder.path
        prompts.keep(folder, data.train.examples, model.tokenizer, show=config.reading.show)
    assert path is not None
    # Closed whatever happens: a run that is interrupted has the checkpoint that was being written.
    with closing(Trainer.start(model, data, training, path / "checkpoints", layout=layout)) as trainer:
        if folder is None:
            for _ in trainer.run():
                pass
        else:
            begin(folder, trainer, model, data.summary, training)
            events = follow(trainer, folder, config.log_to)
        kept = trainer.adapter(config.output.keep)
    if folder is not None:
        best = trainer.best_step if config.output.keep == "best" else None
        own = card.build_training_card(training, found, config.data, data.summary, events, best, config.output.license)
        write_outputs(folder, config.output, kept, model, own)
        rows = card.figures(events, folder.entry("trainable_parameters"))
        with summarised(folder, [KeyFigure(row["what"], row["value"], scope={"step": row["step"]}) for row in rows]):
            report(folder, events, data.summary["validated_on"])
        folder.finish(best_step=trainer.best_step, best_loss=trainer.best_loss)
        answers.tell_files(folder.path)


def begin(
    folder: RunFolder, trainer: Trainer, model: llama.Model, summary: Mapping[str, Any], training: FinetuneConfig
) -> None:
    """Say what is trained on what, in the manifest too, and where the run begins or goes on."""
    fresh = trainer.adapter("last")
    trainable, share = adapters.count(fresh), adapters.share(fresh, model.params)
    devices = f"{len(jax.devices())} x {jax.devices()[0].device_kind}"
    counted = {"trainable_parameters": trainable, "trainable_share": share}
    folder.update(data=summary, steps=trainer.steps, device=devices, **counted)
    print(card.describe_start(training, summary, trainer.steps, trainable, share))


def follow(trainer: Trainer, folder: RunFolder, log_to: TrackerName | None = None) -> list[dict[str, Any]]:
    """Run to the end: every event to `metrics.jsonl`, then all of them, which it returns, to `results.csv`."""
    events = Metrics(folder.path / metrics.FILE, trainer, folder.identity)
    print(resumption(trainer.step, trainer.steps, resumed=folder.resumed))
    fields = "loss {loss:.3f}  lr {lr:.1e}  {rate:,.0f} tokens/s"
    tracked = trackers.track(log_to, folder.path, run=folder.identity, config=folder.entry("config"), step=trainer.step)
    try:
        with tracked as tracker, progress_bar("training", trainer.steps, fields=fields) as bar:
            bar.advance(trainer.step)
            for event in trainer.run():
                events.add(event)
                tracker.add(event)
                if isinstance(event, StepCompleted):
                    bar.advance(1, loss=event.loss, lr=event.learning_rate, rate=event.speed)
                elif isinstance(event, ValidationCompleted):
                    print(event.in_words(trainer.steps))
    except NonFiniteLossError as error:
        folder.finish("failed", error=str(error))
        cli.fail(str(error))
    events.write(folder)
    return events.events


def report(folder: RunFolder, events: Sequence[Mapping[str, Any]], held_out: int) -> None:
    """Print how far the losses came, and the run's figures."""
    answers.say(card.describe_losses(events, held_out))
    rows = card.figures(events, folder.entry("trainable_parameters"))
    cells = [(row["what"], row["step"] or "", f"{row['value']:{'.4f' if row['step'] else ',.0f'}}") for row in rows]
    tables.print_table("The run in figures; losses in nats a token", ["", "step", "value"], cells, records=rows)


main = cli.command(Config, run, __doc__)

if __name__ == "__main__":
    main()
