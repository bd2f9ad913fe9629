"""What a cell of a sweep does: fine-tune one adapter, then measure its losses and its accuracy."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rora_theory import adapters, llama
from rora_theory.data.tasks import TaskRecord
from rora_theory.errors import InputError
from rora_theory.evaluate.accuracies import accuracies
from rora_theory.evaluate.scoring import Sample, Scoring, in_order, score_tasks
from rora_theory.finetune import (
    Batches,
    Examples,
    FinetuneConfig,
    Metrics,
    NonFiniteLossError,
    Trainer,
    choose_widths,
    metrics,
    tokenize,
)
from rora_theory.finetune.held_out import RecordLoss, record_losses
from rora_theory.finetune.step import SharedSteps
from rora_theory.stats.paired import mean_per_token
from rora_theory.sweep import results
from rora_theory.sweep.cells import SweepCell
from rora_theory.sweep.records import RecordSplit


@dataclass(frozen=True)
class TrainedAdapter:
    """What became of a fine-tuning run: entries of the result, and the adapter, None if it diverged."""

    result: dict[str, Any]
    adapter: Any


@dataclass(frozen=True)
class CellOutcome:
    """What a cell came to.

    Attributes:
      result: figures by name. ``status`` is ``complete`` or ``diverged``: a loss that is no number is a result.
      adapter: as it was trained; None for the base model, and where training diverged.
      losses: of the held-out records in their order; none where training diverged.
      samples: the scored items in the order of tasks; none where they are not scored.
    """

    result: dict[str, Any]
    adapter: Any = None
    losses: Sequence[RecordLoss] = ()
    samples: Sequence[Sample] = ()


class Workbench:
    """One model in memory with its tokenized records and compiled steps; does cells.

    Args:
      shared: what the fine-tuning runs of all cells share; its template, cutoff, widths and loss_on prepare the
        records, its dtype is the weights'; a run of no more steps than its checkpoint_every has no checkpoint.
      records: training and held-out records.
      tasks: items to score.
      located: where each model lies.
      scoring: the protocol of the cells that are scored.
      score_batch_size: of `score`.
      elsewhere: whether the models were located on another machine.
    """

    def __init__(
        self,
        shared: FinetuneConfig,
        records: RecordSplit,
        tasks: Mapping[str, list[TaskRecord]],
        located: Mapping[str, llama.Located],
        *,
        scoring: Scoring,
        score_batch_size: int = 8,
        elsewhere: bool = False,
    ) -> None:
        self.shared, self.records, self.tasks, self.located = shared, records, tasks, located
        self.scoring, self.score_batch_size, self.elsewhere = scoring, score_batch_size, elsewhere
        self._name: str | None = None
        self.model: Any = None
        self.steps = SharedSteps()

    def __reduce__(self) -> tuple[Any, ...]:
        """On another machine it is one without a model, which it opens there."""
        for located in self.located.values():
            located.sha256  # noqa: B018 (known there too)
        options: dict[str, Any] = {"scoring": self.scoring, "score_batch_size": self.score_batch_size}
        options["elsewhere"] = True
        return partial(Workbench, **options), (self.shared, self.records, self.tasks, self.located)

    def open(self, model: str) -> list[str]:
        """Load a model, unless it is the one in memory.

        Returns:
          what a user should be told of it, a line each; nothing where it was in memory.

        Raises:
          LackingError: the model was located elsewhere, and is not here.
          InputError: as `llama.load` and `tokenize`, a held-out record that is longer than the model reads, or a chat
            template that asks for a day that is not named.
        """
        if model == self._name:
            return []
        self._name = self.model = None  # the old one's memory is free before the new one takes its own
        located = self.located[model].here() if self.elsewhere else self.located[model]
        tokenizer, longest = llama.model_tokenizer(located), llama.model_config(located).max_position_embeddings
        template = self.records.source.template(self.shared.template)
        chat = self.records.source.chat(tokenizer, template)
        if chat is not None and chat.dated and self.records.source.config.chat_date is None:
            raise InputError(f"{chat.where}: the chat template asks for the day; accepted is --chat-date YYYY-MM-DD")
        encode = partial(tokenize, tokenizer=tokenizer, template=template, chat=chat)
        answer_only = self.shared.loss_on == "answer"
        self.train_examples: Examples = encode(self.records.train, cutoff=self.shared.cutoff, answer_only=answer_only)
        self._widths = choose_widths(self.train_examples.sizes, self.shared.widths)
        self.held_out: Examples = encode(
            [record for _, _, record in self.records.held_out], cutoff=longest, answer_only=True
        )
        if self.held_out.skipped:
            raise InputError(f"a held-out record is longer than the {longest} tokens {model} reads")
        # The weights come last: a record that can't be used is refused before they are read.
        self.model = llama.load(located, jnp.dtype(self.shared.dtype))
        self._name, self.steps = model, SharedSteps()
        return list(self.model.remarks)

    def run(self, cell: SweepCell, folder: Path, *, save_adapter: bool = False) -> dict[str, Any]:
        """Do a cell: `measure`, and write its losses a record, answers an item and training curve.

        Args:
          cell: which.
          folder: of its own, for these files and, where the run is long enough to have them, its checkpoints: what was
            begun there goes on.
          save_adapter: whether what was trained is written too: an adapter in PEFT's format, trained weights as a
            model.

        Returns:
          its result, see `CellOutcome`.

        Raises:
          InputError: a file can't be written, or is not as it was written; as `open`.
        """
        folder.mkdir(parents=True, exist_ok=True)
        measured = self.measure(cell, folder)
        if save_adapter and measured.adapter is not None:
            if measured.adapter.config.replaces:
                adapters.save_merged(folder / "merged", measured.adapter, self.model)
            else:
                adapters.save_peft(folder / "adapter", measured.adapter, base_model=self.model.origin)
        if measured.losses:
            results.write_losses(folder / results.LOSSES, self.records.held_out, measured.losses)
        if measured.samples:
            results.write_answers(folder / results.ANSWERS, measured.samples)
        return measured.result

    def measure(self, cell: SweepCell, folder: Path) -> CellOutcome:
        """Train and measure a cell; arguments as of `run`."""
        self.open(cell.model)
        begun = time.perf_counter()
        params, adapter, kept = self.model.params, None, None
        result: dict[str, Any] = {"status": "complete"}
        if cell.training is not None:
            trained = self.train(cell.training, folder)
            result |= trained.result
            if trained.adapter is None:
                return CellOutcome(result)
            adapter = kept = trained.adapter
            if cell.training.adapter().mergeable:  # faster than beside the weights
                params, adapter = adapter.merge(params), None
        trained_at = time.perf_counter()
        losses = record_losses(params, self.model.config, self.held_out, adapter=adapter)
        result |= {"train_seconds": trained_at - begun} | _mean_losses(losses)
        if not math.isfinite(result["validation_loss"]):
            step = result.get("steps", 0)
            diverged = {"status": "diverged", "diverged_at": step, "steps": step}
            return CellOutcome(diverged | {"error": "the validation loss is no number"}, kept, losses)
        lost_at = time.perf_counter()
        result["loss_seconds"] = lost_at - trained_at
        samples: list[Sample] = []
        if cell.evaluation is not None:
            samples = self._score(params, adapter)
            found = accuracies(samples, [record for items in self.tasks.values() for record in items])
            result["levels"] = [asdict(level) for level in found]
            result["accuracy_seconds"] = time.perf_counter() - lost_at
        return CellOutcome(result | {"seconds": time.perf_counter() - begun}, kept, losses, samples)

    def begin(self, training: FinetuneConfig) -> tuple[Any, Batches]:
        """The fresh adapter of a run and its batches in order: by the seed alone, the same for every rule."""
        batches = Batches(
            self.train_examples,
            self._widths,
            batch_size=training.batch_size,
            epochs=training.epochs,
            seed=training.seed,
            answer_only=training.loss_on == "answer",
        )
        key = jax.random.key(training.seed)
        return adapters.init(key, training.adapter(), self.model.config, self.model.params), batches

    def train(self, training: FinetuneConfig, folder: Path) -> TrainedAdapter:
        """Fine-tune the open model; arguments as of `run`."""
        training = replace(training, checkpoint_every=self.shared.checkpoint_every)
        adapter, batches = self.begin(training)
        steps = min(len(batches), training.steps or len(batches))
        checkpoints = folder / "checkpoints" if steps > training.checkpoint_every else None
        before, model = self.steps.compilations, self.model
        trainer = Trainer(model.params, model.config, adapter, training, batches, None, checkpoints, shared=self.steps)
        result: dict[str, Any] = {"trainable_parameters": adapters.count(adapter), "steps": trainer.steps}
        try:
            events = Metrics(folder / metrics.FILE, trainer, folder.name)
            for event in trainer.run():
                events.add(event)
        except NonFiniteLossError as error:
            return TrainedAdapter(result | {"status": "diverged", "diverged_at": error.step, "error": str(error)}, None)
        finally:
            trainer.close()
        result["compilations"] = self.steps.compilations - before
        result["train_loss"] = float(np.mean([event["loss"] for event in events.events[-10:]]))
        return TrainedAdapter(result, trainer.adapter("last"))

    def _score(self, params: Any, adapter: Any) -> list[Sample]:
        """The scored items in the order of tasks."""
        scored = score_tasks(
            replace(self.model, params=params),
            self.tasks,
            self.scoring,
            adapter=adapter,
            batch_size=self.score_batch_size,
        )
        return in_order(scored)


def _mean_losses(losses: Sequence[RecordLoss]) -> dict[str, float]:
    """Means a token with their errors."""
    every = mean_per_token([one.loss for one in losses], [one.tokens for one in losses])
    answer = mean_per_token([one.answer_loss for one in losses], [one.answer_tokens for one in losses])
    return {"validation_loss": every.value, "validation_error": every.error} | {
        "answer_loss": answer.value,
        "answer_error": answer.error,
    }
