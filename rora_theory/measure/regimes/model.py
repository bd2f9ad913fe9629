"""Regime of every module of a model, measured without training from a training batch and a held-out batch.

measured = measure.regime(model, train, held_out)
measured.crossings.query("optimizer == 'adam' and split == 'heldout'")[["module", "crossing_rank", "median"]]
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Bool

from rora_theory.lab.adapters.lora import PAPER_TARGETS
from rora_theory.lab.adapters.targets import full_name, matched
from rora_theory.lab.data.batches import Batch
from rora_theory.lab.llama import MODULES, LlamaConfig, Model
from rora_theory.measure import unseen
from rora_theory.measure.layers import drawn_steps
from rora_theory.measure.layers.layer_data import Layer
from rora_theory.measure.layers.model_layers import Recording, real_tokens, record
from rora_theory.measure.regimes import thin
from rora_theory.measure.regimes.module_regime import Regime, RegimeConfig, RegimeRows, measure_module
from rora_theory.measure.tokens import choose_tokens


@dataclass(frozen=True)
class RegimeCell:
    """Modules of one layer, which are measured together."""

    layer: int

    def __str__(self) -> str:
        """Return the label of the cell, as progress messages show it."""
        return f"layer {self.layer}"


@dataclass(frozen=True, eq=False)
class RecordedModules:
    """Inputs and output gradients of a model's modules at two batches, see `record_modules`.

    Attributes:
      train: Inputs and output gradients at the training batch.
      held_out: Inputs at the held-out batch.
      seen: Mask of the held-out tokens that repeat the beginning of a training record.
    """

    train: Recording
    held_out: Recording
    seen: Bool[np.ndarray, " tokens"]

    def measure(self, config: RegimeConfig, index: int, modules: Sequence[str]) -> RegimeRows:
        """Measure modules of one layer.

        Args:
          config: Settings of the measurement.
          index: Index of the layer.
          modules: Names of the modules.

        Returns:
          The rows of all modules for every table.

        Raises:
          InputError: If no held-out token is left.
        """
        return RegimeRows.concatenate([self._measure_module(config, index, module) for module in modules])

    def _measure_module(self, config: RegimeConfig, index: int, module: str) -> RegimeRows:
        name = full_name(index, module)
        inputs: dict[str, np.ndarray] = {}
        counts: dict[str, dict[str, int]] = {}
        for split, recording in (("train", self.train), ("heldout", self.held_out)):
            x = recording.inputs[module][index]
            # Sample tokens. At held-out ones, leave out those seen in training and the attention sinks.
            sample = choose_tokens(
                np.linalg.norm(x.astype(np.float64), axis=1),
                self.seen if config.mask and split == "heldout" else None,
                count=config.tokens,
                seed=config.seed,
                name=name,
            )
            inputs[split], counts[split] = x[sample.indices].astype(np.float32), sample.counts
        layer = Layer(name, self.train.gradient(module, index), inputs)
        # Adapters that are drawn and stepped, if requested, and the law.
        stepped = drawn_steps.measure_adapters(config, layer) if config.rows else {}
        draw_rows = partial(drawn_steps.draw_takeover_rows, config, layer)
        return measure_module(config, layer, index, draw_rows, stepped, counts)


def record_modules(
    params: dict[str, Any], config: LlamaConfig, train: Batch, held_out: Batch, modules: Sequence[str]
) -> RecordedModules:
    """Run two batches through a model and record what its modules receive.

    Args:
      params: Weights of the model.
      config: Configuration of the model.
      train: Batch that yields the gradient.
      held_out: Batch of other records.
      modules: Names from `rora_theory.lab.llama.MODULES`.

    Returns:
      The recorded inputs and output gradients.

    Raises:
      InputError: If a module is unknown or a loss is not finite.
    """
    return RecordedModules(
        record(params, config, train, modules),
        record(params, config, held_out, modules, gradients=False),
        unseen.mark_seen(held_out, [train])[real_tokens(held_out)],
    )


def modules_by_layer(
    config: LlamaConfig, target_modules: Sequence[str] | str = PAPER_TARGETS, layers: Sequence[int] | None = None
) -> dict[int, list[str]]:
    """Return the modules that PEFT's ``target_modules`` select, by layer.

    Args:
      config: Configuration of the model.
      target_modules: Target modules in PEFT's format.
      layers: Indices of the layers to include; None includes all.

    Raises:
      InputError: If `rora_theory.lab.adapters.targets.matched` refuses an argument.
    """
    modules: dict[int, list[str]] = {}
    for name in matched(config, target_modules, layers):
        modules.setdefault(int(name.split(".")[2]), []).append(name.split(".", 3)[3])
    return dict(sorted(modules.items()))


def distinct_names(modules: dict[int, list[str]]) -> list[str]:
    """Return the distinct module names of all layers, in the order of `rora_theory.lab.llama.MODULES`."""
    return [module for module in MODULES if any(module in names for names in modules.values())]


def regime(
    model: Model,
    train: Batch,
    held_out: Batch,
    config: RegimeConfig | None = None,
    *,
    target_modules: Sequence[str] | str = PAPER_TARGETS,
    layers: Sequence[int] | None = None,
) -> Regime:
    """Measure the regime of every target module of a model.

    If the result rests on too few tokens or layers, a warning and the frames' ``attrs`` say so, see `thin`.

    Args:
      model: Model loaded by `rora_theory.lab.llama.load`.
      train: Batch that yields the gradient.
      held_out: Batch of other records. Inputs are sampled at its tokens, without those that repeat the beginning of a
        record of ``train`` unless ``config.mask`` is false.
      config: Settings of the measurement; None is the default `RegimeConfig`.
      target_modules: Target modules in PEFT's format.
      layers: Indices of the layers to measure; None measures all.

    Returns:
      The measured regime.

    Raises:
      InputError: If a module or layer does not exist, a loss is not finite, or no held-out token is left.
    """
    modules = modules_by_layer(model.config, target_modules, layers)
    recorded = record_modules(model.params, model.config, train, held_out, distinct_names(modules))
    layer_rows = [recorded.measure(config or RegimeConfig(), index, names) for index, names in modules.items()]
    measured = Regime.from_rows(layer_rows, recorded.train.loss, recorded.held_out.loss)
    thin.warn(measured.files().values(), thin.regime_warnings(measured.crossings, model.config.num_hidden_layers))
    return measured
