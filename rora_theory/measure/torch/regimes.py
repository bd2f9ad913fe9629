"""The regime of every linear module of a PyTorch model, from one batch and another that is held out.

    found = regime(model, batch, held_out, target_modules=["q_proj", "v_proj"])
    found.crossings.query("optimizer == 'adam' and split == 'heldout'")[["module", "crossing_rank", "linear_term"]]
    config, learning_rate, advice = found.transfer(Setting(16, 32, 2e-4), rank=128)

Nothing is trained and nothing of the model changes.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from peft import LoraConfig

from rora_theory import inits
from rora_theory.advice.setting import Setting, check_setting
from rora_theory.advice.transfer import Advice, Per, transfer
from rora_theory.errors import InputError, shown
from rora_theory.inits import Init
from rora_theory.measure.layers.layer_data import SPLITS, Layer, Split
from rora_theory.measure.regimes import module_regime, thin
from rora_theory.measure.regimes.module_regime import TAKEOVER_ROWS, LayerRegime, Regime, RegimeConfig
from rora_theory.measure.tokens import choose_tokens
from rora_theory.measure.torch import hooks
from rora_theory.measure.torch import progress as progress_bars
from rora_theory.measure.torch.batches import (
    Batch,
    Loss,
    Tokens,
    TokensByShape,
    moved,
    plain_loss,
    tokens,
    tokens_of,
)
from rora_theory.measure.torch.modules import (
    adapted_targets,
    base_model,
    chosen,
    is_prompt_learning,
    layer_index,
    linear_size,
    task_type,
    unchanged,
    unwrapped,
    with_autograd,
    without_adapters,
)
from rora_theory.optimizers import FAMILY
from rora_theory.random import seeds
from rora_theory.scaling import Rule
from rora_theory.theory.laws import Optimizer

DEFAULT = RegimeConfig(ranks=(8, 128), rows=0)
"""No adapter is stepped. Where exact, the step's size is predicted at two ranks: Adam's epsilon makes each a law of its
own."""

RETURNS = "returns a"
"""How `TorchRegime.left_out` describes a module that does not return a tensor."""

CALIBRATION = 256
"""Inputs and outputs of the random module that is measured to estimate how long the others take."""

Draw = Callable[[RegimeConfig, Layer, Init], Float[np.ndarray, "rows p_in"]]


class Transfer(NamedTuple):
    """What to train with at another rank.

    Attributes:
      config: PEFT's.
      learning_rate: to go with it.
      advice: what both come from; ``advice.sentence()`` says for how long they hold.
    """

    config: LoraConfig
    learning_rate: float
    advice: Advice


@dataclass(frozen=True, eq=False)
class TorchRegime(Regime):
    """What `regime` found: the frames of `Regime`, and what the model is to PEFT.

    Attributes:
      target_modules, task_type: for PEFT's ``LoraConfig``.
      left_out: modules that were not measured, and why: no held-out token or no gradient reached them, or they return
        no tensor (``"returns a tuple"``), so that neither this law nor PEFT's LoRA covers them.
      unmasked: modules that are run on tokens in an order of their own (experts, patches of images), so that padding
        and what was seen could not be left out of them.
    """

    target_modules: str | list[str]
    task_type: str | None
    left_out: dict[str, str]
    unmasked: tuple[str, ...]

    def linear_terms(
        self,
        optimizer: Optimizer = "adam",
        init: Init = "kaiming_uniform",
        split: Split = "heldout",
    ) -> dict[str, float]:
        """The linear term of every module, which carries a setting (`rora_theory.advice.transfer`).

        Raises:
          InputError: they were not measured for this optimizer and init.
        """
        rows = self.crossings_of(optimizer, init, split)
        return dict(zip(rows["module"], rows["linear_term"].astype(float), strict=True))

    def takeover_at(self, rank: int, init: Init = "kaiming_uniform") -> float:
        """The distance at which A leads under Adam: the geometric mean over modules, held out, at the nearest rank that
        was measured.

        Raises:
          InputError: it was not measured for this init.
        """
        own = self.takeover[(self.takeover["init"] == init) & (self.takeover["split"] == "heldout")]
        if own.empty:
            raise InputError(
                f"no takeover distance was measured of init {shown(init)}; accepted is what the RegimeConfig named, "
                "with the optimizer adam"
            )
        nearest = min(own["rank"].unique(), key=lambda each: abs(np.log(each / rank)))
        return float(geometric_mean(own.loc[own["rank"] == nearest, "takeover"]))

    def transfer(
        self,
        setting: Setting,
        rank: int = 128,
        *,
        regime: Literal["measured", "signal"] = "signal",
        rule: Rule | None = None,
        alpha: float | None = None,
        steps: int | None = None,
        per: Per = "type",
        split: Split = "heldout",
    ) -> Transfer:
        """Carry a tuned setting to another rank of this model.

        Args:
          setting: what was tuned.
          rank: the new one.
          regime: ``"signal"`` keeps the whole model's change, in which cross-talk averages out over modules at ranks
            below their crossing ranks too, and covers later steps; `coordinate_check` tests it. ``"measured"`` keeps
            the rms of each module's own first step.
          rule, alpha: of the new setting, see `rora_theory.transfer`.
          steps: of the planned run, under Adam and with the regime ``"signal"``: the answer is then the law's at their
            end, with the takeover distance that was measured.
          per: which modules share an alpha.
          split: tokens that are meant by measured.

        Raises:
          InputError: an optimizer or init that was not measured, or as `rora_theory.transfer`.
        """
        check_setting("setting", setting)
        family = FAMILY[setting.optimizer]
        terms = self.linear_terms(family, setting.init, split)
        takeover = None if steps is None or family != "adam" else self.takeover_at(setting.rank, setting.init)
        told: Any = terms if regime == "measured" else regime
        advice = transfer(setting, rank, told, rule=rule, alpha=alpha, steps=steps, takeover=takeover)
        unsupported = [name for name, reason in self.left_out.items() if reason.startswith(RETURNS)]
        config: Any = LoraConfig(
            task_type=self.task_type,
            target_modules=self.target_modules,
            exclude_modules=unsupported or None,
            **advice.lora_arguments(per),
        )
        return Transfer(config, advice.learning_rate, advice)


def regime(
    model: torch.nn.Module,
    batch: Batch,
    held_out: Batch,
    target_modules: Sequence[str] | str | None = None,
    loss: Loss | None = None,
    config: RegimeConfig | None = None,
    *,
    layers: Sequence[int] | None = None,
    adapters: Literal["off", "on"] = "off",
    lora_A: Draw | None = None,
    progress: bool = False,
) -> TorchRegime:
    """Measure every module that would be adapted, in the model's own process, dtype and device.

    One forward pass of ``held_out`` keeps ``config.tokens`` inputs of every module, on the host. One forward and one
    backward pass of ``batch`` forms the gradient of one module after the other and reduces it at once on the host, to
    the accuracy of `Regime.errors` (``config.exact``: in float64). Beyond what the passes of a fine-tuning step take,
    the device holds one module's gradient at a time. Passes are made in the mode (training or evaluation) in which the
    model is. The generators of random numbers and the model's buffers are restored.

    Args:
      model: any module; of a PEFT model the base is measured. Bare, in `DistributedDataParallel`, spread by
        ``device_map``, with gradient checkpointing, in bfloat16, or quantised by bitsandbytes.
      batch: gives the gradient; what the model takes, with labels.
      held_out: other records, of which the tokens that share nothing with ``batch`` are read (see
        `rora_theory.measure.tokens`), unless the configuration says otherwise.
      target_modules: as PEFT takes them; None is what PEFT adapts already, or every linear module but the head.
      loss: of the model and a batch; None is ``model(**batch).loss``.
      config: what to measure; None is `DEFAULT`. Where ``rows`` is above 0 adapters are stepped too, by JAX.
      layers: the first number in a module's name is one of these; a few layers tell the others' in less time.
      adapters: whether PEFT's adapters are ``"off"``, or ``"on"`` as in a later step of a run: the gradient is then
        that of the adapted model, and the law that of a fresh adapter put on it.
      lora_A: draws the rows on which takeover distances rest; None draws them with NumPy.
      progress: Whether to show transformers' progress bar, which states the estimated cost before it starts.

    Where the result is thin, a warning and the frames' ``attrs`` say so, see `rora_theory.measure.regimes.thin`.

    Raises:
      InputError: a module that the model does not have, a batch without labels, a loss that is not finite, no held-out
        token left, two batches that run the modules differently, a learned prompt that is to stay active, weights that
        were created within ``torch.inference_mode``.
    """
    config = config or DEFAULT
    model = unwrapped(model)
    base = base_model(model)
    modules = chosen(base, target_modules, layers)
    take = plain_loss if loss is None else loss
    if is_prompt_learning(model):
        if adapters == "on":
            raise InputError("adapters must be 'off' for a model with a learned prompt, got 'on'")
        model = base  # the prompt lies outside the base model
    sizes = {name: linear_size(module) for name, module in modules.items()}
    described = f"Measuring {len(modules)} modules" + (_cost(config, sum(sizes.values())) if progress else "")
    bar = progress_bars.bar(sum(sizes.values()), description=described, unit=" weights", shown=progress)
    with bar, with_autograd(), unchanged(model), ExitStack() as stack:
        if adapters == "off":
            stack.enter_context(without_adapters(model))
        batch, held_out = moved(batch, base), moved(held_out, base)
        reading = _Reading(config, tokens(base, held_out, batch), config.mask)
        held_out_loss, unsupported = hooks.read_modules(modules, lambda: float(take(model, held_out)), reading.keep)
        reached = {name: module for name, module in modules.items() if name in reading.calls}
        left_out = {name: "no held-out token" for name in modules if name not in reached}
        left_out |= {name: f"{RETURNS} {output}" for name, output in unsupported.items() if name not in reached}
        if unsupported and not reached:
            name, reason = next((name, left_out[name]) for name in unsupported)
            raise InputError(f"none of {len(modules)} target modules can be measured; {name}: {reason}")
        training = _Reducing(config, tokens(base, batch), reading, lora_A or _drawn)

        def use(name: str, grad: torch.Tensor, every: list[hooks.Inputs]) -> None:
            training.use(name, grad, every)
            bar.update(sizes[name])

        value = hooks.backward(model, reached, lambda: take(model, batch), reading.calls, use)
    left_out |= {name: "no gradient" for name in reached if name not in training.found}
    if not training.found:
        raise InputError("no gradient reaches a target module; accepted are modules that the loss depends on")
    found = [training.found[name] for name in modules if name in training.found]
    frames = Regime.of(found, value, held_out_loss)
    every = modules if layers is None else chosen(base, target_modules)
    words = thin.of_regime(frames.crossings, len({layer_index(name) for name in every}))
    thin.warn(frames.files().values(), words)
    targets = adapted_targets(model) if target_modules is None else target_modules
    return TorchRegime(
        **vars(frames),
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type=task_type(base),
        left_out=left_out,
        unmasked=tuple(name for name in modules if name in reading.unmasked),
    )


class _Reading:
    """Inputs of modules at the held-out tokens that count: of all calls of a module in a pass, each token alike."""

    def __init__(self, config: RegimeConfig, known: TokensByShape, mask: bool) -> None:
        self._config, self._known, self._mask = config, known, mask
        self.inputs: dict[str, np.ndarray] = {}
        self.counts: dict[str, dict[str, int]] = {}
        self.calls: dict[str, int] = {}
        self.unmasked: set[str] = set()
        self._keys: dict[str, np.ndarray] = {}

    def keep(self, name: str, x: hooks.Inputs) -> None:
        own = tokens_of(self._known, x)
        x = x.reshape(-1, x.shape[-1])
        if not len(x):
            return
        if own is None:
            self.unmasked.add(name)
            own = Tokens(np.ones(len(x), bool), np.zeros(len(x), bool))
        real = np.flatnonzero(own.real)
        norms = torch.linalg.vector_norm(x.float(), dim=1).cpu().numpy()[real]
        seen = own.seen[real] if self._mask else None
        call, count = self.calls.get(name, 0), self._config.tokens
        seed = [self._config.seed, call] if call else self._config.seed
        found = choose_tokens(norms, seen, count=count, seed=seed, name=name)
        rows = _host(x[torch.from_numpy(real[found.indices]).to(x.device)])
        keys = _smallest_keys(found.counts, [self._config.seed, call, 1])
        if call:
            rows, keys = np.concatenate([self.inputs[name], rows]), np.concatenate([self._keys[name], keys])
        kept = np.sort(np.argsort(keys)[:count])
        self.inputs[name], self._keys[name] = rows[kept], keys[kept]
        before = self.counts.get(name, dict.fromkeys(found.counts, 0))
        self.counts[name] = {key: own + before[key] for key, own in found.counts.items()} | {"read": len(kept)}
        self.calls[name] = call + 1


class _Reducing:
    """Each module's gradient made into rows of frames."""

    def __init__(self, config: RegimeConfig, known: TokensByShape, reading: _Reading, draw: Draw) -> None:
        self._config, self._known, self._reading, self._draw = config, known, reading, draw
        self.found: dict[str, LayerRegime] = {}

    def use(self, name: str, grad: torch.Tensor, every: list[hooks.Inputs]) -> None:
        config, index = self._config, layer_index(name)
        if not bool(grad.any()):
            return
        read = _Reading(config, self._known, mask=False)
        for x in every:
            read.keep(name, x)
        inputs = {"train": read.inputs[name], "heldout": self._reading.inputs[name]}
        layer = Layer(name, _host(grad), inputs)
        stepped: dict[tuple, dict[str, Any]] = {}
        if config.rows:
            from rora_theory.measure.layers import drawn_steps

            stepped = drawn_steps.measured(config, layer)
        own = module_regime.measure_module(config, layer, index, lambda init: self._draw(config, layer, init), stepped)
        rows = [
            {"layer": index, "module": name, "split": split} | counts
            for split, counts in (("train", read.counts[name]), ("heldout", self._reading.counts[name]))
        ]
        self.found[name] = LayerRegime(*own, rows)


