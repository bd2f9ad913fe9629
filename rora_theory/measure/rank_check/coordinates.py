r"""The rank coordinate check: do an adapted model's first steps depend on the rank?

muP's coordinate check (Yang et al. 2022) trains models of several widths for a few steps and looks whether the size of
every activation stays put. Here the width is the rank: adapters of several ranks, nested (`toy.nested`), take
the same steps on the same batches, and the size of what each adapter adds is read on the batch that it learned from and
on one that it did not. A batch repeated in every step shows the coherent part alone, so held-out text is read too.

A scaling rule passes where the log-log slope against the rank is within a band of zero, seeds and all:

    checker = Checker(params, llama_config, width=max(ranks), target_modules=("q_proj", "v_proj"))
    table = check(checker, settings, batches, held_out, seeds=3, steps=(1, 2, 5, 10))
    table.assert_flat("output", split="train", step=1, module="self_attn.q_proj")
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from rora_theory.adapters.inits import LoraInit
from rora_theory.adapters.lora import PAPER_TARGETS, LoraAdapter, scalings
from rora_theory.advice.setting import Setting
from rora_theory.data.batches import Batch
from rora_theory.errors import InputError
from rora_theory.finetune.step import batch_loss
from rora_theory.llama import MODULES, LlamaConfig, hidden_states, output_matrix
from rora_theory.llama.model import Params
from rora_theory.measure.layers.model_layers import lora_of, read_step, take_step
from rora_theory.measure.rank_check.coordinate_table import BATCH_SPLITS, MODEL, BatchSplit, Coordinate
from rora_theory.optimizers import OptimizerName, make_optimizer
from rora_theory.toy import nested
from rora_theory.validation.rules import check_steps


class Checker:
    """A model with the compiled functions that every rank, rule, rate and seed of its check share.

    Adapters are padded to the largest rank with zeros, which is exact: padded rows get no gradient.

    Args:
      params: the base model's weights.
      llama_config: its configuration.
      width: the largest rank to come.
      target_modules: see `rora_theory.adapters.LoraConfig`.

    Raises:
      InputError: the width or the modules do not fit the model.
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
        widest = lora_of(Setting(width, alpha=1.0, learning_rate=1.0), target_modules)
        self._template = widest.build(jax.random.key(0), llama_config, params)
        self.modules = tuple(self._template.params)
        self._correlation = _correlation(params, llama_config)
        self._known: dict[bytes, Array] = {}

    def adapter(self, key: PRNGKeyArray, setting: Setting) -> LoraAdapter:
        """A fresh adapter, nested over ranks and padded to the checker's width.

        Raises:
          InputError: a rank above the width.
        """
        if setting.rank > self.width:
            raise InputError(f"rank is {setting.rank}; accepted is at most the checker's width, {self.width}")
        config = lora_of(setting, self.target_modules)
        like, relative = self._template.params, partial(nested.relative, setting.init, rank=setting.rank)
        deviations = {name: relative(p_in=tensors["lora_A"].shape[-1]) for name, tensors in like.items()}
        params = _fresh(key, like, setting.rank, deviations, init=setting.init)
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
        """Train one adapter and read its coordinates after each of ``steps``.

        Args:
          setting: the adapter and its training.
          key: of A; the same for every rank and rule that is to be compared.
          batch_of: the batch of step t = 0, 1, ...; one and the same for a fixed batch. Loss on all tokens.
          held_out: a batch that is never trained on.
          steps: numbers of updates, ascending from 1 or more.

        Yields:
          coordinates with their values; not finite where the run diverged.
        """
        check_steps(steps)
        adapter = self.adapter(key, setting)
        state = make_optimizer(setting.optimizer, setting.learning_rate).init(adapter.params)
        rate = jnp.float32(setting.learning_rate)
        for step in range(1, max(steps) + 1):
            batch = batch_of(step - 1)
            adapter, state, norms = _step(
                adapter, state, self.params, batch, rate, optimizer=setting.optimizer, llama_config=self.llama_config
            )
            if step in steps:
                yield from _named(norms, "train", step)
                for split, part in zip(BATCH_SPLITS, (batch, held_out), strict=True):
                    yield from _named(self._read(adapter, part, setting.rank, split), split, step)

    def _read(self, adapter: LoraAdapter, batch: Batch, rank: int, split: BatchSplit) -> dict[str, dict[str, Array]]:
        digest = np.asarray(batch.inputs).tobytes()
        if digest not in self._known:
            self._known[digest] = _base_hidden(self.params, batch.inputs, self.llama_config)
        before, size = self._known[digest], jnp.float32(rank)
        found = _read(adapter, self.params, batch, before, self._correlation, size, llama_config=self.llama_config)
        return found if split == "train" else {name: found[name] for name in found if name != "delta"}


