r"""Low-rank adapters of a LLaMA model's linear modules: LoRA and RoRA, which differ only in gamma, and DoRA.

.. math:: y = W x + \gamma B A\, x_d + b, \qquad \gamma = \alpha / r^\kappa

A is [rank, p_in], B is [p_out, rank], and :math:`x_d` is x after dropout (Hu et al. 2021). The adapter stores gamma, as
computed by `rora_theory.scaling.scaling_factor`; training, merging and export all use this value.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, PRNGKeyArray

from rora_theory.advice.adapter_config import PAPER_TARGETS, without_list_of_all_linear
from rora_theory.lab.adapters import dora
from rora_theory.lab.adapters.base import AdaptedModule, TrainableAdapter, with_weights
from rora_theory.lab.adapters.dropout import dropout
from rora_theory.lab.adapters.inits import LORA_INITS, LoraInit, init_a
from rora_theory.lab.adapters.targets import Target, layer_text, resolve
from rora_theory.lab.adapters.widen import widen
from rora_theory.lab.llama import MODULES, LlamaConfig, linear
from rora_theory.lab.llama.model import SAVED_PRODUCT, Params
from rora_theory.lab.llama.quantised import to_dense
from rora_theory.scaling import Rule, check_between, check_choice, is_finite, scaling_factor


@dataclass(frozen=True)
class LoraConfig:
    """Configuration of a LoRA, RoRA or DoRA adapter. Frozen and hashable; mappings are stored as tuples of pairs.

    Attributes:
      rank: Rank r, at least 1 and at most min(p_out, p_in) of each adapted module.
      alpha: Numerator of the scaling factor, above 0.
      rule: Scaling rule, see `rora_theory.scaling.scaling_factor`.
      target_modules: Names of modules, a regular expression for full names, or ``"all-linear"``; see
        `targets.resolve`.
      dropout: Probability in [0, 1) of dropping an input element of the adapter in training.
      init: Distribution of lora_A, see `inits.init_a`. lora_B is initialised to zero.
      rank_pattern: Ranks of modules and layers that match a pattern, ``{pattern: rank}``, matched as PEFT does.
      alpha_pattern: Alphas of modules and layers that match a pattern, ``{pattern: alpha}``.
      layers: Indices of the layers to adapt; None adapts all.
      use_dora: Whether to train the row norms separately, see `dora`.

    Raises:
      InputError: If a value is out of range. Settings that depend on the model are checked by `targets`.
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
    replaces_weights: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha", _as_float(self.alpha))
        # Computing the scaling validates the rule, the alpha and the rank.
        scaling_factor(self.rule, alpha=self.alpha, rank=self.rank)
        check_between("dropout", self.dropout, 0, 1, closed="left")
        object.__setattr__(self, "dropout", float(self.dropout))
        check_choice("init", self.init, LORA_INITS)
        # Sequences become tuples, and mappings become tuples of pairs: jit needs hashable values.
        targets = without_list_of_all_linear(self.target_modules)
        object.__setattr__(self, "target_modules", targets if isinstance(targets, str) else tuple(targets))
        for name in ("rank_pattern", "alpha_pattern"):
            pattern = getattr(self, name)
            pairs = pattern.items() if isinstance(pattern, Mapping) else pattern
            convert = _as_float if name == "alpha_pattern" else (lambda value: value)
            object.__setattr__(self, name, tuple((key, convert(value)) for key, value in pairs))
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(sorted(set(self.layers))))

    def targets(self, llama_config: LlamaConfig, *, bounded: bool = True) -> tuple[Target, ...]:
        """Return the adapted modules of a model, see `targets.resolve`.

        Args:
          llama_config: Configuration of the model.
          bounded: Whether to reject ranks above min(p_out, p_in).

        Raises:
          InputError: If the configuration does not fit the model.
        """
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
        # Group the layers of each module by rank and alpha.
        rows = []
        for target in self.targets(llama_config):
            groups: dict[tuple[int, float], list[int]] = {}
            for layer, (rank, alpha) in enumerate(zip(target.ranks, target.alphas, strict=True)):
                # Rank 0 marks a layer that is not adapted.
                if rank:
                    groups.setdefault((rank, alpha), []).append(layer)
            for (rank, alpha), layers in groups.items():
                gamma = scaling_factor(self.rule, alpha=alpha, rank=rank)
                rows.append(AdaptedModule(target.module, layer_text(layers), rank, alpha, str(self.rule), gamma))
        return tuple(rows)

    def build(self, key: PRNGKeyArray, llama_config: LlamaConfig, params: Params) -> "LoraAdapter":
        """Initialise an adapter: A at random, B with zero, DoRA's magnitudes with the row norms of W."""
        tensors = {}
        targets = self.targets(llama_config)
        for target in targets:
            p_out, p_in = llama_config.module_shape(target.module)
            # A key for each module, so that its draw does not depend on which other modules are adapted.
            module_key = jax.random.fold_in(key, MODULES.index(target.module))
            tensors[target.module] = {
                "lora_A": init_a(module_key, self.init, target.ranks, target.width, p_in),
                "lora_B": jnp.zeros((len(target.ranks), p_out, target.width), jnp.float32),
            }
            if self.use_dora:
                weight = params["layers"][target.module]["weight"]
                tensors[target.module]["lora_magnitude_vector"] = _row_norms(weight)
        return assemble_lora(self, targets, tensors)


