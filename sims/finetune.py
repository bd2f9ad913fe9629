"""Fine-tune a LLaMA model with LoRA, RoRA, DoRA, prefix tuning, series or parallel adapters, or in full.

    python -m sims.finetune --model smollm2-135m --data DATA/ARC-Easy/train.json DATA/ARC-Challenge/train.json

The defaults are the published protocol. The run folder contains `metrics.jsonl` (one line per step and per validation),
`results.csv` (the same as a table), `checkpoints/` and, at the end, `adapter/` in PEFT's format (with `--method full`,
the model in `merged/`). The same command resumes an interrupted run from its last checkpoint, with the same numbers.
`python -m figures.loss_curves RUN` draws the losses.
"""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

import jax

from rora_theory.lab import adapters, llama
from rora_theory.lab.data.records import DataConfig, read_record_set
from rora_theory.lab.finetune import (
    FinetuneConfig,
    Metrics,
    distributed,
    metrics,
    prepare,
    run_report,
    sharding,
    trackers,
)
from rora_theory.lab.finetune.checkpoints import silence_checkpoint_logs
from rora_theory.lab.finetune.distributed import ProcessConfig
from rora_theory.lab.finetune.loop import NonFiniteLossError, StepCompleted, Trainer, ValidationCompleted, resumption
from rora_theory.lab.finetune.memory import StepMemory
from rora_theory.lab.finetune.outputs import OutputConfig, write_outputs
from rora_theory.lab.finetune.trackers import TrackerName
from rora_theory.runs.folder import RunFolder, check_free, path_of
from rora_theory.runs.summary import KeyFigure
from rora_theory.validation.ranges import check_ranges
from rora_theory.validation.rules import check_warmup
from sims.common import answers, cli, prompts, tables
from sims.common.progress import progress_bar
from sims.common.summaries import summarised

NAME = "finetune"


@dataclass(frozen=True)
class FinetuneOptions:
    """Options of the fine-tuning run."""

    data: cli.Data
    model: cli.ModelName = "smollm2-135m"
    revision: cli.Revision = None
    reading: DataConfig = field(default_factory=DataConfig)
    training: FinetuneConfig = field(default_factory=FinetuneConfig)
    out: cli.Out = None
    log_to: TrackerName | None = None
    """Also log losses, learning rate, gradient norm and tokens/s to tensorboard (event files in the run folder) or
    wandb (Weights & Biases)"""
    output: OutputConfig = field(default_factory=OutputConfig)
    fsdp: bool = False
    """Split the base weights over the devices, instead of copying them to each"""
    processes: ProcessConfig = field(default_factory=ProcessConfig)

    def __post_init__(self) -> None:
        check_ranges(self)
        trackers.check_tracker(self.log_to)
        check_warmup(self.training.warmup, self.training.steps or inf)
        self.output.check_training(self.training)


