"""Resolution of PEFT's target and pattern settings to the adapted modules, their ranks and their alphas."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rora_theory.advice.adapter_config import ALL_LINEAR, without_list_of_all_linear
from rora_theory.errors import InputError, shown
from rora_theory.lab.llama import MODULES, LlamaConfig
from rora_theory.scaling import check_integer, check_positive

UNSUPPORTED_MODULES = ("lm_head", "model.embed_tokens")
"""Modules of the model that PEFT can adapt and this package cannot."""


@dataclass(frozen=True)
class Target:
    """An adapted module.

    Attributes:
      module: Name of the module, one of `MODULES`.
      ranks: Rank in each layer, 0 if the module is not adapted there.
      alphas: Alpha in each layer; meaningless if the rank is 0.
    """

    module: str
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]

    @property
    def width(self) -> int:
        """Largest rank, to which every layer is padded."""
        return max(self.ranks)


def full_name(layer: int, module: str) -> str:
    """Return the full name of a module in one layer, as Hugging Face and PEFT use it."""
    return f"model.layers.{layer}.{module}"


def resolve(
    llama_config: LlamaConfig,
    *,
    rank: int,
    alpha: float,
    target_modules: Sequence[str] | str,
    layers: Sequence[int] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    bounded: bool = True,
) -> tuple[Target, ...]:
    r"""Resolve a configuration to the ranks and alphas of every module and layer.

    Args:
      rank: Rank of modules that no pattern matches.
      alpha: Alpha of modules that no pattern matches.
      target_modules: Names that a module's full name equals or ends with after a dot, or one regular expression that
        matches the entire full name, or ``"all-linear"``.
      layers: Indices of the layers to adapt; None adapts all. A module listed by its full name is adapted in any case.
      rank_pattern: Ranks by pattern. A pattern applies if ``(.*\.)?(pattern)$`` matches the full name from its start;
        the first that applies wins.
      alpha_pattern: Alphas by pattern.
      bounded: Whether to reject ranks above min(p_out, p_in).

    Returns:
      The adapted modules in the order of `MODULES`.

    Raises:
      InputError: If a name or pattern matches nothing or has no effect, a layer does not exist, a rank exceeds
        min(p_out, p_in), a regular expression is invalid, or a module cannot be adapted.
    """
    # Full names of the adapted modules, and their ranks and alphas.
    chosen = matched(llama_config, target_modules, layers)
    ranks = _patterned("rank_pattern", rank_pattern or {}, chosen, rank)
    alphas = _patterned("alpha_pattern", alpha_pattern or {}, chosen, alpha)
    for name in chosen:
        check_integer("rank", ranks[name])
        check_positive("alpha", alphas[name])
    # Collect the layers of each module.
    count = llama_config.num_hidden_layers
    targets = []
    for module in MODULES:
        names = [full_name(layer, module) for layer in range(count)]
        if not any(name in ranks for name in names):
            continue
        # Rank 0 marks a layer in which the module is not adapted.
        target = Target(
            module,
            tuple(int(ranks.get(name, 0)) for name in names),
            tuple(float(alphas.get(name, alpha)) for name in names),
        )
        # A rank above the size of the weight adds parameters, but no further changes of the weight.
        p_out, p_in = llama_config.module_shape(module)
        if bounded and target.width > min(p_out, p_in):
            layer = target.ranks.index(target.width)
            raise InputError(
                f"rank must be at most {min(p_out, p_in)} at {full_name(layer, module)}, the largest rank of a "
                f"[{p_out}, {p_in}] weight, got {target.width}"
            )
        targets.append(target)
    return tuple(targets)


def matched(
    llama_config: LlamaConfig,
    target_modules: Sequence[str] | str,
    layers: Sequence[int] | None,
    *,
    exclude_modules: Sequence[str] | str = (),
) -> tuple[str, ...]:
    """Return the full names of the modules that the settings select.

    Args:
      target_modules: Names, a regular expression or ``"all-linear"``, see `resolve`.
      layers: Indices of the layers to adapt; None selects all.
      exclude_modules: Names or a regular expression of modules to exclude.

    Raises:
      InputError: If a setting is invalid or matches no module.
    """
    count = llama_config.num_hidden_layers
    names = [full_name(layer, module) for layer in range(count) for module in MODULES]
    target_modules = without_list_of_all_linear(target_modules)
    if isinstance(target_modules, str) and layers is not None:
        raise InputError(
            f"layers {tuple(layers)} requires target_modules to be a list of names, got {target_modules!r}"
        )
    # PEFT ignores a name without a match; here it is an error, because it is probably misspelt.
    if not isinstance(target_modules, str):
        known = frozenset(known_names(llama_config, target_modules))
        for target in target_modules:
            if target not in known:
                raise InputError(f"target_modules has {shown(target)}, which matches no module. {_supported()}")
    chosen_by, excluded_by = (
        module_predicate("target_modules", target_modules),
        module_predicate("exclude_modules", exclude_modules),
    )
    # A pattern may also match modules that exist but cannot be adapted.
    for other in UNSUPPORTED_MODULES:
        if chosen_by(other) and not excluded_by(other):
            raise InputError(f"target_modules matches {other}, which cannot be adapted. {_supported()}")
    chosen = tuple(name for name in names if chosen_by(name) and not excluded_by(name))
    if not chosen:
        raise InputError(f"target_modules {shown(target_modules)} matches no module. {_supported()}")
    if layers is None:
        return chosen
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < count:
            raise InputError(f"layers must be indices from 0 to {count - 1}, got {shown(layer)}")
    # A module listed by its full name is adapted whatever its layer.
    selected = tuple(name for name in chosen if name in target_modules or int(name.split(".")[2]) in layers)
    if not selected:
        raise InputError(f"layers {tuple(layers)} has none of target_modules {shown(target_modules)}")
    return selected


def in_all_layers(llama_config: LlamaConfig, target_modules: Sequence[str], what: str) -> tuple[str, ...]:
    """Return the selected modules in the order of `MODULES`, each of which must be selected in all layers.

    Args:
      target_modules: Names of modules, see `resolve`.
      what: Name of the method in error messages.

    Raises:
      InputError: If a name matches no module, or not in every layer.
    """
    # These adapters have one stack of tensors for all layers, so a module is in all or in none.
    chosen = set(matched(llama_config, target_modules, None))
    count = llama_config.num_hidden_layers
    modules = []
    for module in MODULES:
        layers = [layer for layer in range(count) if full_name(layer, module) in chosen]
        if layers and len(layers) < count:
            raise InputError(
                f"target_modules must select {module} in all layers for {what}, got layers {layer_text(layers)} "
                f"of {count}"
            )
        if layers:
            modules.append(module)
    return tuple(modules)


def known_names(llama_config: LlamaConfig, modules: Sequence[str]) -> tuple[str, ...]:
    """Return the entries of ``modules`` that are a module's full name, or its end after a dot."""
    layers = range(llama_config.num_hidden_layers)
    names = (*(full_name(layer, module) for layer in layers for module in MODULES), *UNSUPPORTED_MODULES)
    known = {tail for name in names for tail in _tails(name)}
    return tuple(module for module in modules if module in known)


