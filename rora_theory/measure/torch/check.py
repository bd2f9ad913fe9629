"""The rank coordinate check of a PEFT model: do its first steps, under the user's own optimizer, depend on the rank?

    def make_model(rank):
        return get_peft_model(base, LoraConfig(r=rank, lora_alpha=16, use_rslora=True, target_modules="all-linear"))

    found = coordinate_check(make_model, batch, ranks=(2, 8, 32), held_out=held_out)
    print(found.sentence())
    found.assert_flat()

Ranks share their noise: the smaller one's A has the first rows of the larger one's. See
`rora_theory.measure.rank_check.check` for the check of rules in JAX.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from peft.tuners.lora import LoraLayer

from rora_theory import inits
from rora_theory.advice.lora_config import init_of
from rora_theory.errors import InputError
from rora_theory.measure.rank_check.coordinate_table import MODEL, WHOLE, BatchSplit, Coordinate, Table, whole_model
from rora_theory.measure.regimes import thin
from rora_theory.measure.torch.batches import Batch, Loss, moved, plain_loss, tokens, tokens_of
from rora_theory.measure.torch.modules import base_model, unchanged, unwrapped, with_autograd
from rora_theory.measure.torch.progress import bar
from rora_theory.random.seeds import check_seed
from rora_theory.scaling import check_integer
from rora_theory.stats.slopes import BAND
from rora_theory.validation.rules import check_ranks, check_steps, listed

MakeOptimizer = Callable[[Iterable[torch.nn.Parameter], int], torch.optim.Optimizer]

LearningRate = float | Callable[[int], float]
"""One learning rate for all ranks, or a function of the rank."""

CONCLUSIONS = {
    "flat": "do not depend on the rank, so the advice holds as it stands",
    "grows with the rank": "grow with the rank, so alpha or the learning rate is too large at the higher ranks",
    "shrinks with the rank": "shrink with the rank, so alpha or the learning rate is too small at the higher ranks",
    "undecided": "may or may not depend on the rank: the draws of A differ too much, so raise seeds",
}
"""What a verdict means for a setting that is to be kept over ranks."""


def adamw(learning_rate: LearningRate) -> MakeOptimizer:
    """Return a function that makes AdamW at this learning rate."""
    rate_of = learning_rate if callable(learning_rate) else lambda _: learning_rate
    return lambda parameters, rank: torch.optim.AdamW(parameters, lr=rate_of(rank))


@dataclass(frozen=True, eq=False)
class TorchCheck:
    """What `coordinate_check` found.

    Attributes:
      table: the sizes by coordinate, [seeds, ranks] each: ``hidden``, ``logits``, root mean square of the change of
        the final hidden states (the output head's inputs) and of the logits; of each kind of module ``output``, root
        mean square of gamma B A x; ``loss``.
      sizes: the same as a tidy frame, a row a rank, seed and coordinate.
      slopes: a row a coordinate: log-log slope against the rank, its error, and whether it is flat.
      verdict: on the whole model, its hidden states and logits: ``"flat"``, ``"grows with the rank"``, ...
      scope: what it was found at.
      band: largest absolute slope that was called flat.
    """

    table: Table
    sizes: pd.DataFrame
    slopes: pd.DataFrame
    verdict: str
    scope: str
    band: float

    def sentence(self) -> str:
        """Return the verdict on the whole model, what follows from it, and its scope."""
        conclusion = CONCLUSIONS.get(self.verdict, "behave differently by step or split (see slopes)")
        return f"The first steps of the whole model {conclusion} (verdict: {self.verdict}). {self.scope}"

    def assert_flat(self, *, split: BatchSplit | None = None, step: int | None = None) -> None:
        """Pass where hidden states and logits are shown not to depend on the rank; made for test suites.

        Args:
          split, step: of this batch, and after so many steps; None is every one that was read.

        Raises:
          AssertionError: a slope outside the band, or one that the seeds leave undecided.
          InputError: nothing of the kind was read.
        """
        chosen = [
            each
            for each in self.table.values
            if (each.module, each.quantity) in WHOLE and split in (None, each.split) and step in (None, each.step)
        ]
        if not chosen:
            raise InputError(f"nothing was read of split {split!r} after step {step!r}; accepted is what was checked")
        for each in chosen:
            self.table.assert_flat(each.quantity, split=each.split, step=each.step, band=self.band)


def coordinate_check(
    make_model: Callable[[int], torch.nn.Module],
    batch: Batch | Sequence[Batch],
    ranks: Sequence[int] = (2, 8, 32, 128),
    *,
    held_out: Batch | None = None,
    learning_rate: LearningRate = 1e-4,
    make_optimizer: MakeOptimizer | None = None,
    loss: Loss | None = None,
    steps: Sequence[int] = (1, 2, 5, 10),
    seeds: int = 3,
    band: float = BAND,
    seed: int = 0,
    progress: bool = False,
) -> TorchCheck:
    """Take the user's own steps at several ranks and see whether the model's outputs change by the same amount.

    Args:
      make_model: of a rank, a PEFT model with LoRA (or rsLoRA) of that rank, fresh: B = 0. A is drawn anew by the law
        that its ``init_lora_weights`` names, nested over ranks. It may put its adapter on one and the same base each
        time: PEFT's layers are taken off when a rank is done.
      batch: of every step, or one a step, begun again where steps go on; what the model takes, with labels.
      ranks: two or more.
      held_out: a batch that is never trained on; its tokens that begin as the first batch's do are not read.
      learning_rate: Learning rate of AdamW, the one you train with: a number, or a function of the rank.
      make_optimizer: Function of the adapter's parameters and the rank that returns another optimizer; then
        ``learning_rate`` has no effect. None is AdamW.
      loss: of the model and a batch; None is ``model(**batch).loss``.
      steps: updates after which to read, ascending.
      seeds: how many draws of A, 2 or more for error bars.
      band: largest absolute slope to call flat.
      seed: of all draws.
      progress: Whether to show transformers' progress bar, which states the number of steps before they start.

    The model is read in evaluation mode and stepped in its own. In bfloat16 the first steps' changes may be too small
    to be seen: float32 is meant.

    Raises:
      InputError: a model that is no fresh LoRA of its rank, an init that has no law here, or a setting out of range.
    """
    check_ranks(ranks)
    check_steps(steps)
    check_integer("seeds", seeds, least=2)
    check_seed(seed)
    ranks = tuple(sorted(ranks))
    batches = [batch] if isinstance(batch, Mapping) else list(batch)
    take = plain_loss if loss is None else loss
    make = adamw(learning_rate) if make_optimizer is None else make_optimizer
    values: dict[Coordinate, np.ndarray] = {}
    scope: list[str] = []
    runs = [(number, column, rank) for number in range(seeds) for column, rank in enumerate(ranks)]
    total = len(runs) * max(steps)
    described = f"Checking {len(ranks)} ranks with {seeds} draws of A ({total} training steps)"
    with with_autograd(), bar(total, description=described, unit="step", shown=progress) as shown:
        for number, column, rank in runs:
            model = unwrapped(make_model(rank))
            with unchanged(model):
                torch.manual_seed(seed + number)
                layers = _fresh_layers(model, rank)
                _draw(layers, model, [seed, number])
                run = _Run(model, layers, batches, held_out, take)
                optimizer = make([each for each in model.parameters() if each.requires_grad], rank)
                for coordinate, value in run.coordinates(optimizer, steps, shown.update):
                    values.setdefault(coordinate, np.full((seeds, len(ranks)), np.nan))[number, column] = value
            scope.append(_stepped_by(optimizer))
            name = f"{type(base_model(model)).__name__} in {next(model.parameters()).dtype}".replace("torch.", "")
            if hasattr(model, "unload"):
                model.unload()
    table = Table(ranks, values)
    lines = table.lines(band=band)
    sizes = pd.DataFrame(
        [
            {"rank": rank, "seed": number} | coordinate._asdict() | {"value": float(value[number, column])}
            for coordinate, value in values.items()
            for number in range(seeds)
            for column, rank in enumerate(ranks)
        ]
    )
    steps_in_words = f"{listed(steps)} step{'' if tuple(steps) == (1,) else 's'}"
    batches_in_words = f"{len(batches)} training batch{'' if len(batches) == 1 else 'es'}"
    said = (
        f"Found on {name} at ranks {listed(ranks)}, after {steps_in_words} of "
        f"{'; '.join(dict.fromkeys(scope))}, {seeds} draws of A, {batches_in_words} and "
        f"{'one' if held_out else 'none'} held out; flat is a slope within ±{band:g}, its 95% interval and all."
    )
    slopes = pd.DataFrame(lines)
    thin.warn((sizes, slopes), thin.of_ranks(ranks))
    return TorchCheck(table, sizes, slopes, whole_model(lines), said, band)


def _fresh_layers(model: torch.nn.Module, rank: int) -> dict[str, tuple[LoraLayer, str]]:
    """The LoRA layers of linear modules, and each one's adapter.

    Raises:
      InputError: none, another rank, or a B that is not zero.
    """
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer) or not module.lora_A:
            continue
        for adapter in module.active_adapters:
            if adapter not in module.lora_A:
                continue
            rows = len(module.lora_A[adapter].weight)
            if rows != rank:
                raise InputError(f"make_model({rank}) gives {name} an adapter of rank {rows}; accepted is rank {rank}")
            if bool(module.lora_B[adapter].weight.any()):
                raise InputError(f"make_model({rank}) gives {name} a B that is not zero; accepted is a fresh adapter")
            found[name] = (module, adapter)
    if not found:
        raise InputError(f"make_model({rank}) gives a model without LoRA; accepted is one of get_peft_model")
    return found


def _draw(layers: Mapping[str, tuple[LoraLayer, str]], model: torch.nn.Module, seeds: list[int]) -> None:
    configs: Any = getattr(model, "peft_config", {})
    for index, (layer, adapter) in enumerate(layers.values()):
        word = configs[adapter].init_lora_weights if adapter in configs else True
        weight, random = layer.lora_A[adapter].weight, np.random.default_rng([*seeds, index])
        drawn = inits.draw(random, init_of(word), rank=weight.shape[0], p_in=weight.shape[1])
        with torch.no_grad():
            weight.copy_(torch.from_numpy(drawn))


class _Text:
    """A batch that is read, and which rows of an output of so many rows are tokens that count.

    Raises:
      InputError: a held-out batch none of whose tokens is apart from the trained ones.
    """

    def __init__(self, batch: Batch, model: torch.nn.Module, trained: Batch | None = None) -> None:
        self.batch = batch
        self._known = tokens(model, batch, trained)
        if not all((known.real & ~known.seen).any() for known in self._known.values()):
            raise InputError("no held-out token is apart from the trained ones; accepted are records that differ")

    def rms(self, x: torch.Tensor) -> float:
        """Root mean square over the tokens that count, all of them where it is not known which do."""
        rows = x.detach().float().reshape(-1, x.shape[-1])
        known = tokens_of(self._known, x)
        if known is not None:
            rows = rows[torch.from_numpy(known.real & ~known.seen).to(rows.device)]
        return float(rows.square().mean().sqrt())


class _Run:
    """One adapter, trained and read."""

    def __init__(
        self,
        model: torch.nn.Module,
        layers: Mapping[str, tuple[LoraLayer, str]],
        batches: Sequence[Batch],
        held_out: Batch | None,
        loss: Loss,
    ) -> None:
        base = base_model(model)
        self._model, self._layers, self._loss = model, layers, loss
        self._train = [_Text(moved(each, base), base) for each in batches]
        self._held_out = None if held_out is None else _Text(moved(held_out, base), base, batches[0])

    def coordinates(
        self, optimizer: torch.optim.Optimizer, steps: Sequence[int], stepped: Callable[[], Any]
    ) -> Iterator[tuple[Coordinate, float]]:
        numbers = [(step - 1) % len(self._train) for step in range(1, max(steps) + 1)]
        read = {self._train[numbers[step - 1]] for step in steps} | {self._held_out} - {None}
        before = {text: self._outputs(text)[0] for text in read if text is not None}
        for step, number in enumerate(numbers, start=1):
            optimizer.zero_grad()
            self._loss(self._model, self._train[number].batch).backward()
            optimizer.step()
            stepped()
            if step not in steps:
                continue
            texts: dict[BatchSplit, _Text | None] = {"train": self._train[number], "held_out": self._held_out}
            for split, text in texts.items():
                if text is None:
                    continue
                outputs, added, loss = self._outputs(text)
                for name, after in outputs.items():
                    yield Coordinate(name, split, MODEL, step), text.rms(after - before[text][name])
                for kind, sizes in added.items():
                    yield Coordinate("output", split, kind, step), float(np.sqrt(np.mean(np.square(sizes))))
                yield Coordinate("loss", split, MODEL, step), loss

    def _outputs(self, text: _Text) -> tuple[dict[str, torch.Tensor], dict[str, list[float]], float]:
        """Final hidden states and logits; by kind of module the rms of what each one's adapter adds; and the loss."""
        found: dict[str, torch.Tensor] = {}
        added: dict[str, list[float]] = {}

        def adds(kind: str, scaling: float, _: Any, __: Any, output: torch.Tensor) -> None:
            added.setdefault(kind, []).append(scaling * text.rms(output))

        def head(_: Any, args: tuple, output: torch.Tensor) -> None:
            found["hidden"], found["logits"] = args[0].detach().float(), output.detach().float()

        with ExitStack() as stack:
            stack.enter_context(_evaluated(self._model))
            stack.enter_context(torch.no_grad())
            for name, (layer, adapter) in self._layers.items():
                hook = partial(adds, name.rpartition(".")[2], layer.scaling[adapter])
                stack.callback(layer.lora_B[adapter].register_forward_hook(hook).remove)
            of_model = getattr(base_model(self._model), "get_output_embeddings", None)
            output = of_model() if callable(of_model) else None
            if output is not None:
                stack.callback(output.register_forward_hook(head).remove)
            loss = float(self._loss(self._model, text.batch))
            if output is None:
                result = self._model(**text.batch)
                found["logits"] = getattr(result, "logits", result).detach().float()
        return found, added, loss


@contextmanager
def _evaluated(model: torch.nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _stepped_by(optimizer: torch.optim.Optimizer) -> str:
    rates = dict.fromkeys(f"{group['lr']:g}" for group in optimizer.param_groups)
    return f"{type(optimizer).__name__} at {' and '.join(rates)}"
