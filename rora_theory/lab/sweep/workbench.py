"""Workbench of a sweep, which fine-tunes the adapter of a cell and measures its losses and accuracy."""

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

from rora_theory.defaults import SCORE_BATCH_SIZE
from rora_theory.errors import InputError
from rora_theory.lab import adapters, llama
from rora_theory.lab.data.tasks import TaskRecord
from rora_theory.lab.evaluate.accuracies import accuracies
from rora_theory.lab.evaluate.scoring import Sample, Scoring, in_order, score_tasks
from rora_theory.lab.finetune import (
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
from rora_theory.lab.finetune.held_out import RecordLoss, record_losses
from rora_theory.lab.finetune.step import SharedSteps
from rora_theory.lab.sweep import results
from rora_theory.lab.sweep.cells import SweepCell
from rora_theory.lab.sweep.records import RecordSplit
from rora_theory.stats.paired import mean_per_token


@dataclass(frozen=True)
class TrainedAdapter:
    """Outcome of a fine-tuning run.

    Attributes:
      result: Figures by name.
      adapter: Trained adapter; None if the run diverged.
    """

    result: dict[str, Any]
    adapter: Any


@dataclass(frozen=True)
class EvaluatedCell:
    """Outcome of a cell.

    Attributes:
      result: Figures by name. ``status`` is ``complete``, or ``diverged`` if a loss was not finite.
      adapter: Trained adapter; None for the base model and if training diverged.
      losses: Losses of the held-out records in order; empty if training diverged.
      samples: Scored items in the order of the tasks; empty if they are not scored.
    """

    result: dict[str, Any]
    adapter: Any = None
    losses: Sequence[RecordLoss] = ()
    samples: Sequence[Sample] = ()


class Workbench:
    """Model in memory with tokenized records and compiled steps, on which cells run.

    Args:
      shared: Settings that all fine-tuning runs share. Its template, cutoff, widths and loss_on apply to the records,
        its dtype to the weights. A run of at most checkpoint_every steps writes no checkpoint.
      records: Training and held-out records.
      tasks: Items to score.
      located: Locations of the models by name.
      scoring: Protocol of the scoring.
      score_batch_size: Batch size of the scoring.
      is_remote: Whether the models were located on another machine.
    """

    def __init__(
        self,
        shared: FinetuneConfig,
        records: RecordSplit,
        tasks: Mapping[str, list[TaskRecord]],
        located: Mapping[str, llama.ModelSource],
        *,
        scoring: Scoring,
        score_batch_size: int = SCORE_BATCH_SIZE,
        is_remote: bool = False,
    ) -> None:
        self.shared, self.records, self.tasks, self.located = shared, records, tasks, located
        self.scoring, self.score_batch_size, self.is_remote = scoring, score_batch_size, is_remote
        self._name: str | None = None
        self.model: Any = None
        self.steps = SharedSteps()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the workbench without its model, which is opened again on the other machine."""
        # Compute the digests here, so that the other machine can compare its files with them.
        for located in self.located.values():
            located.sha256  # noqa: B018
        options: dict[str, Any] = {"scoring": self.scoring, "score_batch_size": self.score_batch_size}
        options["is_remote"] = True
        return partial(Workbench, **options), (self.shared, self.records, self.tasks, self.located)

    def open(self, model: str) -> list[str]:
        """Load a model and tokenize the records for it, unless it is already in memory.

        Args:
          model: Name of the model.

        Returns:
          Remarks about the model for the user; empty if it was in memory.

        Raises:
          MissingModelError: If the model was located on another machine and is missing on this one.
          InputError: If `llama.load` or `tokenize` refuses a value, a held-out record is longer than the context, or
            the chat template needs a date that is not set.
        """
        if model == self._name:
            return []
        # Free the memory of the previous model before loading the next one.
        self._name = self.model = None
        located = self.located[model].find_here() if self.is_remote else self.located[model]
        tokenizer, longest = llama.model_tokenizer(located), llama.model_config(located).max_position_embeddings
        # The prompt is that of the records, rendered with the model's own chat template if they are chats.
        template = self.records.source.template(self.shared.template)
        chat = self.records.source.chat(tokenizer, template)
        if chat is not None and chat.uses_date and self.records.source.config.chat_date is None:
            raise InputError(f"{chat.where}: the chat template needs a date. Set --chat-date YYYY-MM-DD.")
        encode = partial(tokenize, tokenizer=tokenizer, template=template, chat=chat)
        answer_only = self.shared.loss_on == "answer"
        self.train_examples: Examples = encode(self.records.train, cutoff=self.shared.cutoff, answer_only=answer_only)
        # Few padded lengths keep the number of compilations low.
        self._widths = choose_widths(self.train_examples.input_lengths, self.shared.widths)
        # Held-out records are kept whole, because losses are compared over the same tokens.
        self.held_out: Examples = encode(
            [record for _, _, record in self.records.held_out], cutoff=longest, answer_only=True
        )
        if self.held_out.truncated:
            raise InputError(
                f"held-out records must have at most {longest} tokens, the context of {model}, got a longer one"
            )
        # The weights come last, so that unsuitable records are refused before they are read.
        self.model = llama.load(located, jnp.dtype(self.shared.dtype), quantization=self.shared.quantization)
        # Compiled steps of another model would not be used again.
        self._name, self.steps = model, SharedSteps()
        return list(self.model.remarks)

    def run(self, cell: SweepCell, folder: Path, *, save_adapter: bool = False) -> dict[str, Any]:
        """Run a cell, and write its losses by record, answers by item and training curve.

        Args:
          cell: Cell to run.
          folder: Folder of the cell for these files and the checkpoints of a long run, from which it resumes.
          save_adapter: Whether to save the trained adapter in PEFT's format, or trained weights as a model.

        Returns:
          The result, see `EvaluatedCell`.

        Raises:
          InputError: If a file can't be written or was modified, or if `open` refuses the model.
        """
        folder.mkdir(parents=True, exist_ok=True)
        measured = self.measure(cell, folder)
        # Save what was trained, then what was measured on it.
        if save_adapter and measured.adapter is not None:
            if measured.adapter.config.replaces_weights:
                adapters.save_merged(folder / "merged", measured.adapter, self.model)
            else:
                adapters.save_peft(folder / "adapter", measured.adapter, base_model=self.model.origin)
        if measured.losses:
            results.write_losses(folder / results.LOSSES, self.records.held_out, measured.losses)
        if measured.samples:
            results.write_answers(folder / results.ANSWERS, measured.samples)
        return measured.result

    def measure(self, cell: SweepCell, folder: Path) -> EvaluatedCell:
        """Train and evaluate a cell without writing its results; the arguments are those of `run`."""
        self.open(cell.model)
        start_time = time.perf_counter()
        # Train the adapter, unless the cell is the base model.
        params, adapter, trained_adapter = self.model.params, None, None
        result: dict[str, Any] = {"status": "complete"}
        if cell.training is not None:
            trained = self.train(cell.training, folder)
            result |= trained.result
            if trained.adapter is None:
                return EvaluatedCell(result)
            adapter = trained_adapter = trained.adapter
            # Evaluating merged weights is faster than adding the adapter's output.
            if cell.training.adapter().mergeable:
                params, adapter = adapter.merge(params), None
        trained_time = time.perf_counter()
        # Losses of the held-out records.
        losses = record_losses(params, self.model.config, self.held_out, adapter=adapter)
        result |= {"train_seconds": trained_time - start_time} | _mean_losses(losses)
        if not math.isfinite(result["validation_loss"]):
            step = result.get("steps", 0)
            diverged = {"status": "diverged", "diverged_at": step, "steps": step}
            return EvaluatedCell(diverged | {"error": "the validation loss is not finite"}, trained_adapter, losses)
        losses_time = time.perf_counter()
        result["loss_seconds"] = losses_time - trained_time
        # Accuracies of the tasks.
        samples: list[Sample] = []
        if cell.evaluation is not None:
            samples = self._score(params, adapter)
            levels = accuracies(samples, [record for items in self.tasks.values() for record in items])
            result["levels"] = [asdict(level) for level in levels]
            result["accuracy_seconds"] = time.perf_counter() - losses_time
        result["seconds"] = time.perf_counter() - start_time
        return EvaluatedCell(result, trained_adapter, losses, samples)

    def begin(self, training: FinetuneConfig) -> tuple[Any, Batches]:
        """Create the fresh adapter and the batches of a run, which depend on the seed and not on the rule."""
        batches = Batches(
            self.train_examples,
            self._widths,
            batch_size=training.batch_size,
            epochs=training.epochs,
            steps=training.steps,
            seed=training.seed,
            answer_only=training.loss_on == "answer",
        )
        key = jax.random.key(training.seed)
        return training.adapter().build(key, self.model.config, self.model.params), batches

    def train(self, training: FinetuneConfig, folder: Path) -> TrainedAdapter:
        """Fine-tune the open model.

        Args:
          training: Fine-tuning configuration.
          folder: Folder for the training curve and checkpoints, see `run`.
        """
        training = replace(training, checkpoint_every=self.shared.checkpoint_every)
        adapter, batches = self.begin(training)
        # A short run is repeated after an interruption, which costs less than its checkpoints.
        checkpoints = folder / "checkpoints" if len(batches) > training.checkpoint_every else None
        before, model = self.steps.compilations, self.model
        trainer = Trainer(model.params, model.config, adapter, training, batches, None, checkpoints, shared=self.steps)
        result: dict[str, Any] = {"trainable_parameters": adapter.count(), "steps": trainer.steps}
        try:
            events = Metrics(folder / metrics.FILE, trainer, folder.name)
            for event in trainer.run():
                events.add(event)
        except NonFiniteLossError as error:
            return TrainedAdapter(result | {"status": "diverged", "diverged_at": error.step, "error": str(error)}, None)
        finally:
            trainer.close()
        result["compilations"] = self.steps.compilations - before
        # The mean over the last steps averages out the noise between batches.
        result["train_loss"] = float(np.mean([event["loss"] for event in events.events[-10:]]))
        return TrainedAdapter(result, trainer.adapter("last"))

    def _score(self, params: Any, adapter: Any) -> list[Sample]:
        """Score the tasks, and return the items in the order of tasks."""
        samples = score_tasks(
            replace(self.model, params=params),
            self.tasks,
            self.scoring,
            adapter=adapter,
            batch_size=self.score_batch_size,
        )
        return in_order(samples)


def _mean_losses(losses: Sequence[RecordLoss]) -> dict[str, float]:
    """Compute the mean losses per token with their standard errors over records."""
    validation = mean_per_token([record.loss for record in losses], [record.tokens for record in losses])
    answer = mean_per_token([record.answer_loss for record in losses], [record.answer_tokens for record in losses])
    return {"validation_loss": validation.value, "validation_error": validation.error} | {
        "answer_loss": answer.value,
        "answer_error": answer.error,
    }
