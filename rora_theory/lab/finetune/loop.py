"""The training loop: an iterator of events that resumes from the latest checkpoint and prints nothing."""

import math
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from rora_theory.lab.adapters.base import TrainableAdapter
from rora_theory.lab.data.batches import Batch, Batches, prefetch
from rora_theory.lab.finetune import step as steps
from rora_theory.lab.finetune.checkpoints import Checkpoints, Progress
from rora_theory.lab.finetune.config import FinetuneConfig
from rora_theory.lab.finetune.memory import StepMemory
from rora_theory.lab.finetune.sharding import Layout
from rora_theory.lab.finetune.training_data import TrainingData
from rora_theory.lab.llama import LlamaConfig, Model


@dataclass(frozen=True)
class StepCompleted:
    """Event of a completed step.

    Attributes:
      step: Number of the step, counted from 1.
      epoch: Number of passes over the data so far, a fraction; 1.0 after the first pass.
      loss: Mean loss over the batch's targets, before the update.
      grad_norm: Norm of the gradient before clipping.
      learning_rate: Learning rate of the update.
      targets: Number of target tokens in the loss.
      positions: Number of processed positions, padding included.
      seconds: Time since the previous step completed; it includes compilation for a new batch shape.
    """

    step: int
    epoch: float
    loss: float
    grad_norm: float
    learning_rate: float
    targets: int
    positions: int
    seconds: float

    @property
    def speed(self) -> float:
        """Target tokens per second; 0 if no time was measured."""
        return self.targets / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class ValidationCompleted:
    """Event of a validation.

    Attributes:
      step: Number of completed steps.
      loss: Mean loss over all validation targets.
      best: Whether the loss is the lowest so far.
    """

    step: int
    loss: float
    best: bool

    def describe(self, steps: int) -> str:
        """Return a line for the log of a run of ``steps`` steps."""
        return f"step {self.step}/{steps}: validation loss {self.loss:.4f}{' (best)' * self.best}"


@dataclass(frozen=True)
class Paused:
    """Event between two steps, at which ``Trainer.adapter("last")`` returns the adapter of this step.

    Attributes:
      step: Number of completed steps.
    """

    step: int


Event = StepCompleted | ValidationCompleted | Paused


class NonFiniteLossError(ArithmeticError):
    """Error raised if the loss, the gradient norm or the validation loss is infinite or not a number.

    Attributes:
      step: Number of the step with the value, counted from 1.
      checkpoint: Folder of the last good checkpoint, or None.
    """

    def __init__(self, quantity: str, value: float, step: int, checkpoint: Path | None) -> None:
        location = f"The last good checkpoint is {checkpoint}." if checkpoint else "There is no checkpoint yet."
        super().__init__(f"{quantity} is {value} at step {step}. {location} Try a lower learning rate or alpha.")
        self.step, self.checkpoint = step, checkpoint