def module_predicate(where: str, modules: Sequence[str] | str) -> Callable[[str], bool]:
    """Return the predicate of full names that PEFT's ``target_modules`` or ``exclude_modules`` selects.

    Raises:
      InputError: If a regular expression is invalid.
    """
    if not isinstance(modules, str):
        names = frozenset(modules)
        return lambda name: not names.isdisjoint(_tails(name))
    if modules.lower() == ALL_LINEAR and where == "target_modules":
        return lambda name: name not in UNSUPPORTED_MODULES
    expression = _compile(where, modules, modules)
    return lambda name: expression.fullmatch(name) is not None


def first_matches(where: str, pattern: Sequence[str] | Mapping[str, Any], names: Sequence[str]) -> dict[str, str]:
    r"""Return the first entry of a pattern that matches each name, without the names that no entry matches.

    An entry matches if ``(.*\.)?(entry)$`` matches the name from its start, as in PEFT.

    Raises:
      InputError: If an entry is not a regular expression.
    """
    entries = {entry: _compile(where, entry, rf"(.*\.)?({entry})$") for entry in pattern}
    matches = {}
    for name in names:
        first = next((entry for entry, expression in entries.items() if expression.match(name)), None)
        if first is not None:
            matches[name] = first
    return matches


def _compile(where: str, setting: str, expression: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(f"{where} {shown(setting)} is not a regular expression: {error}") from error


def layer_text(layers: Sequence[int]) -> str:
    """Return sorted indices as text with runs shortened, such as ``"0-3, 7"``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _patterned(where: str, pattern: Mapping[str, Any], chosen: Sequence[str], default: Any) -> dict[str, Any]:
    """Return the value of every chosen name, or raise `InputError` if an entry applies to none."""
    entries = first_matches(where, pattern, chosen)
    # An entry without effect is an error: say whether an earlier entry hides it.
    used = set(entries.values())
    unused = [key for key in pattern if key not in used]
    if unused:
        is_shadowed = bool(first_matches(where, unused[:1], chosen))
        reason = "is hidden by the patterns before it" if is_shadowed else "matches no adapted module"
        raise InputError(
            f"{where} has {shown(unused[0])}, which {reason}. Use a pattern that matches a name such as {chosen[0]}, "
            "entirely or after a dot."
        )
    return {name: pattern[entries[name]] if name in entries else default for name in chosen}


def _tails(name: str) -> list[str]:
    """Return a name and the parts after each of its dots, any of which PEFT's lists may contain."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _supported() -> str:
    names = ", ".join(module.split(".")[1] for module in MODULES)
    return f"Use {names}, a regular expression, or {ALL_LINEAR}."
