"""Fine-tune a LLaMA model with LoRA, RoRA, DoRA, prefix tuning, or series or parallel adapters.

    python -m sims.finetune --model smollm2-135m --data DATA/ARC-Easy/train.json DATA/ARC-Challenge/train.json

The defaults are the published protocol. The run folder holds `metrics.jsonl` (a line a step and a validation),
`results.csv` (the same as a table), `checkpoints/` and, at the end, `adapter/` in PEFT's format. A run that was
stopped or killed goes on where its last checkpoint was, to the same numbers; `python -m figures.loss_curves RUN`
draws it.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rora_theory import digests
from rora_theory.adapters import Row
from rora_theory.errors import InputError
from rora_theory.finetune import (
    Batches,
    Examples,
    FinetuneConfig,
    NonFiniteLossError,
    Record,
    Stepped,
    Trainer,
    Validated,
    choose_widths,
    distributed,
    read_records,
    sharding,
    split,
    tokenize,
)
from rora_theory.scaling import check_integer
from sims.common import cli, tables
from sims.common.disk import Journal
from sims.common.progress import progress_bar
from sims.common.run_folder import RunFolder

NAME = "finetune"
METRICS = "metrics.jsonl"
COLUMNS = ("event", "step", "epoch", "loss", "grad_norm", "learning_rate", "targets", "positions", "seconds", "best")


@dataclass(frozen=True)
class Config:
    """What to train, and how."""

    data: tuple[str, ...]
    """.json or .jsonl files in the LLM-Adapters schema, or hf://datasets/OWNER/NAME[@REVISION]/FILE"""
    model: str = "smollm2-135m"
    """a folder in Hugging Face layout, a .gguf file, a hub id or a built-in name"""
    revision: str | None = None
    """branch, tag or commit of a model on the hub"""
    training: FinetuneConfig = field(default_factory=FinetuneConfig)

    out: Path | None = None
    """run folder; none is results/finetune/RUN_ID"""
    keep: Literal["best", "last"] = "best"
    """which adapter to write at the end: best by validation loss (as published), or last"""
    merge: bool = False
    """write merged/ too: the model with the adapter (LoRA, RoRA or DoRA) added in, in Hugging Face layout"""
    serve_as: Literal["peft", "portable"] = "peft"
    """how to write adapter/: with all of PEFT's entries, or so that clients that know fewer compute the same too"""
    fsdp: int = 1
    """devices that share one copy of the base weights; the others hold further copies"""
    coordinator: str | None = None
    """HOST:PORT of process 0, for several processes outside SLURM"""
    num_processes: int | None = None
    """how many processes take part"""
    process_id: int | None = None
    """number of this process"""


@dataclass(frozen=True)
class Data:
    """Batches, and what became of the records."""

    train: Batches
    validation: Batches | None
    summary: dict[str, Any]


def prepare(parts: tuple[list[Record], list[Record]], tokenizer: Any, config: FinetuneConfig) -> Data:
    """Tokenize and plan training and validation records. Raises `InputError` as these do."""
    answer_only = config.loss_on == "answer"
    train, held_out = (
        tokenize(part, tokenizer, cutoff=config.cutoff, template=config.template, answer_only=answer_only)
        if part
        else None
        for part in parts
    )
    assert train is not None
    found = [examples for examples in (train, held_out) if examples is not None]
    widths = choose_widths(np.concatenate([examples.sizes for examples in found]), config.widths)

    def batches(examples: Examples, **order: int) -> Batches:
        return Batches(examples, widths, batch=config.batch_size, answer_only=answer_only, **order)

    trained = batches(train, epochs=config.epochs, seed=config.seed)
    summary = {
        "records": sum(map(len, parts)),
        "trained_on": len(train),
        "validated_on": 0 if held_out is None else len(held_out),
        "truncated": sum(examples.truncated for examples in found),
        "skipped": sum(examples.skipped for examples in found),
        "steps_per_epoch": trained.steps_per_epoch,
        "widths": widths,
        "padding": trained.padding,
    }
    return Data(trained, None if held_out is None else batches(held_out), summary)


