r"""Rank coordinate check of a LLaMA model: test whether its first steps depend on the rank.

The coordinate check of muP (Yang et al. 2022) trains models of several widths for a few steps and tests whether the
size of each activation depends on the width. Here the width is the rank. Nested adapters of several ranks
(`random.nested`) take the same steps on the same batches, and the size of each adapter's output is measured on the
training batch and on a held-out batch. The held-out batch is needed because a batch that repeats in every step shows
the coherent part of the change only.

    checker = Checker(params, llama_config, width=max(ranks), target_modules=("q_proj", "v_proj"))
    sizes = checker.run(setting, key, batch_of, held_out, steps=(1, 2, 5, 10))

`rora_theory.measure.rank_check` runs it for several rules, ranks and seeds and fits the slopes against the rank.

References:
  Yang et al. (2022), Tensor Programs V: Tuning Large Neural Networks via Zero-Shot Hyperparameter Transfer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from rora_theory.advice.setting import Setting
from rora_theory.errors import InputError
from rora_theory.lab.adapters.inits import LoraInit
from rora_theory.lab.adapters.lora import PAPER_TARGETS, LoraAdapter, scalings
from rora_theory.lab.data.batches import Batch
from rora_theory.lab.finetune.step import batch_loss
from rora_theory.lab.llama import MODULES, LlamaConfig, hidden_states, output_matrix
from rora_theory.lab.llama.model import Params
from rora_theory.laws.random import nested
from rora_theory.measure.layers.model_layers import lora_config_for, measure_adapter, take_step
from rora_theory.measure.rank_check.coordinate_table import BATCH_SPLITS, MODEL, BatchSplit, Coordinate
from rora_theory.optimizers import OptimizerName, make_optimizer
from rora_theory.validation.rules import check_steps


class Checker:
    """Model with compiled functions that all ranks, rules, rates and seeds of a check share.

    Adapters are padded with zeros to the largest rank. The padding is exact, because padded rows get no gradient.

    Args:
      params: Weights of the base model.
      llama_config: Configuration of the base model.
      width: Largest rank of the check.
      target_modules: Target modules, see `rora_theory.lab.adapters.LoraConfig`.

    Raises:
      InputError: If the width or the target modules do not fit the model.
    """

    def __init__(
        self,
        params: Params,
        llama_config: LlamaConfig,
        *,
        width: int,
        target_modules: Sequence[str] | str = PAPER_TARGETS,
    ) -> None:
        self.params, self.llama_config, self.width, self.target_modules = params, llama_config, width, target_modules
        widest = lora_config_for(Setting(width, alpha=1.0, learning_rate=1.0), target_modules)
        self._template = widest.build(jax.random.key(0), llama_config, params)
        self.modules = tuple(self._template.params)
        self._correlation = _unembedding_correlation(params, llama_config)
        self._base_hidden: dict[bytes, Array] = {}

    def adapter(self, key: PRNGKeyArray, setting: Setting) -> LoraAdapter:
        """Create a fresh adapter, nested over ranks and padded to the checker's width.

        Args:
          key: Random key of A.
          setting: Rank, scaling and initialisation of the adapter.

        Returns:
          The adapter, with B = 0 and zeros in the rows of A beyond the rank.

        Raises:
          InputError: If the rank exceeds the width.
        """
        if setting.rank > self.width:
            raise InputError(f"rank must be at most the width of the Checker, {self.width}, got {setting.rank}")
        config = lora_config_for(setting, self.target_modules)
        # Rows are shared by all ranks; the standard deviation of A's entries may depend on the rank.
        template = self._template.params
        deviations = {
            name: nested.relative_deviation(setting.init, rank=setting.rank, p_in=tensors["lora_A"].shape[-1])
            for name, tensors in template.items()
        }
        params = _init_nested(key, template, setting.rank, deviations, init=setting.init)
        return replace(self._template, params=params, scaling=scalings(config, config.targets(self.llama_config)))

    def run(
        self,
        setting: Setting,
        key: PRNGKeyArray,
        batch_of: Callable[[int], Batch],
        held_out: Batch,
        *,
        steps: Sequence[int],
    ) -> Iterator[tuple[Coordinate, float]]:
        """Train one adapter and measure its coordinates after each of ``steps``.

        Args:
          setting: Adapter and training settings.
          key: Random key of A; use the same for all ranks and rules to compare.
          batch_of: Function that returns the batch of step t = 0, 1, ..., with the loss on all tokens.
          held_out: Batch that is never trained on.
          steps: Numbers of updates after which to measure, in ascending order from 1 or more.

        Yields:
          Coordinates with their sizes, which are not finite if training diverged.
        """
        check_steps(steps)
        adapter = self.adapter(key, setting)
        state = make_optimizer(setting.optimizer, setting.learning_rate).init(adapter.params)
        # The rate is a dynamic argument: the step is compiled once for all rates.
        rate = jnp.float32(setting.learning_rate)
        for step in range(1, max(steps) + 1):
            # The norms of the gradients come with the step, the other sizes from forward passes after it.
            batch = batch_of(step - 1)
            adapter, state, norms = _step(
                adapter, state, self.params, batch, rate, optimizer=setting.optimizer, llama_config=self.llama_config
            )
            if step in steps:
                yield from _coordinates(norms, "train", step)
                for split, split_batch in zip(BATCH_SPLITS, (batch, held_out), strict=True):
                    yield from _coordinates(self._measure(adapter, split_batch, setting.rank, split), split, step)

    def _measure(self, adapter: LoraAdapter, batch: Batch, rank: int, split: BatchSplit) -> dict[str, dict[str, Array]]:
        # The base model's hidden states depend on the batch alone: compute them once.
        token_bytes = np.asarray(batch.inputs).tobytes()
        if token_bytes not in self._base_hidden:
            self._base_hidden[token_bytes] = _hidden_states(self.params, batch.inputs, self.llama_config)
        before, size = self._base_hidden[token_bytes], jnp.float32(rank)
        sizes = _measure(adapter, self.params, batch, before, self._correlation, size, llama_config=self.llama_config)
        # |gamma B A| does not depend on the batch: report it once.
        return sizes if split == "train" else {name: sizes[name] for name in sizes if name != "delta"}


@partial(jax.jit, static_argnames=("init",))
def _init_nested(
    key: PRNGKeyArray, template: Params, rank: ArrayLike, relative: Mapping[str, ArrayLike], *, init: LoraInit
) -> Params:
    """Draw adapter tensors of the template's shapes, with ``rank`` nested rows of A, and zeros elsewhere."""
    params = {}
    for module, tensors in template.items():
        layers, width, p_in = tensors["lora_A"].shape
        # One key for each module and layer, whatever the rank: a smaller rank has the first rows of a larger one.
        module_key = jax.random.fold_in(key, MODULES.index(module))
        keys = jax.vmap(partial(jax.random.fold_in, module_key))(jnp.arange(layers))
        rows = jax.vmap(partial(nested.rows, init=init, count=width, p_in=p_in))(keys)
        is_used = jnp.arange(width)[:, None] < rank
        params[module] = {
            "lora_A": jnp.where(is_used, relative[module] * rows, 0.0),
            "lora_B": jnp.zeros_like(tensors["lora_B"]),
        }
    return params