def finetune_model(config: FinetuneOptions) -> None:
    """Validate the inputs, train, and write the adapter.

    With several processes, each process calls this function; only the first one prints and writes.
    """
    # Connect the processes before anything else uses JAX.
    if config.processes.join():
        config.output.check_several_processes(config.training, config.out)
    silence_checkpoint_logs()
    is_first = distributed.is_first()
    records = read_record_set(config.data, config.reading)
    training = replace(config.training, template=records.template(config.training.template))
    # Model without its weights, and the modules to adapt.
    origin = llama.locate(config.model, config.revision)
    llama_config = llama.model_config(origin)
    adapted = training.adapter().table(llama_config)
    if is_first:
        prompts.print_summary(records, training.template)
        formats = {name: f"{{{name}}}" for name in ("module", "layers", "rule", "rank")}
        formats |= {"alpha": "{alpha:g}", "scaling": "{scaling:.6g}"}
        rows = [row._asdict() for row in adapted]
        tables.print_records(f"{training.method} on {config.model}", rows, formats, left=3, missing="-")
    tokenizer = llama.model_tokenizer(origin, llama_config.vocab_size)
    chat = records.chat(tokenizer, training.template)
    identity = origin.identity() | records.identity(chat) | training.settings()
    if is_first:
        check_free(path_of(NAME, identity, config.out))
    # Tokenize, which refuses bad records, then load the weights.
    data = prepare(records.records, tokenizer, training, chat)
    check_warmup(training.warmup, len(data.train))
    layout, shardings = sharding.layout_over_all_devices(llama_config, training, split_weights=config.fsdp)
    model = llama.load(origin, training.dtype, shardings=shardings, quantization=training.quantization)
    cli.print_notes(origin.terms if is_first else [])
    folder, path = None, config.out
    if is_first:
        folder = RunFolder.open(NAME, identity, out=config.out, seed=training.seed, models=[origin])
        path = folder.path
        prompts.print_prompts(data.train.examples, model.tokenizer, config.reading.show)
    assert path is not None
    # Close the trainer also after an interruption, so that a checkpoint in progress is completed.
    with closing(Trainer.start(model, data, training, path / "checkpoints", layout=layout)) as trainer:
        memory = trainer.compile()
        if folder is None:
            for _ in trainer.train():
                pass
        else:
            record_start(folder, trainer, model, data.summary, training, memory)
            events = train(trainer, folder, config.log_to)
        adapter = trainer.adapter(config.output.keep)
    # Only the first process writes: the outputs, their card, and the summary.
    if folder is not None:
        write_outputs(folder, config.output, adapter, model)
        rows = run_report.summary_rows(events, folder.entry("trainable_parameters"))
        with summarised(folder, [KeyFigure(row["what"], row["value"], scope={"step": row["step"]}) for row in rows]):
            report(folder, events, data.summary["validated_on"])
        folder.finish(best_step=trainer.best_step, best_loss=trainer.best_loss)
        answers.print_files(folder.path)


def record_start(
    folder: RunFolder,
    trainer: Trainer,
    model: llama.Model,
    summary: Mapping[str, Any],
    training: FinetuneConfig,
    memory: StepMemory,
) -> None:
    """Print a summary of the run and the memory of its step, and write the summary to the manifest."""
    fresh = trainer.adapter("last")
    trainable, share = fresh.count(), adapters.share(fresh, model.params)
    device = jax.devices()[0]
    devices = f"{len(jax.devices())} x {device.device_kind}"
    counted = {"trainable_parameters": trainable, "trainable_share": share}
    folder.update(data=summary, steps=trainer.steps, device=devices, **counted)
    print(run_report.describe_start(training, summary, trainer.steps, trainable, share))
    print(memory.describe(device), flush=True)


def train(trainer: Trainer, folder: RunFolder, log_to: TrackerName | None = None) -> list[dict[str, Any]]:
    """Train to the end, writing every event to `metrics.jsonl`, then all events to `results.csv`."""
    # Events go to the journal, the tracker and the progress bar. A resumed run begins with the past ones.
    events = Metrics(folder.path / metrics.FILE, trainer)
    print(resumption(trainer.step, trainer.steps, resumed=folder.resumed))
    fields = "loss {loss:.3f}  lr {lr:.1e}  {rate:,.0f} tokens/s"
    tracked = trackers.track(log_to, folder.path, run=folder.identity, config=folder.entry("config"), step=trainer.step)
    try:
        with tracked as log, progress_bar("training", trainer.steps, fields=fields) as bar:
            bar.advance(trainer.step)
            for event in trainer.train():
                events.add(event)
                log(event)
                if isinstance(event, StepCompleted):
                    bar.advance(1, loss=event.loss, lr=event.learning_rate, rate=event.speed)
                elif isinstance(event, ValidationCompleted):
                    print(event.describe(trainer.steps))
    # Mark the run as failed before the command ends, so that its folder states why.
    except NonFiniteLossError as error:
        folder.finish("failed", error=str(error))
        cli.fail(str(error))
    events.write(folder)
    return events.events


def report(folder: RunFolder, events: Sequence[Mapping[str, Any]], held_out: int) -> None:
    """Print the losses and the key figures of the run."""
    answers.print_answer(run_report.describe_losses(events, held_out))
    rows = run_report.summary_rows(events, folder.entry("trainable_parameters"))
    cells = [(row["what"], row["step"] or "", f"{row['value']:{'.4f' if row['step'] else ',.0f'}}") for row in rows]
    tables.print_table("Key figures; losses in nats per token", ["", "step", "value"], cells, records=rows)


main = cli.command(FinetuneOptions, finetune_model, __doc__)

if __name__ == "__main__":
    main()
