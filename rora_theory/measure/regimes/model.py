"""The regime of every module of a model, from one batch and another that is held out; nothing is trained.

found = measure.regime(model, train, held_out)
found.crossings.query("optimizer == 'adam' and split == 'heldout'")[["module", "crossing_rank", "median"]]
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Bool

from rora_theory.adapters.lora import PAPER_TARGETS
from rora_theory.adapters.targets import full_name, matched
from rora_theory.data.batches import Batch
from rora_theory.llama import MODULES, LlamaConfig, Model
from rora_theory.measure import unseen
from rora_theory.measure.layers import drawn_steps
from rora_theory.measure.layers.layer_data import Layer
from rora_theory.measure.layers.model_layers import Recording, real_tokens, record
from rora_theory.measure.regimes import thin
from rora_theory.measure.regimes.module_regime import LayerRegime, ModuleRegime, Regime, RegimeConfig, measure_module
from rora_theory.measure.tokens import choose_tokens


@dataclass(frozen=True)
class RegimeCell:
    """The modules of one layer, which are measured together."""

    layer: int

    def __str__(self) -> str:
        return f"layer {self.layer}"


@dataclass(frozen=True, eq=False)
class Recorded:
    """A model's modules at two batches, see `record_modules`.

    Attributes:
      train, held_out: inputs, and of the training batch output gradients too.
      seen: which of the held-out tokens the training batch has with the same beginning.
    """

    train: Recording
    held_out: Recording
    seen: Bool[np.ndarray, " tokens"]

    def measure(self, config: RegimeConfig, index: int, modules: Sequence[str]) -> LayerRegime:
        """The modules of layer ``index``.

        Raises:
          InputError: no held-out token is left.
        """
        found = LayerRegime([], [], [], [])
        for module in modules:
            layer, tokens = self._layer(config, index, module)
            stepped = drawn_steps.measured(config, layer) if config.rows else {}
            lora_A = partial(drawn_steps.takeover_rows, config, layer)
            own: ModuleRegime = measure_module(config, layer, index, lora_A, stepped)
            for table, rows in zip(found, (*own, tokens), strict=True):
                table += rows
        return found

    def _layer(self, config: RegimeConfig, index: int, module: str) -> tuple[Layer, list[dict[str, Any]]]:
        name = full_name(index, module)
        inputs, tokens = {}, []
        for split, recording in (("train", self.train), ("heldout", self.held_out)):
            every = recording.inputs[module][index]
            found = choose_tokens(
                np.linalg.norm(every.astype(np.float64), axis=1),
                self.seen if config.mask and split == "heldout" else None,
                count=config.tokens,
                seed=config.seed,
                name=name,
            )
            inputs[split] = every[found.indices].astype(np.float32)
            tokens.append({"layer": index, "module": name, "split": split} | found.counts)
        return Layer(name, self.train.gradient(module, index), inputs), tokens


def record_modules(
    params: dict[str, Any], config: LlamaConfig, train: Batch, held_out: Batch, modules: Sequence[str]
) -> Recorded:
    """Run both batches through a model.

    Args:
      params, config: the model.
      train: the batch that gives the gradient.
      held_out: what modules are read at besides.
      modules: names of `rora_theory.llama.MODULES`.

    Raises:
      InputError: an unknown module, or a loss that is not finite.
    """
    return Recorded(
        record(params, config, train, modules),
        record(params, config, held_out, modules, gradients=False),
        unseen.seen(held_out, [train])[real_tokens(held_out)],
    )


def chosen_modules(
    config: LlamaConfig, target_modules: Sequence[str] | str = PAPER_TARGETS, layers: Sequence[int] | None = None
) -> dict[int, list[str]]:
    """The modules of every layer that PEFT's ``target_modules`` name.

    Raises:
      InputError: as `rora_theory.adapters.targets.matched`.
    """
    found: dict[int, list[str]] = {}
    for name in matched(config, target_modules, layers):
        found.setdefault(int(name.split(".")[2]), []).append(name.split(".", 3)[3])
    return dict(sorted(found.items()))


def kinds(modules: dict[int, list[str]]) -> list[str]:
    """Names of the modules of any layer, in the order of `rora_theory.llama.MODULES`."""
    return [module for module in MODULES if any(module in own for own in modules.values())]


def regime(
    model: Model,
    train: Batch,
    held_out: Batch,
    config: RegimeConfig | None = None,
    *,
    target_modules: Sequence[str] | str = PAPER_TARGETS,
    layers: Sequence[int] | None = None,
) -> Regime:
    """Measure every adapted module of a model.

    Where the result is thin, a warning and the frames' ``attrs`` say so, see `thin`.

    Args:
      model: of `rora_theory.llama.load`.
      train: the batch that gives the gradient.
      held_out: other records; of these the tokens that share nothing with ``train`` are read, unless the configuration
        says otherwise.
      config: what to measure; None is `RegimeConfig` as it stands.
      target_modules, layers: which modules, as PEFT names them.

    Raises:
      InputError: a module or layer that the model does not have, a loss that is not finite, no held-out token left.
    """
    modules = chosen_modules(model.config, target_modules, layers)
    recorded = record_modules(model.params, model.config, train, held_out, kinds(modules))
    parts = [recorded.measure(config or RegimeConfig(), index, own) for index, own in modules.items()]
    found = Regime.of(parts, recorded.train.loss, recorded.held_out.loss)
    thin.warn(found.files().values(), thin.of_regime(found.crossings, model.config.num_hidden_layers))
    return found