@partial(jax.jit, static_argnames=("init",))
def _fresh(
    key: PRNGKeyArray, like: Params, rank: ArrayLike, relative: Mapping[str, ArrayLike], *, init: LoraInit
) -> Params:
    """Tensors of these shapes: A of the first ``rank`` rows, nested over ranks, zeros below them and for B."""
    fresh = {}
    for module, tensors in like.items():
        layers, width, p_in = tensors["lora_A"].shape
        one = jax.random.fold_in(key, MODULES.index(module))
        keys = jax.vmap(partial(jax.random.fold_in, one))(jnp.arange(layers))
        drawn = jax.vmap(partial(nested.rows, init=init, count=width, p_in=p_in))(keys)
        kept = jnp.arange(width)[:, None] < rank
        fresh[module] = {
            "lora_A": jnp.where(kept, relative[module] * drawn, 0.0),
            "lora_B": jnp.zeros_like(tensors["lora_B"]),
        }
    return fresh


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
    """One update, and the norms of its gradients by module."""
    stepped, state, gradients = take_step(
        adapter, state, base, batch, config=llama_config, transformation=make_optimizer(optimizer, rate)
    )
    norms = {
        f"grad_{factor}": {name: _size(tensors[f"lora_{factor}"]) for name, tensors in gradients.items()}
        for factor in ("A", "B")
    }
    return stepped, state, norms


@partial(jax.jit, static_argnames=("llama_config",))
def _read(
    adapter: LoraAdapter,
    base: Params,
    batch: Batch,
    before: Array,
    correlation: Array,
    rank: Array,
    *,
    llama_config: LlamaConfig,
) -> dict[str, dict[str, Array]]:
    """Coordinates of one adapter on one batch, by quantity and module."""
    hidden, inputs = hidden_states(base, batch.inputs, llama_config, adapter, capture=tuple(adapter.params))
    real = (batch.weights > 0).astype(jnp.float32)[:, :, None]
    tokens = jnp.sum(real)

    def square_sum(values: Float[Array, "b s n"]) -> Float[Array, ""]:
        return jnp.sum(real * values**2)

    found: dict[str, dict[str, Array]] = {"output": {}, "inner": {}, "delta": {}}
    for name, squares in read_step(adapter, inputs, square_sum).items():
        adapted = (adapter.scaling[name] > 0).astype(jnp.float32)
        layers, p_out = jnp.sum(adapted), adapter.params[name]["lora_B"].shape[1]
        output, inner, delta = (jnp.sum(adapted * each) for each in squares)
        found["output"][name] = jnp.sqrt(output / (layers * tokens * p_out))
        found["inner"][name] = jnp.sqrt(inner / (layers * tokens * rank))
        found["delta"][name] = jnp.sqrt(delta / layers)
    moved = (hidden.astype(jnp.float32) - before) * real
    # The logits are linear in the hidden state: their mean square is a quadratic form in its change.
    logits = jnp.einsum("bsd,de,bse->", moved, correlation, moved)
    found["hidden"] = {MODEL: jnp.sqrt(jnp.sum(moved**2) / (tokens * moved.shape[-1]))}
    found["logits"] = {MODEL: jnp.sqrt(logits / tokens)}
    found["loss"] = {MODEL: batch_loss(base, batch, llama_config, adapter) / tokens}
    return found


@partial(jax.jit, static_argnames=("llama_config",))
def _base_hidden(base: Params, tokens: Array, llama_config: LlamaConfig) -> Array:
    return hidden_states(base, tokens, llama_config).astype(jnp.float32)


@partial(jax.jit, static_argnames=("llama_config",))
def _correlation(base: Params, llama_config: LlamaConfig) -> Float[Array, "d d"]:
    """E^T E / V of the unembedding E."""
    head = output_matrix(base, llama_config)
    return jnp.einsum("vd,ve->de", head, head, preferred_element_type=jnp.float32) / head.shape[0]


def _named(found: dict[str, dict[str, Array]], split: str, step: int) -> Iterator[tuple[Coordinate, float]]:
    for quantity, by_module in found.items():
        for module, value in by_module.items():
            yield Coordinate(quantity, split, module, step), float(value)


def _size(a: Array) -> Array:
    return jnp.sqrt(jnp.sum(a**2))
