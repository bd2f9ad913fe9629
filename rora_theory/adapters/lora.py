r"""Low-rank adapters of a LLaMA model's linear modules: LoRA and RoRA, which differ in gamma alone, and DoRA.

.. math:: y = W x + \gamma B A\, x_d + b, \qquad \gamma = \alpha / r^\kappa

A is [rank, p_in], B is [p_out, rank], :math:`x_d` is x after dropout (Hu et al. 2021). gamma comes from
`rora_theory.scaling.scaling_factor`, is carried by the adapter, and is what training, merging and export use.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, PRNGKeyArray

from rora_theory.adapters import dora
from rora_theory.adapters.base import AdaptedModule, Norms, with_weights
from rora_theory.adapters.dropout import dropout
from rora_theory.adapters.inits import LORA_INITS, LoraInit, init_a
from rora_theory.adapters.targets import Target, layer_text, resolve
from rora_theory.adapters.widen import widen
from rora_theory.advice.lora_config import PAPER_TARGETS
from rora_theory.errors import InputError
from rora_theory.llama import MODULES, LlamaConfig, linear
from rora_theory.llama.model import PRODUCT, Params
from rora_theory.llama.quantised import dense
from rora_theory.scaling import Rule, is_finite, scaling_factor


@dataclass(frozen=True)
class LoraConfig:
    """Settings of a LoRA, RoRA or DoRA adapter. Frozen and hashable; mappings are kept as tuples of pairs.

    Attributes:
      rank: r, at least 1 and at most each adapted module's min(p_out, p_in).
      alpha: > 0, any float.
      rule: how gamma depends on rank, see `rora_theory.scaling.scaling_factor`.
      target_modules: names of modules, a regular expression for full names, or ``"all-linear"``; see
        `targets.resolve`.
      dropout: probability in [0, 1) of dropping an input element of the adapter's branch, in training.
      init: law of lora_A, see `inits.init_a`. lora_B starts at zero.
      rank_pattern, alpha_pattern: ``{pattern: value}`` by module and layer as PEFT matches them.
      layers: indices of the layers to adapt; None is all.
      use_dora: train the row norms apart, see `dora`.

    Raises:
      InputError: a value outside these ranges. What depends on the model is checked when there is one.
    """

    rank: int
    alpha: float | int
    rule: Rule = "rora"
    target_modules: Sequence[str] | str = PAPER_TARGETS
    dropout: float | int = 0.0
    init: LoraInit = "kaiming_uniform"
    rank_pattern: Mapping[str, int] | Sequence[tuple[str, int]] = ()
    alpha_pattern: Mapping[str, float | int] | Sequence[tuple[str, float | int]] = ()
    layers: Sequence[int] | None = None
    use_dora: bool = False

    mergeable: ClassVar[bool] = True
    replaces: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha", _as_float(self.alpha))
        object.__setattr__(self, "dropout", _as_float(self.dropout))
        scaling_factor(self.rule, alpha=self.alpha, rank=self.rank)
        if not isinstance(self.dropout, float) or not 0 <= self.dropout < 1:
            raise InputError(f"dropout is {self.dropout!r}; accepted is a number from 0 to below 1")
        if self.init not in LORA_INITS:
            raise InputError(f"init is {self.init!r}; accepted are {', '.join(LORA_INITS)}")
        if not isinstance(self.target_modules, str):
            object.__setattr__(self, "target_modules", tuple(self.target_modules))
        for name in ("rank_pattern", "alpha_pattern"):
            pattern = getattr(self, name)
            pairs = pattern.items() if isinstance(pattern, Mapping) else pattern
            convert = _as_float if name == "alpha_pattern" else (lambda value: value)
            object.__setattr__(self, name, tuple((key, convert(value)) for key, value in pairs))
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(sorted(set(self.layers))))

    def targets(self, llama_config: LlamaConfig, *, bounded: bool = True) -> tuple[Target, ...]:
        """The adapted modules of a model. Raises as `targets.resolve`."""
        return resolve(
            llama_config,
            rank=self.rank,
            alpha=self.alpha,
            target_modules=self.target_modules,
            layers=self.layers,
            rank_pattern=dict(self.rank_pattern),
            alpha_pattern=dict(self.alpha_pattern),
            bounded=bounded,
        )

    def table(self, llama_config: LlamaConfig) -> tuple[AdaptedModule, ...]:
        """See `base.table`."""
        return _rows(self, self.targets(llama_config))

    def build(self, key: PRNGKeyArray, llama_config: LlamaConfig, params: Params) -> "LoraAdapter":
        """A fresh adapter, see `base.init`: A random, B zero, DoRA's magnitude the row norms of W."""
        tensors = {}
        targets = self.targets(llama_config)
        for target in targets:
            p_out, p_in = llama_config.module_shape(target.module)
            own = jax.random.fold_in(key, MODULES.index(target.module))
            tensors[target.module] = {
                "lora_A": init_a(own, self.init, target.ranks, target.width, p_in),
                "lora_B": jnp.zeros((len(target.ranks), p_out, target.width), jnp.float32),
            }
            if self.use_dora:
                weight = params["layers"][target.module]["weight"]
                tensors[target.module]["lora_magnitude_vector"] = _row_norms(weight)
        return assemble_lora(self, targets, tensors)


