"""CellTrainer of a matrix: it trains the adapter of a cell, and measures its losses and accuracy.

At a constant learning rate, the first 16 steps of a run of 256 steps are a run of 16 steps: one run provides the losses
of all numbers of steps.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from rora_theory.defaults import SCORE_BATCH_SIZE
from rora_theory.errors import InputError
from rora_theory.lab import adapters, llama
from rora_theory.lab.adapters import LoraAdapter
from rora_theory.lab.evaluate.accuracies import accuracies
from rora_theory.lab.evaluate.scoring import Sample, in_order, score_tasks
from rora_theory.lab.finetune import (
    Batches,
    Examples,
    FinetuneConfig,
    Metrics,
    NonFiniteLossError,
    Paused,
    StepCompleted,
    Trainer,
    choose_widths,
    tokenize,
)
from rora_theory.lab.finetune import metrics as metrics_file
from rora_theory.lab.finetune.held_out import record_losses
from rora_theory.lab.finetune.step import SharedSteps
from rora_theory.lab.llama.quantised import Quantization
from rora_theory.lab.sweep import change_parts, results
from rora_theory.lab.sweep.grid import SweepCell
from rora_theory.lab.sweep.plan import SweepPlan
from rora_theory.lab.sweep.runs import Reading, ReadRun
from rora_theory.runs.reading import CHECKPOINTS


@dataclass(frozen=True)
class EvaluatedCell:
    """Outcome of a cell.

    Attributes:
      run: Losses of the steps, read-outs and divergence.
      result: Further figures by name.
      adapter: Trained adapter; None for the base model and if training diverged.
      samples: Scored items in the order of the tasks; empty if they are not scored.
    """

    run: ReadRun
    result: dict[str, Any] = field(default_factory=dict)
    adapter: Any = None
    samples: Sequence[Sample] = ()


class CellTrainer:
    """Model in memory with tokenized records and compiled steps, on which cells run.

    Args:
      plan: Records, tasks, models, and the settings that all fine-tuning runs share. Of these, template, cutoff, widths
        and loss_on apply to the records, the dtype to the weights. A run of at most checkpoint_every steps writes no
        checkpoint.
      score_batch_size: Batch size of the scoring.
      measures_parts: Whether to measure the A part and the B part of the change (`change_parts`) at every read-out.
    """

    def __init__(
        self, plan: SweepPlan, *, score_batch_size: int = SCORE_BATCH_SIZE, measures_parts: bool = False
    ) -> None:
        self.plan, self.score_batch_size, self.measures_parts = plan, score_batch_size, measures_parts
        self._opened: tuple[str, str] | None = None
        self._tokenized: str | None = None
        self.model: Any = None
        self.steps = SharedSteps()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle this object without its model, which is opened again where it is used."""
        options: dict[str, Any] = {"score_batch_size": self.score_batch_size, "measures_parts": self.measures_parts}
        return partial(CellTrainer, **options), (self.plan,)

    def open(self, model: str, quantization: Quantization | None = None) -> list[str]:
        """Load a model and tokenize the records for it, unless it is already in memory.

        Args:
          model: Name of the model.
          quantization: Storage of the weights; None is that of the shared settings.

        Returns:
          Remarks about the model for the user; empty if it was in memory.

        Raises:
          InputError: If `llama.load` or `tokenize` refuses the model.
        """
        quantization = quantization or self.plan.training.quantization
        if (model, quantization) == self._opened:
            return []
        # Free the memory of the previous model before loading the next one.
        self._opened = self.model = None
        # Unsuitable records are refused before the weights are read.
        self.tokenize(model)
        self.model = llama.load(self._find(model), jnp.dtype(self.plan.training.dtype), quantization=quantization)
        # Compiled steps of another model would not be used again.
        self._opened, self.steps = (model, quantization), SharedSteps()
        return self.model.origin.terms

    def _find(self, model: str) -> llama.ModelSource:
        located = self.plan.located[model]
        # Another machine of a cluster may not have the files of a hub id yet.
        return located if located.path.exists() else llama.locate(located.name, located.commit)

    def tokenize(self, model: str) -> None:
        """Tokenize the records for a model.

        Raises:
          InputError: If a held-out record is longer than the context, or the chat template needs a date that is not
            set.
        """
        if model == self._tokenized:
            return
        located, records, training = self._find(model), self.plan.records, self.plan.training
        config = llama.model_config(located)
        tokenizer = llama.model_tokenizer(located, config.vocab_size)
        # The prompt is that of the records, rendered with the model's own chat template if they are chats.
        template = records.source.template(training.template)
        chat = records.source.chat(tokenizer, template)
        if chat is not None and chat.uses_date and records.source.config.chat_date is None:
            raise InputError(f"{chat.where}: the chat template needs a date. Set chat_date to YYYY-MM-DD.")
        encode = partial(tokenize, tokenizer=tokenizer, template=template, chat=chat)
        answer_only = training.loss_on == "answer"
        self.train_examples: Examples = encode(records.train, cutoff=training.cutoff, answer_only=answer_only)
        # Few padded lengths keep the number of compilations low.
        self._widths = choose_widths(self.train_examples.input_lengths, training.widths)
        # Held-out records are kept whole, because losses are compared over the same tokens.
        self.held_out: Examples = encode(
            [record for _, _, record in records.held_out], cutoff=config.max_position_embeddings, answer_only=True
        )
        if self.held_out.truncated:
            raise InputError(
                f"held-out records must have at most {config.max_position_embeddings} tokens, the context of {model}, "
                "got a longer one"
            )
        self._tokenized = model

    def run_cell(self, cell: SweepCell, folder: Path, *, save_adapter: bool = False) -> dict[str, Any]:
        """Run a cell, and write its training curve and its answers by item.

        Args:
          cell: Cell to run.
          folder: Folder of the cell for these files and the checkpoints of a long run, from which it resumes.
          save_adapter: Whether to save the trained adapter in PEFT's format, or trained weights as a model.

        Returns:
          The fields of `ReadRun` and further figures of the run, in JSON types.

        Raises:
          InputError: If a file can't be written or was modified, or if `open` refuses the model.
        """
        folder.mkdir(parents=True, exist_ok=True)
        evaluated = self.evaluate_cell(cell, folder)
        if save_adapter and evaluated.adapter is not None:
            if evaluated.adapter.config.replaces_weights:
                adapters.save_merged(folder / "merged", evaluated.adapter, self.model)
            else:
                adapters.save_peft(folder / "adapter", evaluated.adapter, base_model=self.model.origin)
        if evaluated.samples:
            results.write_answers(folder / results.ANSWERS, evaluated.samples)
        return asdict(evaluated.run) | evaluated.result | {"tokens": int(self.held_out.input_lengths.sum())}

    def evaluate_cell(self, cell: SweepCell, folder: Path) -> EvaluatedCell:
        """Train and evaluate a cell without writing its results; the arguments are those of `run_cell`."""
        training = cell.training(self.plan.training)
        self.open(cell.model, training.quantization if training else self.plan.training.quantization)
        start_time = time.perf_counter()
        if training is None:
            evaluated = EvaluatedCell(ReadRun([], [self._read_out(0, self.model.params, None)]))
        else:
            evaluated = self.train(training, cell.read_at, folder)
        trained_time = time.perf_counter()
        result = evaluated.result | {"train_seconds": trained_time - start_time}
        # Accuracies of the tasks, with the adapter at the end of the run.
        samples: list[Sample] = []
        if cell.evaluation is not None and evaluated.run.diverged_at is None:
            samples = self._score(*self._merged(evaluated.adapter))
            levels = accuracies(samples, [record for items in self.plan.tasks.values() for record in items])
            result["levels"] = [asdict(level) for level in levels]
            result["accuracy_seconds"] = time.perf_counter() - trained_time
        result["seconds"] = time.perf_counter() - start_time
        return replace(evaluated, result=result, samples=samples)

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

    def train(
        self,
        training: FinetuneConfig,
        read_at: Sequence[int],
        folder: Path | None = None,
    ) -> EvaluatedCell:
        """Fine-tune the open model to the last of ``read_at``, and evaluate the held-out records after each.

        A run of more than ``checkpoint_every`` steps with one read-out resumes after an interruption.

        Args:
          training: Fine-tuning configuration.
          read_at: Numbers of steps in ascending order; a single one under a schedule that decays.
          folder: Folder for the training curve and checkpoints; None writes neither.

        Returns:
          The run up to its end or its last finite read-out, with the trained adapter if it did not diverge.
        """
        training = replace(training, steps=read_at[-1], checkpoint_every=self.plan.training.checkpoint_every)
        adapter, batches = self.begin(training)
        model = self.model
        # Keep A before training, and the inputs of the modules, to split the change into its parts.
        start: LoraAdapter | None = None
        inputs: dict[str, Float[np.ndarray, "layers tokens p_in"]] = {}
        if self.measures_parts and isinstance(adapter, LoraAdapter) and not adapter.config.use_dora:
            # Copy to the host: training donates the arrays of the adapter.
            start = adapter.replace(jax.device_get(adapter.params))
            inputs = change_parts.module_inputs(model.params, model.config, self.held_out, adapter)
        # A short run is repeated after an interruption, which costs less than its checkpoints. So is one with earlier
        # read-outs, which are not saved.
        resumes = len(read_at) == 1 and read_at[-1] > training.checkpoint_every
        checkpoints = folder / CHECKPOINTS if folder is not None and resumes else None
        before = self.steps.compilations
        trainer = Trainer(
            model.params,
            model.config,
            adapter,
            training,
            batches,
            None,
            checkpoints,
            shared=self.steps,
            pauses=read_at,
        )
        result: dict[str, Any] = {"trainable_parameters": adapter.count()}
        run, trained = ReadRun([], []), None
        try:
            metrics = None if folder is None else Metrics(folder / metrics_file.FILE, trainer)
            # The losses of the steps before a checkpoint are those of the metrics file.
            run.train_losses.extend(event["loss"] for event in (metrics.events if metrics else ()))
            # A run that was interrupted in its last read-out has no step left.
            events = trainer.train() if trainer.step < read_at[-1] else iter([Paused(read_at[-1])])
            for event in events:
                if metrics is not None:
                    metrics.add(event)
                if isinstance(event, StepCompleted):
                    run.train_losses.append(event.loss)
                elif isinstance(event, Paused):
                    trained = trainer.adapter("last")
                    reading = self._read_out(event.step, *self._merged(trained))
                    # The last update may diverge, which no loss of the training shows.
                    if not math.isfinite(math.fsum(reading.losses)):
                        error = "the held-out loss is not finite"
                        return EvaluatedCell(replace(run, diverged_at=event.step), result | {"error": error}, trained)
                    if start is not None:
                        parts = change_parts.compute_part_rms(start, trained, inputs)
                        reading = replace(reading, parts=parts.to_dict("list"))
                    run.readings.append(reading)
        except NonFiniteLossError as error:
            return EvaluatedCell(replace(run, diverged_at=error.step), result | {"error": str(error)})
        finally:
            trainer.close()
        return EvaluatedCell(run, result | {"compilations": self.steps.compilations - before}, trained)

    def count_tokens(self, model: str) -> tuple[list[int], list[int]]:
        """Return the numbers of tokens of each held-out record of a model: all with a loss, and those of the answer."""
        self.tokenize(model)
        return self.held_out.input_lengths.tolist(), self.held_out.target_counts.tolist()

    def _merged(self, adapter: Any) -> tuple[Any, Any]:
        """Return the weights with the adapter merged into them, which is faster, or beside them if it has to be."""
        if adapter is not None and adapter.config.mergeable:
            return adapter.merge(self.model.params), None
        return self.model.params, adapter

    def _read_out(self, step: int, params: Any, adapter: Any) -> Reading:
        """Compute the losses of the held-out records."""
        losses = record_losses(params, self.model.config, self.held_out, adapter=adapter)
        return Reading(step, [record.loss for record in losses], [record.answer_loss for record in losses])

    def _score(self, params: Any, adapter: Any) -> list[Sample]:
        """Score the tasks, and return the items in the order of tasks."""
        samples = score_tasks(
            replace(self.model, params=params),
            self.plan.tasks,
            self.plan.scoring,
            adapter=adapter,
            batch_size=self.score_batch_size,
        )
        return in_order(samples)