class Trainer:
    """A fine-tuning run.

    Args:
      params: Weights of the base model, never changed.
      llama_config: Configuration of the base model.
      adapter: Freshly initialised adapter.
      config: Fine-tuning configuration.
      train: Training batches of all epochs.
      validation: Validation batches of one pass, or None.
      checkpoints: Folder of the checkpoints of this run alone, as they do not record its settings and data; the run
        resumes from the latest one in it. With None the run writes no checkpoints: if interrupted, it starts over, and
        only the last adapter is available.
      layout: Layout of the arrays on several devices, where ``params`` already are; None means a single device.
      shared: Cache of compiled steps to use, on a single device only; None compiles a step for this run.
      pauses: Steps after which `run` yields `Paused`.

    Attributes:
      steps: Number of optimizer steps of the whole run.
      step: Number of steps taken so far, those before a checkpoint included. It may be one ahead of the events.

    Raises:
      InputError: If a checkpoint cannot be restored, a record is longer than the model's context, or the devices cannot
        share the batch evenly.
    """

    def __init__(
        self,
        params: Any,
        llama_config: LlamaConfig,
        adapter: TrainableAdapter,
        config: FinetuneConfig,
        train: Batches,
        validation: Batches | None,
        checkpoints: Path | None,
        *,
        layout: Layout | None = None,
        shared: steps.SharedSteps | None = None,
        pauses: Collection[int] = (),
    ) -> None:
        self._pauses = frozenset(pauses)
        # Batches are at most as wide as the model's context.
        context = llama_config.max_position_embeddings
        train, validation = (
            train.limit_widths(context),
            None if validation is None else validation.limit_widths(context),
        )
        # The run ends with the records or after the configured number of steps.
        self.steps = min(len(train), config.steps or len(train))
        self._params, self._adapter, self._config = params, adapter, config
        self._train, self._validation = train, validation
        # Initial state. Its key seeds the dropout only: the adapter is drawn by the caller.
        key = jax.random.key(config.seed)
        self._state = steps.init_state(adapter, steps.finetune_optimizer(config, self.steps), key)
        # Commit the arrays to their device, as restored arrays are. Otherwise a resumed run compiles the step again.
        self._state = jax.tree.map(lambda a: jax.device_put(a, a.sharding), self._state)
        # On several devices, place the state and every batch according to the layout.
        self._place: Callable[[Batch], Batch] = lambda batch: batch
        shardings = None
        if layout is not None:
            layout.check_batch(config.batch_size, config.accumulation)
            shardings, self._place = layout.shardings(self._state), layout.batch
            self._state = layout.place(self._state)
        # Compile the steps lazily: at the first batch of each shape.
        self._step: Any
        if shared is not None:
            self._step = shared.train_step(adapter, llama_config, config, self.steps)
        else:
            self._step = steps.train_step(adapter, llama_config, config, self.steps, state_shardings=shardings)
        self._evaluate = steps.eval_step(adapter, llama_config)
        # Resume from the latest checkpoint of this run, if there is one.
        self._progress = Progress(0)
        self._checkpoints = None if checkpoints is None else Checkpoints(checkpoints)
        if self._checkpoints is not None and (latest := self._checkpoints.latest) is not None:
            self._state, self._progress = self._checkpoints.restore(latest, self._state)
        self.step = self._progress.step

    @classmethod
    def start(
        cls,
        model: Model,
        data: TrainingData,
        config: FinetuneConfig,
        checkpoints: Path | None = None,
        *,
        layout: Layout | None = None,
    ) -> "Trainer":
        """Construct the trainer of a loaded model with an adapter initialised from the configuration's seed.

        Args:
          model: Base model.
          data: Training and validation batches.
          config: Fine-tuning configuration.
          checkpoints: Folder of the checkpoints; None writes none.
          layout: Layout of the arrays on several devices; None means a single device.

        Examples:
          >>> trainer = Trainer.start(model, prepare(records, model.tokenizer, config), config)  # doctest: +SKIP
        """
        adapter = config.adapter().build(jax.random.key(config.seed), model.config, model.params)
        return cls(model.params, model.config, adapter, config, data.train, data.validation, checkpoints, layout=layout)

    @property
    def best_step(self) -> int | None:
        """Step of the lowest validation loss so far; None before the first validation."""
        return self._progress.best_step

    @property
    def best_loss(self) -> float | None:
        """Lowest validation loss so far; None before the first validation."""
        return self._progress.best_loss

    def validates(self, step: int) -> bool:
        """Return whether a validation follows a step."""
        return self._validation is not None and (step == self.steps or step % self._config.evaluate_every == 0)

    def saves(self, step: int) -> bool:
        """Return whether a checkpoint follows a step, in a run that writes checkpoints."""
        return self.validates(step) or step == self.steps or step % self._config.checkpoint_every == 0

    def train(self) -> Iterator[Event]:
        """Train from the current step to the end, yielding an event for each step, validation and pause.

        The event of a step is yielded after the next step has been dispatched, so that the device does not wait for the
        host. A checkpoint follows every validation, every ``checkpoint_every`` steps and the last step.

        Raises:
          NonFiniteLossError: If a loss or gradient norm is not finite. No checkpoint is written after the last good
            step.
          InputError: If a checkpoint cannot be written.
        """
        start = self.step
        batches = prefetch(self._train, start=start)
        clock = time.perf_counter()
        # Number, metrics and positions of the last dispatched step, until its event is yielded.
        pending: tuple[int, steps.StepMetrics, int] | None = None

        def yield_pending() -> Iterator[StepCompleted]:
            nonlocal pending, clock
            if pending is None:
                return
            (number, metrics, positions), pending = pending, None
            event = self._completed_step(number, metrics, positions)  # waits for the device
            now = time.perf_counter()
            event, clock = replace(event, seconds=now - clock), now
            yield event

        for number in range(start + 1, self.steps + 1):
            # Dispatch this step, which returns at once, then wait for the one before it and yield its event.
            batch = next(batches)
            self._state, metrics = self._step(self._state, self._params, self._place(batch))
            self.step = number
            yield from yield_pending()
            pending = (number, metrics, batch.inputs.size)
            # Wait for this step too before validating or saving its state. Their time is not part of the next step's.
            if self.saves(number):
                yield from yield_pending()
                self._progress = replace(self._progress, step=number)
                if self.validates(number):
                    yield self._validate(number)
                if self._checkpoints is not None:
                    self._checkpoints.save(self._state, self._progress)
                clock = time.perf_counter()
            # The caller may read the state at a pause, so nothing may be pending.
            if number in self._pauses:
                yield from yield_pending()
                yield Paused(number)
                clock = time.perf_counter()
        # Checkpoints are written in the background: the run has ended when the last one is on disk.
        if self._checkpoints is not None:
            self._checkpoints.wait()

    def compile(self) -> StepMemory:
        """Compile the step for the widest batches, which `run` then uses, and return its memory.

        Not available with ``shared`` steps.
        """
        batch = self._place(self._train[self._train.widest_step])
        return StepMemory.from_compiled(self._step.lower(self._state, self._params, batch).compile())

    def adapter(self, which: str = "best") -> Any:
        """Return the trained adapter.

        No later step reuses the memory of its arrays.

        Args:
          which: ``"last"``, or ``"best"`` by validation loss. Without validation or checkpoints, the best is the last.
        """
        if which == "best" and self._checkpoints is not None and self.best_step not in (None, self.step):
            self._checkpoints.wait()  # the best checkpoint may still be in writing
            state, _ = self._checkpoints.restore(self.best_step, self._state)
            return self._adapter.replace(state.params)
        params = self._state.params
        # The next step donates the present arrays: hand out copies unless the run is over.
        return self._adapter.replace(params if self.step == self.steps else jax.tree.map(_copy, params))

    def close(self) -> None:
        """Finish writing checkpoints."""
        if self._checkpoints is not None:
            self._checkpoints.close()

    def _completed_step(self, number: int, metrics: steps.StepMetrics, positions: int) -> StepCompleted:
        """Return the event of a dispatched step without its time, after the device has computed the metrics."""
        loss, norm, rate, targets = (float(value) for value in jax.device_get(metrics))
        for quantity, value in (("loss", loss), ("gradient norm", norm)):
            self._check_finite(quantity, value, number)
        epoch = number / self._train.steps_per_epoch
        return StepCompleted(number, epoch, loss, norm, rate, int(targets), positions, 0.0)

    def _validate(self, number: int) -> ValidationCompleted:
        """Compute the validation loss after a step, and record it if it is the best so far."""
        assert self._validation is not None
        # Sum loss and targets over all batches; fetch them once, so that the device never waits for the host.
        sums = [
            self._evaluate(self._state.params, self._params, self._place(batch)) for batch in prefetch(self._validation)
        ]
        total, count = (math.fsum(map(float, values)) for values in zip(*jax.device_get(sums), strict=True))
        loss = total / count
        self._check_finite("validation loss", loss, number)
        is_best = self.best_loss is None or loss < self.best_loss
        if is_best:
            self._progress = replace(self._progress, best_step=number, best_loss=loss)
        return ValidationCompleted(number, loss, is_best)

    def _check_finite(self, quantity: str, value: float, number: int) -> None:
        """Raise `NonFiniteLossError` if a value of a step is infinite or not a number."""
        if not math.isfinite(value):
            last_good = None
            if self._checkpoints is not None and (latest := self._checkpoints.latest) is not None:
                last_good = self._checkpoints.path(latest)
            raise NonFiniteLossError(quantity, value, number, last_good)


def _copy(array: jax.Array) -> jax.Array:
    """Copy an array shard by shard, without the other processes of a run."""
    parts = [jnp.copy(shard.data) for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)


def resumption(step: int, steps: int, *, resumed: bool) -> str:
    """Return a phrase that says at which step the run starts or resumes."""
    if not step:
        return "no checkpoint yet: starts at step 1" if resumed else "starts at step 1"
    if step == steps:
        return f"all {steps} steps are already done"
    return f"resumes after step {step} of {steps}, its last checkpoint"