@jax.jit
def _row_norms(weight: Any) -> Float[Array, "layers p_out"]:
    """Of every layer's weight, one layer dense at a time."""
    return jax.lax.map(lambda w: jnp.linalg.norm(dense(w).astype(jnp.float32), axis=1), weight)


@partial(jax.tree_util.register_dataclass, data_fields=["params", "scaling"], meta_fields=["config", "targets"])
@dataclass(frozen=True)
class LoraAdapter:
    """An adapter and its scaling: a pytree that `rora_theory.llama.forward` runs.

    Attributes:
      params: ``{module: {"lora_A": [layers, width, p_in], "lora_B": [layers, p_out, width]}}`` float32, and
        ``"lora_magnitude_vector": [layers, p_out]`` under DoRA. width is the module's largest rank. From a
        layer's own rank on, rows of A and columns of B are zero, receive a zero gradient and so stay zero.
      scaling: ``{module: [layers]}`` float32, gamma of each layer, 0 where the module is not adapted.
      config: the settings it was made from.
      targets: what they resolved to.
    """

    params: dict[str, dict[str, Any]]
    scaling: dict[str, Any]
    config: LoraConfig
    targets: tuple[Target, ...]

    def layers(self) -> dict[str, dict[str, Any]]:
        """See `rora_theory.llama.Adapter`."""
        return {name: {**tensors, "scaling": self.scaling[name]} for name, tensors in self.params.items()}

    def linear(
        self,
        name: str,
        x: Float[Array, "*b i"],
        weight: Float[Array, "o i"],
        bias: Float[Array, " o"] | None,
        layer: dict[str, dict[str, Array]],
        *,
        key: PRNGKeyArray | None,
    ) -> Float[Array, "*b o"]:
        """The adapted module, see `rora_theory.llama.Adapter` and the module docstring.

        The branch is two products through the rank, made in the dtype of ``x``; B A is never formed. Every
        module draws its own dropout mask, as in PEFT.
        """
        if name not in layer:
            return linear(x, weight, bias)
        tensors = layer[name]
        B, gamma = tensors["lora_B"], tensors["scaling"]
        scaled_A = gamma * tensors["lora_A"]
        dropped = x
        if key is not None and self.config.dropout > 0:
            dropped = dropout(key, x, self.config.dropout)
        if self.config.use_dora:
            magnitude = tensors["lora_magnitude_vector"]
            return dora.apply(x, dropped, weight, bias, scaled_A, B, magnitude, gamma > 0)
        inner = checkpoint_name(linear(dropped, scaled_A.astype(x.dtype)), PRODUCT)
        return linear(x, weight, bias) + widen(inner, B.astype(x.dtype))

    def prefix(self, layer: Any) -> None:
        """None: no prefix."""

    def replace(self, params: Any) -> "LoraAdapter":
        """See `base.replace`."""
        return replace(self, params=params)

    def merge(self, params: Params) -> Params:
        """See `base.merge`."""
        return with_weights(params, _merged(self, params))

    def unmerge(self, params: Params, norms: Norms | None = None) -> Params:
        """See `base.unmerge`.

        Raises:
          InputError: DoRA without ``norms``: a merged row keeps its direction and the magnitude, not what
            :math:`|W + \\gamma B A|` was.
        """
        if self.config.use_dora and norms is None:
            raise InputError("norms is None for a DoRA adapter; accepted is norms(adapter, params) of before the merge")
        return with_weights(params, _unmerged(self, params, norms))

    def count(self) -> int:
        """See `base.count`."""
        total = 0
        for target in self.targets:
            tensors = self.params[target.module]
            p_in, p_out = tensors["lora_A"].shape[2], tensors["lora_B"].shape[1]
            own = p_out if self.config.use_dora else 0
            total += sum(rank * (p_in + p_out) + own for rank in target.ranks if rank)
        return total

    def table(self) -> tuple[AdaptedModule, ...]:
        """See `base.table`."""
        return _rows(self.config, self.targets)