@jax.jit
def _row_norms(weight: Any) -> Float[Array, "layers p_out"]:
    """Compute the row norms of stacked weights, dequantizing one layer at a time."""
    return jax.lax.map(lambda w: jnp.linalg.norm(to_dense(w).astype(jnp.float32), axis=1), weight)


@partial(jax.tree_util.register_dataclass, data_fields=["params", "scaling"], meta_fields=["config", "targets"])
@dataclass(frozen=True)
class LoraAdapter(TrainableAdapter):
    """A low-rank adapter and its scaling factors, a pytree that `rora_theory.lab.llama.forward` applies.

    Attributes:
      params: ``{module: {"lora_A": [layers, width, p_in], "lora_B": [layers, p_out, width]}}`` in float32, with
        ``"lora_magnitude_vector": [layers, p_out]`` for DoRA. The width is the module's largest rank. Beyond a layer's
        own rank, rows of A and columns of B are zero; their gradients are zero, so they stay zero.
      scaling: Scaling factor gamma of each layer, ``{module: [layers]}`` in float32; 0 if the module is not adapted.
      config: Configuration of the adapter.
      targets: Adapted modules with their ranks and alphas, resolved from ``config``.
    """

    params: dict[str, dict[str, Any]]
    scaling: dict[str, Any]
    config: LoraConfig
    targets: tuple[Target, ...]

    def layers(self) -> dict[str, dict[str, Any]]:
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
        """Apply the adapted module, see `rora_theory.lab.llama.Adapter` and the module docstring.

        The update is two products through the rank, in the dtype of ``x``; B A is never formed. Every module draws its
        own dropout mask, as in PEFT.
        """
        if name not in layer:
            return linear(x, weight, bias)
        tensors = layer[name]
        B, gamma = tensors["lora_B"], tensors["scaling"]
        # gamma is applied to A, the smaller operand, and not to the outputs.
        scaled_A = gamma * tensors["lora_A"]
        # Dropout applies to the adapter's input only.
        dropped = x
        if key is not None and self.config.dropout > 0:
            dropped = dropout(key, x, self.config.dropout)
        if self.config.use_dora:
            magnitude = tensors["lora_magnitude_vector"]
            return dora.apply(x, dropped, weight, bias, scaled_A, B, magnitude, gamma > 0)
        # A x, of width r, is saved for the backward pass; B A x has the width of the output.
        inner = checkpoint_name(linear(dropped, scaled_A.astype(x.dtype)), SAVED_PRODUCT)
        return linear(x, weight, bias) + widen(inner, B.astype(x.dtype))

    def merge(self, params: Params) -> Params:
        return with_weights(params, _merged_weights(self, params))

    def count(self) -> int:
        total = 0
        for target in self.targets:
            tensors = self.params[target.module]
            p_in, p_out = tensors["lora_A"].shape[2], tensors["lora_B"].shape[1]
            magnitudes = p_out if self.config.use_dora else 0
            total += sum(rank * (p_in + p_out) + magnitudes for rank in target.ranks if rank)
        return total


def assemble_lora(config: LoraConfig, targets: Sequence[Target], tensors: dict[str, dict[str, Any]]) -> LoraAdapter:
    """Construct an adapter from padded tensors, with the scaling factors of its configuration."""
    return LoraAdapter(tensors, scalings(config, targets), config, tuple(targets))


def scalings(config: LoraConfig, targets: Sequence[Target]) -> dict[str, Float[Array, " layers"]]:
    """Compute the scaling factor of each module and layer, 0 where it is not adapted."""
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
def _merged_weights(adapter: LoraAdapter, params: Params) -> dict[str, Array]:
    def merge_layer(weight: Array, tensors: dict[str, Array]) -> Array:
        merged = weight.astype(jnp.float32) + _delta(tensors)
        if adapter.config.use_dora:
            merged = _factor(tensors, jnp.linalg.norm(merged, axis=1)) * merged
        return merged.astype(weight.dtype)

    results = {}
    for name, tensors in adapter.layers().items():
        # One layer at a time: only one layer's dense weight and B A are held at once.
        weights = params["layers"][name]["weight"]
        results[name] = jax.lax.map(lambda slices: merge_layer(to_dense(slices[0]), slices[1]), (weights, tensors))
    return results


def _as_float(value: Any) -> Any:
    """Convert a finite integer to float, so that 8 and 8.0 are equal configurations; return other values unchanged."""
    return float(value) if isinstance(value, int) and is_finite(value) else value


def _delta(tensors: dict[str, Array]) -> Float[Array, "o i"]:
    """Compute gamma B A of one layer in float32."""
    product = jnp.matmul(tensors["lora_B"], tensors["lora_A"], precision=jax.lax.Precision.HIGHEST)
    return tensors["scaling"] * product


def _factor(tensors: dict[str, Array], norm: Float[Array, " o"]) -> Float[Array, "o 1"]:
    return dora.factor(tensors["lora_magnitude_vector"], norm, tensors["scaling"] > 0)[:, None]