class Metrics:
    """`metrics.jsonl`: a sealed line an event, appended as it comes; none beyond the step where the run goes on.

    Args:
      path: of the file.
      trainer: whose events.
      identity: of the run.

    Raises:
      InputError: the file is not as the run wrote it, or lacks what came before the checkpoint.
    """

    def __init__(self, path: Path, trainer: Trainer, identity: str) -> None:
        if not trainer.step:
            path.unlink(missing_ok=True)
        self._trainer, self._journal = trainer, Journal(path, identity)
        kept = [event for event in self._journal.entries if event["step"] <= trainer.step]
        expected = [
            (name, step)
            for step in range(1, trainer.step + 1)
            for name in ("step", *(["validation"] if trainer.validates(step) else []))
        ]
        if [(event["event"], event["step"]) for event in kept] != expected:
            raise InputError(
                f"{path}: has {len(kept)} lines of the {len(expected)} before the checkpoint at step {trainer.step}; "
                "accepted is the file as the run wrote it; with checkpoints/ beside it removed, the run begins anew"
            )
        if len(kept) < len(self._journal.entries):
            self._journal.rewrite(kept)

    def add(self, event: Any) -> None:
        name = "step" if isinstance(event, Stepped) else "validation"
        # On the disk before a checkpoint that follows it.
        self._journal.append({"event": name, **asdict(event)}, sync=self._trainer.saves(event.step))

    @property
    def events(self) -> list[dict[str, Any]]:
        """All events, of this and earlier parts of the run."""
        return self._journal.entries


def finetune(config: Config, model: Any = None) -> Path:
    """Check everything that can be checked, train to the end, and write the adapter; returns the run folder.

    With several processes each calls this, and the first alone prints and writes.

    Args:
      config: of the run.
      model: a `rora_theory.llama.Model` that is ``config.model``, to spare loading it again; None loads it.
    """
    import jax
    import jax.numpy as jnp

    from rora_theory import adapters, llama

    training, first = config.training, distributed.is_first()
    check_integer("fsdp", config.fsdp)
    settings = training.adapter()
    if config.merge and not settings.mergeable:
        raise InputError(f"merge is True with method {training.method}; accepted are methods lora, dora")
    if config.serve_as == "portable" and training.method != "lora":
        what = "method lora, or serve_as peft with merge" if settings.mergeable else "serve_as peft"
        raise InputError(f"serve_as is portable with method {training.method}; accepted is {what}")
    records = read_records(config.data)
    parts = split(records, training.held_out, training.seed)
    origin = llama.locate(config.model, config.revision) if model is None else model.origin
    llama_config = llama.model_config(origin) if model is None else model.config
    rows = adapters.table(settings, llama_config)
    if first:
        print_table(config, rows)
    layout, shardings = None, None
    if len(jax.devices()) > 1:
        layout = sharding.Layout(sharding.mesh(fsdp=config.fsdp))
        layout.check_batch(training.batch_size, training.accumulation)
        shardings = layout.params_shardings(llama.abstract_params(llama_config, jnp.dtype(training.dtype)))
    if model is None:
        model = llama.load(origin, jnp.dtype(training.dtype), shardings=shardings)
        cli.tell(model.remarks if first else [])
    data = prepare(parts, model.tokenizer, training)
    adapter = adapters.init(jax.random.key(training.seed), settings, model.config, model.params)

    folder = None
    if first:
        identity = (
            origin.identity() | {"data": config.data, "records_sha256": digests.of_json(records)} | training.settings()
        )
        folder = RunFolder.open(NAME, identity, out=config.out, seed=training.seed)
    path = config.out if folder is None else folder.path
    assert path is not None
    trainer = Trainer(
        model.params,
        model.config,
        adapter,
        training,
        data.train,
        data.validation,
        path / "checkpoints",
        layout=layout,
    )
    if folder is None:
        for _ in trainer.run():
            pass
        trainer.adapter(config.keep)
        trainer.close()
        return path
    trainable, share = adapters.count(adapter), adapters.share(adapter, model.params)
    devices = f"{len(jax.devices())} x {jax.devices()[0].device_kind}"
    counted = {"trainable_parameters": trainable, "trainable_share": share}
    folder.update(data=data.summary, steps=trainer.steps, device=devices, **counted)
    print(f"{trainable:,} trainable parameters, {share:.2%} of all")
    print(f"{data.summary['trained_on']} records, {trainer.steps} steps")
    follow(trainer, folder)
    kept = trainer.adapter(config.keep)
    trainer.close()
    if folder.entry("kept") != config.keep or (folder.entry("serve_as") or "peft") != config.serve_as:
        for name in ("adapter", "merged"):
            folder.clear(name)
        folder.update(kept=config.keep, serve_as=config.serve_as)
    if not folder.holds("adapter"):
        adapters.save_peft(path / "adapter", kept, base_model=origin, portable=config.serve_as == "portable")
        folder.record("adapter")
    if config.merge and not folder.holds("merged"):
        folder.clear("merged")
        save_merged(path / "merged", kept, model)
        folder.record("merged")
    folder.finish(best_step=trainer.best_step, best_loss=trainer.best_loss)
    return path