def assemble_lora(config: LoraConfig, targets: Sequence[Target], tensors: dict[str, dict[str, Any]]) -> LoraAdapter:
    """The adapter with these padded tensors, its scaling from `scalings`."""
    return LoraAdapter(tensors, scalings(config, targets), config, tuple(targets))


def scalings(config: LoraConfig, targets: Sequence[Target]) -> dict[str, Float[Array, " layers"]]:
    """gamma of each module's layers by `scaling_factor`, 0 where a layer's module is not adapted."""
    return {
        target.module: jnp.asarray(
            [
                scaling_factor(config.rule, alpha=alpha, rank=rank) if rank else 0.0
                for rank, alpha in zip(target.ranks, target.alphas, strict=True)
            ],
            jnp.float32,
        )
        for target in targets
    }


@jax.jit
def norms(adapter: LoraAdapter, params: Params) -> Norms:
    """Row norms of W + gamma B A, ``{module: [layers, p_out]}`` float32: `unmerge` needs them under DoRA."""

    def one(weight: Array, tensors: dict[str, Array]) -> Array:
        return jnp.linalg.norm(weight.astype(jnp.float32) + _delta(tensors), axis=1)

    return _by_layer(adapter, params, one)


@jax.jit
def _merged(adapter: LoraAdapter, params: Params) -> dict[str, Array]:
    def one(weight: Array, tensors: dict[str, Array]) -> Array:
        merged = weight.astype(jnp.float32) + _delta(tensors)
        if adapter.config.use_dora:
            merged = _factor(tensors, jnp.linalg.norm(merged, axis=1)) * merged
        return merged.astype(weight.dtype)

    return _by_layer(adapter, params, one)


@jax.jit
def _unmerged(adapter: LoraAdapter, params: Params, norms: Norms | None) -> dict[str, Array]:
    def one(weight: Array, tensors: dict[str, Array], norm: Array | None = None) -> Array:
        plain = weight.astype(jnp.float32)
        if norm is not None:
            plain = plain / _factor(tensors, norm)
        return (plain - _delta(tensors)).astype(weight.dtype)

    return _by_layer(adapter, params, one, norms if adapter.config.use_dora else None)


def _by_layer(
    adapter: LoraAdapter, params: Params, one: Callable[..., Array], norms: Norms | None = None
) -> dict[str, Array]:
    """``one(weight, tensors[, norm])`` of every adapted module, a layer at a time: only its B A is held."""
    found = {}
    for name, tensors in adapter.layers().items():
        xs = (params["layers"][name]["weight"], tensors, *(() if norms is None else (norms[name],)))
        found[name] = jax.lax.map(lambda slices: one(dense(slices[0]), *slices[1:]), xs)
    return found


def _as_float(value: Any) -> Any:
    """A whole number as a float, so that 8 and 8.0 are one configuration; anything else as it is."""
    return float(value) if isinstance(value, int) and is_finite(value) else value


def _delta(tensors: dict[str, Array]) -> Float[Array, "o i"]:
    """gamma B A of one layer, float32."""
    product = jnp.matmul(tensors["lora_B"], tensors["lora_A"], precision=jax.lax.Precision.HIGHEST)
    return tensors["scaling"] * product


def _factor(tensors: dict[str, Array], norm: Float[Array, " o"]) -> Float[Array, "o 1"]:
    return dora.factor(tensors["lora_magnitude_vector"], norm, tensors["scaling"] > 0)[:, None]


def _rows(config: LoraConfig, targets: Sequence[Target]) -> tuple[AdaptedModule, ...]:
    rows = []
    for target in targets:
        groups: dict[tuple[int, float], list[int]] = {}
        for layer, (rank, alpha) in enumerate(zip(target.ranks, target.alphas, strict=True)):
            if rank:
                groups.setdefault((rank, alpha), []).append(layer)
        for (rank, alpha), layers in groups.items():
            gamma = scaling_factor(config.rule, alpha=alpha, rank=rank)
            rows.append(AdaptedModule(target.module, layer_text(layers), rank, alpha, str(config.rule), gamma))
    return tuple(rows)