def _cost(config: RegimeConfig, weights: int) -> str:
    """State what a measurement costs, from the time that a small module takes on this machine."""
    random = np.random.default_rng(0)
    inputs: dict[str, np.ndarray] = {split: random.standard_normal((config.tokens, CALIBRATION)) for split in SPLITS}
    layer = Layer("calibration", random.standard_normal((CALIBRATION, CALIBRATION)), inputs)

    def measure() -> None:
        module_regime.measure_module(config, layer, 0, lambda init: _drawn(config, layer, init))

    law = progress_bars.seconds_of(measure) * weights / CALIBRATION**2
    stepped = ", beside the adapters to step" if config.rows else ""
    return f" (two forward passes, one backward pass, and about {progress_bars.in_words(law)} on the host{stepped})"


def _smallest_keys(counts: Mapping[str, int], seed: list[int]) -> Float[np.ndarray, " read"]:
    """Keys of the tokens that `choose_tokens` read, were each that it could read given one of U(0, 1) and the smallest
    taken: the smallest over several calls are then a fair sample of all their tokens."""
    random = np.random.default_rng(seed)
    keys = random.random(counts["all"] - counts["seen"] - counts["sinks"])
    return random.permutation(np.sort(keys)[: counts["read"]])


def _drawn(config: RegimeConfig, layer: Layer, init: Init) -> Float[np.ndarray, "rows p_in"]:
    random = np.random.default_rng([config.seed, seeds.of_name(f"{layer.name} {init} takeover")])
    return inits.draw(random, init, rank=TAKEOVER_ROWS, p_in=layer.grad.shape[1])


def _host(x: torch.Tensor) -> np.ndarray:
    return x.detach().float().cpu().numpy()