@partial(jax.jit, static_argnames=("optimizer", "llama_config"), donate_argnames=("adapter", "state"))
def _step(
    adapter: LoraAdapter,
    state: Any,
    base: Params,
    batch: Batch,
    rate: Array,
    *,
    optimizer: OptimizerName,
    llama_config: LlamaConfig,
) -> tuple[LoraAdapter, Any, dict[str, dict[str, Array]]]:
    """Apply one update, and return the norms of its gradients by module."""
    stepped, state, gradients = take_step(
        adapter, state, base, batch, config=llama_config, transformation=make_optimizer(optimizer, rate)
    )
    norms = {
        f"grad_{factor}": {name: _norm(tensors[f"lora_{factor}"]) for name, tensors in gradients.items()}
        for factor in ("A", "B")
    }
    return stepped, state, norms


@partial(jax.jit, static_argnames=("llama_config",))
def _measure(
    adapter: LoraAdapter,
    base: Params,
    batch: Batch,
    before: Array,
    correlation: Array,
    rank: Array,
    *,
    llama_config: LlamaConfig,
) -> dict[str, dict[str, Array]]:
    """Compute the coordinates of one adapter on one batch, by quantity and module."""
    # Forward pass of the adapted model, which captures the inputs of the adapted modules.
    hidden, inputs = hidden_states(base, batch.inputs, llama_config, adapter, capture=tuple(adapter.params))
    is_target = (batch.weights > 0).astype(jnp.float32)[:, :, None]
    tokens = jnp.sum(is_target)

    def square_sum(values: Float[Array, "b s n"]) -> Float[Array, ""]:
        return jnp.sum(is_target * values**2)

    # Root mean squares of each module over its adapted layers; layers without an adapter have the scaling 0.
    sizes: dict[str, dict[str, Array]] = {"output": {}, "inner": {}, "delta": {}}
    for name, squares in measure_adapter(adapter, inputs, square_sum).items():
        is_adapted = (adapter.scaling[name] > 0).astype(jnp.float32)
        layers, p_out = jnp.sum(is_adapted), adapter.params[name]["lora_B"].shape[1]
        output, inner, delta = (jnp.sum(is_adapted * by_layer) for by_layer in squares)
        # Divide by the number of values, to compare modules and ranks of any size.
        sizes["output"][name] = jnp.sqrt(output / (layers * tokens * p_out))
        sizes["inner"][name] = jnp.sqrt(inner / (layers * tokens * rank))
        sizes["delta"][name] = jnp.sqrt(delta / layers)
    # Logits are linear in the hidden state, so their mean square change is a quadratic form: no logits are computed.
    change = (hidden.astype(jnp.float32) - before) * is_target
    logit_squares = jnp.einsum("bsd,de,bse->", change, correlation, change)
    sizes["hidden"] = {MODEL: jnp.sqrt(jnp.sum(change**2) / (tokens * change.shape[-1]))}
    sizes["logits"] = {MODEL: jnp.sqrt(logit_squares / tokens)}
    sizes["loss"] = {MODEL: batch_loss(base, batch, llama_config, adapter) / tokens}
    return sizes


@partial(jax.jit, static_argnames=("llama_config",))
def _hidden_states(base: Params, tokens: Array, llama_config: LlamaConfig) -> Array:
    return hidden_states(base, tokens, llama_config).astype(jnp.float32)


@partial(jax.jit, static_argnames=("llama_config",))
def _unembedding_correlation(base: Params, llama_config: LlamaConfig) -> Float[Array, "d d"]:
    """Compute E^T E / V for the unembedding E of a vocabulary of size V."""
    head = output_matrix(base, llama_config)
    return jnp.einsum("vd,ve->de", head, head, preferred_element_type=jnp.float32) / head.shape[0]


def _coordinates(sizes: dict[str, dict[str, Array]], split: str, step: int) -> Iterator[tuple[Coordinate, float]]:
    for quantity, by_module in sizes.items():
        for module, value in by_module.items():
            yield Coordinate(quantity, split, module, step), float(value)


def _norm(a: Array) -> Array:
    return jnp.sqrt(jnp.sum(a**2))
