"""The training loop: a stream of events, resumed where the checkpoints end; it prints and draws nothing."""

import math
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from rora_theory import adapters
from rora_theory.adapters.base import TrainableAdapter
from rora_theory.data.batches import Batch, Batches, iterate
from rora_theory.errors import InputError
from rora_theory.finetune import step as steps
from rora_theory.finetune.checkpoints import Checkpoints, Progress
from rora_theory.finetune.config import FinetuneConfig
from rora_theory.finetune.sharding import Gathered, Layout
from rora_theory.finetune.training_data import TrainingData
from rora_theory.io import digests
from rora_theory.llama import LlamaConfig, Model


@dataclass(frozen=True)
class Stepped:
    """A step was taken.

    Attributes:
      step: from 1.
      epoch: how far through the data, 1.0 after the first pass.
      loss: mean over the batch's targets, before the update.
      grad_norm: before clipping.
      learning_rate: of this update.
      targets: tokens in the loss.
      positions: tokens worked on, padding included.
      seconds: since the step before was done; the first of a shape compiles.
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
        """Tokens in the loss a second; 0 where no time passed."""
        return self.targets / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Validated:
    """The validation loss after ``step`` steps, a mean over all its targets; ``best``: the lowest so far."""

    step: int
    loss: float
    best: bool

    def in_words(self, steps: int) -> str:
        """Of a run of so many steps."""
        return f"step {self.step}/{steps}: validation loss {self.loss:.4f}{' (best)' * self.best}"


@dataclass(frozen=True)
class Paused:
    """``step`` steps are taken, the next is not begun: `Trainer.adapter` ``("last")`` is that of this step."""

    step: int


Event = Stepped | Validated | Paused


class NonFiniteLossError(ArithmeticError):
    """The loss, the gradient or the validation loss is infinite or not a number.

    Attributes:
      step: the step it was seen at, from 1.
      checkpoint: the last good checkpoint; None where there is none yet.
    """

    def __init__(self, what: str, value: float, step: int, checkpoint: Path | None) -> None:
        kept = f"the last good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"
        super().__init__(f"{what} is {value} at step {step}; {kept}; a lower learning rate or alpha may help")
        self.step, self.checkpoint = step, checkpoint


class Trainer:
    """One fine-tuning run.

    Args:
      params: the base model's weights, never changed.
      llama_config: the base model's configuration.
      adapter: a fresh adapter.
      config: the run.
      train: batches of all epochs.
      validation: batches of one pass, or None.
      checkpoints: folder of the checkpoints; a run goes on from the latest in it. None makes none: a short run that
        begins anew when it is stopped, and that has the last adapter alone to offer.
      attention: see `rora_theory.llama.attention.choose_route`.
      layout: of a run on many devices, on which ``params`` lie already; None is one device.
      shared: compiled steps to take part in, of a run on one device; None compiles this run's own.
      pauses: steps after which `run` yields `Paused`.

    Attributes:
      steps: number of steps of the whole run.
      step: steps taken so far, be they of a checkpoint; one whose event is yet to come counts.
      best_step, best_loss: the lowest validation loss so far; None before the first.

    Raises:
      InputError: a checkpoint that can't be restored or is of another run, a record longer than the model reads, or a
        batch that the devices can't share evenly.
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
        attention: str = "auto",
        layout: Layout | None = None,
        shared: steps.SharedSteps | None = None,
        pauses: Collection[int] = (),
    ) -> None:
        self._pauses = frozenset(pauses)
        longest = llama_config.max_position_embeddings
        train, validation = train.within(longest), None if validation is None else validation.within(longest)
        self.steps = min(len(train), config.steps or len(train))
        self._params, self._adapter, self._config = params, adapter, config
        self._train, self._validation = train, validation
        key = jax.random.key(config.seed)
        self._state = steps.init_state(adapter, steps.finetune_optimizer(config, self.steps), key)
        # Committed to its device, as a restored state is: a run that goes on compiles nothing else.
        self._state = jax.tree.map(lambda a: jax.device_put(a, a.sharding), self._state)
        self._place: Callable[[Batch], Batch] = lambda batch: batch
        shardings = None
        if layout is not None:
            layout.check_batch(config.batch_size, config.accumulation)
            shardings, self._place = layout.state_shardings(self._state), layout.batch
            self._state, adapter = layout.state(self._state), Gathered(adapter, layout)
        self._step: Callable[..., Any]
        if shared is not None:
            self._step = shared.train_step(adapter, llama_config, config, self.steps, attention=attention)
        else:
            self._step = steps.train_step(
                adapter, llama_config, config, self.steps, attention=attention, state_shardings=shardings
            )
        self._evaluate = steps.eval_step(adapter, llama_config, attention=attention)
        self._progress = Progress(0)
        self._checkpoints = None if checkpoints is None else Checkpoints(checkpoints)
        if self._checkpoints is not None:
            self._progress = Progress(0, settings=_settings_digest(config, self.steps), data=train.digest)
            if (latest := self._checkpoints.latest) is not None:
                self._state, found = self._checkpoints.restore(latest, self._state)
                self._check_own(found, self._checkpoints.path(latest))
                self._progress = replace(found, settings=self._progress.settings, data=self._progress.data)
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
        """A run of a loaded model from an adapter that is drawn at the configuration's seed; arguments as above.

        Examples:
          >>> trainer = Trainer.start(model, prepare(records, model.tokenizer, config), config)  # doctest: +SKIP
        """
        adapter = adapters.init(jax.random.key(config.seed), config.adapter(), model.config, model.params)
        return cls(model.params, model.config, adapter, config, data.train, data.validation, checkpoints, layout=layout)

    @property
    def best_step(self) -> int | None:
        return self._progress.best_step

    @property
    def best_loss(self) -> float | None:
        return self._progress.best_loss

    def validates(self, step: int) -> bool:
        """Whether a validation follows a step."""
        return self._validation is not None and (step == self.steps or step % self._config.evaluate_every == 0)

    def saves(self, step: int) -> bool:
        """Whether a checkpoint follows a step, where the run has any."""
        return self.validates(step) or step == self.steps or step % self._config.checkpoint_every == 0

    def run(self) -> Iterator[Event]:
        """Train to the end, or on from the checkpoint; yields what happens.

        A step's event comes when the next step is already under way, so that the device does not wait for the
        host. A checkpoint follows every validation loss, every ``checkpoint_every`` steps and the last step.

        Raises:
          NonFiniteLossError: training stops; nothing is written after the last good step.
          InputError: a checkpoint can't be written.
        """
        start = self.step
        batches = iterate(self._train, start=start)
        clock = time.perf_counter()
        pending: tuple[int, steps.StepMetrics, int] | None = None

        def settle() -> Iterator[Stepped]:
            nonlocal pending, clock
            if pending is None:
                return
            (number, metrics, positions), pending = pending, None
            event = self._stepped(number, metrics, positions)
            now = time.perf_counter()
            event, clock = replace(event, seconds=now - clock), now
            yield event

        for number in range(start + 1, self.steps + 1):
            batch = next(batches)
            self._state, metrics = self._step(self._state, self._params, self._place(batch))
            self.step = number
            yield from settle()
            pending = (number, metrics, batch.inputs.size)
            if self.saves(number):
                yield from settle()
                self._progress = replace(self._progress, step=number)
                if self.validates(number):
                    yield self._validated(number)
                if self._checkpoints is not None:
                    self._checkpoints.save(self._state, self._progress)
                clock = time.perf_counter()
            if number in self._pauses:
                yield from settle()
                yield Paused(number)
                clock = time.perf_counter()
        if self._checkpoints is not None:
            self._checkpoints.wait()

    def adapter(self, which: str = "best") -> Any:
        """The trained adapter: ``"last"``, or ``"best"`` by validation loss (last where there was none).

        Its arrays are the caller's: no later step takes their memory.
        """
        if which == "best" and self._checkpoints is not None and self.best_step not in (None, self.step):
            self._checkpoints.wait()  # the best may be the one that is being written
            state, _ = self._checkpoints.restore(self.best_step, self._state)
            return adapters.replace(self._adapter, state.params)
        params = self._state.params
        return adapters.replace(self._adapter, params if self.step == self.steps else jax.tree.map(_copy, params))

    def close(self) -> None:
        """Finish writing checkpoints."""
        if self._checkpoints is not None:
            self._checkpoints.close()

    def _check_own(self, found: Progress, path: Path) -> None:
        """Refuse a checkpoint of another run; one of an earlier version does not tell."""
        if found.step > self.steps:
            raise InputError(f"{path}: is beyond the run's {self.steps} steps; accepted is one of this run")
        for what, there, here in (
            ("settings", found.settings, self._progress.settings),
            ("training data", found.data, self._progress.data),
        ):
            if there not in (None, here):
                raise InputError(f"{path}: is of a run with other {what}; accepted is one of this run")

    def _stepped(self, number: int, metrics: steps.StepMetrics, positions: int) -> Stepped:
        loss, norm, rate, targets = (float(value) for value in jax.device_get(metrics))
        for what, value in (("loss", loss), ("gradient norm", norm)):
            self._check_finite(what, value, number)
        epoch = number / self._train.steps_per_epoch
        return Stepped(number, epoch, loss, norm, rate, int(targets), positions, 0.0)

    def _validated(self, number: int) -> Validated:
        assert self._validation is not None
        sums = [
            self._evaluate(self._state.params, self._params, self._place(batch)) for batch in iterate(self._validation)
        ]
        total, count = (math.fsum(map(float, values)) for values in zip(*jax.device_get(sums), strict=True))
        loss = total / count
        self._check_finite("validation loss", loss, number)
        best = self.best_loss is None or loss < self.best_loss
        if best:
            self._progress = replace(self._progress, best_step=number, best_loss=loss)
        return Validated(number, loss, best)

    def _check_finite(self, what: str, value: float, number: int) -> None:
        if not math.isfinite(value):
            kept = None
            if self._checkpoints is not None and (latest := self._checkpoints.latest) is not None:
                kept = self._checkpoints.path(latest)
            raise NonFiniteLossError(what, value, number, kept)


def _copy(array: jax.Array) -> jax.Array:
    """On the same devices; nothing is computed across them, so that one process of several may ask for it."""
    parts = [jnp.copy(shard.data) for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)


_NO_NUMBERS = ("epochs", "steps", "evaluate_every", "checkpoint_every")
"""Settings that change no step's numbers, but for the schedule that ends with the run."""
_IN_DATA = ("template", "cutoff", "loss_on", "held_out", "widths", "batch_size")
"""Settings that decide the batches, of which there is a digest."""


def _settings_digest(config: FinetuneConfig, steps: int) -> str:
    """Of the settings that a run can't go on without; its length is one where the learning rate depends on it."""
    named = replace(config, lr=config.peak_learning_rate).settings()
    kept = {name: value for name, value in named.items() if name not in _NO_NUMBERS + _IN_DATA}
    return digests.of_json([*sorted(kept.items()), None if config.schedule == "constant" else steps])


def resumption(step: int, steps: int, *, resumed: bool) -> str:
    """Where the run begins or goes on, in words."""
    if not step:
        return "no checkpoint yet: begins with step 1" if resumed else "begins with step 1"
    if step == steps:
        return f"all {steps} steps are done already"
    return f"goes on after step {step} of {steps}, its last checkpoint"