def follow(trainer: Trainer, folder: RunFolder) -> None:
    """Run to the end: every event to `metrics.jsonl`, then all of them to `results.csv`."""
    metrics = Metrics(folder.path / METRICS, trainer, folder.identity)
    print(resumption(trainer, folder))
    fields = "loss {loss:.3f}  lr {lr:.1e}  {rate:,.0f} tokens/s"
    try:
        with progress_bar("training", trainer.steps, fields=fields) as bar:
            bar.advance(trainer.step)
            for event in trainer.run():
                metrics.add(event)
                if isinstance(event, Stepped):
                    rate = event.targets / event.seconds
                    bar.advance(1, loss=event.loss, lr=event.learning_rate, rate=rate)
                elif isinstance(event, Validated):
                    mark = " (best)" if event.best else ""
                    print(f"step {event.step}/{trainer.steps}: validation loss {event.loss:.4f}{mark}")
    except NonFiniteLossError as error:
        folder.finish("failed", error=str(error))
        cli.fail(str(error))
    folder.write_rows(COLUMNS, metrics.events)
    folder.record(METRICS)


def resumption(trainer: Trainer, folder: RunFolder) -> str:
    """Where the run begins or goes on, in words."""
    if not trainer.step:
        return "no checkpoint yet: begins with step 1" if folder.resumed else "begins with step 1"
    if trainer.step == trainer.steps:
        return f"all {trainer.steps} steps are done already"
    return f"goes on after step {trainer.step} of {trainer.steps}, its last checkpoint"


def save_merged(path: Path, adapter: Any, model: Any) -> None:
    """Write the model with the adapter added in, and its tokenizer, in Hugging Face layout."""
    from rora_theory import adapters
    from rora_theory.llama.saving import save_model

    save_model(path, replace(model, params=adapters.merge(adapter, model.params)))


def print_table(config: Config, rows: Sequence[Row]) -> None:
    """What is adapted, how strongly."""

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    cells = [
        (row.module, row.layers, row.rule, row.rank, number(row.alpha, "g"), number(row.scaling, ".6g")) for row in rows
    ]
    title = f"{config.training.method} on {config.model}"
    tables.print_table(title, ("module", "layers", "rule", "rank", "alpha", "scaling"), cells, left=3)


def main() -> None:
    """Join the other processes, if there are any, and train."""
    config = cli.parse(Config, description=(__doc__ or "").split("\n", 1)[0])
    several = distributed.initialize(config.coordinator, config.num_processes, config.process_id)
    if several and (config.out is None or config.merge):
        raise InputError("several processes: accepted is --out, and no --merge (one process can merge afterwards)")
    quiet()
    path = finetune(config)
    if distributed.is_first():
        print(f"{path}: metrics.jsonl, results.csv, adapter/" + (", merged/" if config.merge else ""))


def quiet() -> None:
    """Leave it to this command to say what went wrong.

    When a checkpoint cannot be written, each of the writer's threads logs it at length, and what they leave undone
    complains of its closed event loop later.
    """
    import absl.logging

    absl.logging.set_verbosity(absl.logging.FATAL)
    report = sys.unraisablehook
    sys.unraisablehook = lambda seen: None if str(seen.exc_value) == "Event loop is closed" else report(seen)


if __name__ == "__main__":
    cli.run(main)
