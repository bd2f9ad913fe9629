"""Which modules of which layers are adapted, at which rank and alpha: PEFT's matching, resolved."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rora_theory.adapters.expressions import Expression, Work
from rora_theory.advice.lora_config import ALL_LINEAR
from rora_theory.errors import InputError, shown
from rora_theory.llama import MODULES, LlamaConfig
from rora_theory.scaling import check_positive, check_rank

OTHERS = ("lm_head", "model.embed_tokens")
"""Modules of the model that PEFT could adapt and this package does not."""


@dataclass(frozen=True)
class Target:
    """One adapted module.

    Attributes:
      module: its name, one of `MODULES`.
      ranks: rank in each layer, 0 where it is not adapted.
      alphas: alpha in each layer; meaningless where the rank is 0.
    """

    module: str
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]

    @property
    def width(self) -> int:
        """The largest rank: every layer is padded to it."""
        return max(self.ranks)


def full_name(layer: int, module: str) -> str:
    """The name under which Hugging Face and PEFT know a module of one layer."""
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
      llama_config: the model.
      rank, alpha: where no pattern says otherwise.
      target_modules: names that a module's full name equals or ends with after a dot, or one regular expression
        that the full name matches whole, or ``"all-linear"``.
      layers: indices of the layers to adapt; None is all. A module that ``target_modules`` has by its full name is
        adapted whatever its layer.
      rank_pattern, alpha_pattern: ``{pattern: value}``; a pattern applies where ``(.*\.)?(pattern)$`` matches the
        full name from its start, and the first that does wins.
      bounded: refuse a rank above min(p_out, p_in).

    Returns:
      the adapted modules in the order of `MODULES`.

    Raises:
      InputError: a name or pattern that matches nothing or has no effect, a layer the model does not have, a
        rank above min(p_out, p_in), an invalid regular expression, a module that can't be adapted.
    """
    chosen = matched(llama_config, target_modules, layers)
    ranks = _patterned("rank_pattern", rank_pattern or {}, chosen, rank)
    alphas = _patterned("alpha_pattern", alpha_pattern or {}, chosen, alpha)
    for name in chosen:
        check_rank(ranks[name])
        check_positive("alpha", alphas[name])
    count = llama_config.num_hidden_layers
    found = []
    for module in MODULES:
        names = [full_name(layer, module) for layer in range(count)]
        if not any(name in ranks for name in names):
            continue
        target = Target(
            module,
            tuple(int(ranks.get(name, 0)) for name in names),
            tuple(float(alphas.get(name, alpha)) for name in names),
        )
        p_out, p_in = llama_config.module_shape(module)
        if bounded and target.width > min(p_out, p_in):
            layer = target.ranks.index(target.width)
            raise InputError(
                f"rank is {target.width} at {full_name(layer, module)}, whose weight is [{p_out}, {p_in}]; "
                f"accepted is at most {min(p_out, p_in)}, the largest rank that B A can have there"
            )
        found.append(target)
    return tuple(found)


def matched(
    llama_config: LlamaConfig,
    target_modules: Sequence[str] | str,
    layers: Sequence[int] | None,
    *,
    exclude_modules: Sequence[str] | str = (),
) -> tuple[str, ...]:
    """Full names of the modules that ``target_modules`` and ``layers`` choose and ``exclude_modules`` do not.

    Raises:
      InputError: as `resolve`.
    """
    count = llama_config.num_hidden_layers
    names = [full_name(layer, module) for layer in range(count) for module in MODULES]
    if isinstance(target_modules, str) and layers is not None:
        raise InputError(
            f"layers is {tuple(layers)} beside target_modules {target_modules!r}; "
            "accepted with layers is a list of names"
        )
    if not isinstance(target_modules, str):
        known = frozenset(known_names(llama_config, target_modules))
        for target in target_modules:
            if target not in known:
                raise InputError(f"target_modules has {shown(target)}, which matches no module; {_accepted()}")
    chosen_by, excluded_by = chooser("target_modules", target_modules), chooser("exclude_modules", exclude_modules)
    for other in OTHERS:
        if chosen_by(other) and not excluded_by(other):
            raise InputError(f"target_modules matches {other}, which can't be adapted; {_accepted()}")
    chosen = tuple(name for name in names if chosen_by(name) and not excluded_by(name))
    if not chosen:
        raise InputError(f"target_modules {shown(target_modules)} matches no module; {_accepted()}")
    if layers is None:
        return chosen
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < count:
            raise InputError(f"layers has {shown(layer)}; accepted are 0 to {count - 1}")
    kept = tuple(name for name in chosen if name in target_modules or int(name.split(".")[2]) in layers)
    if not kept:
        raise InputError(f"layers {tuple(layers)} has none of target_modules {shown(target_modules)}")
    return kept


def in_all_layers(llama_config: LlamaConfig, target_modules: Sequence[str], what: str) -> tuple[str, ...]:
    """The modules that ``target_modules`` choose, in the order of `MODULES`, for ``what`` has them in all layers.

    Raises:
      InputError: a name that matches nothing, or not in every layer.
    """
    chosen = set(matched(llama_config, target_modules, None))
    count = llama_config.num_hidden_layers
    found = []
    for module in MODULES:
        layers = [layer for layer in range(count) if full_name(layer, module) in chosen]
        if layers and len(layers) < count:
            raise InputError(
                f"target_modules choose {module} in layers {layer_text(layers)} of {count}; accepted for {what} is a "
                "module in all layers"
            )
        if layers:
            found.append(module)
    return tuple(found)


def known_names(llama_config: LlamaConfig, modules: Sequence[str]) -> tuple[str, ...]:
    """Those of ``modules`` that name a module of the model, whole or from a dot on."""
    layers = range(llama_config.num_hidden_layers)
    names = (*(full_name(layer, module) for layer in layers for module in MODULES), *OTHERS)
    known = {tail for name in names for tail in _tails(name)}
    return tuple(module for module in modules if module in known)


def chooser(where: str, modules: Sequence[str] | str) -> Callable[[str], bool]:
    """Whether PEFT's ``target_modules`` or ``exclude_modules`` choose a full name.

    Raises:
      InputError: an invalid regular expression, or (when it is called) one that takes too long; ``where`` names the
        setting.
    """
    if not isinstance(modules, str):
        own = frozenset(modules)
        return lambda name: not own.isdisjoint(_tails(name))
    if modules.lower() == ALL_LINEAR and where == "target_modules":
        return lambda name: name not in OTHERS
    return Expression(modules, Work(where)).matches


def deciding(where: str, pattern: Sequence[str] | Mapping[str, Any], names: Sequence[str]) -> dict[str, str]:
    r"""The first entry of a pattern that matches each name, by name; without the names that none matches.

    PEFT's rule: ``(.*\.)?(entry)$`` matches the name from its start.

    Raises:
      InputError: an entry that is not a regular expression, or entries that take too long; ``where`` names the pattern.
    """
    work = Work(where)
    entries = {entry: Expression(entry, work) for entry in pattern}
    found = {}
    for name in names:
        starts = [0, *(dot.end() for dot in re.finditer(r"\.", name))]
        first = next((entry for entry, expression in entries.items() if expression.matches(name, starts)), None)
        if first is not None:
            found[name] = first
    return found


def layer_text(layers: Sequence[int]) -> str:
    """Sorted indices with runs shortened: ``"0-3, 7"``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _patterned(where: str, pattern: Mapping[str, Any], chosen: Sequence[str], default: Any) -> dict[str, Any]:
    """Value of every chosen name. Raises `InputError` for an entry that decides for none."""
    decided = deciding(where, pattern, chosen)
    used = set(decided.values())
    inert = [key for key in pattern if key not in used]
    if inert:
        shadowed = bool(deciding(where, inert[:1], chosen))
        why = "is hidden by the patterns before it" if shadowed else "matches no adapted module"
        raise InputError(
            f"{where} has {shown(inert[0])}, which {why}; accepted is a pattern that matches a name such as "
            f"{chosen[0]}, whole or from a dot on"
        )
    return {name: pattern[decided[name]] if name in decided else default for name in chosen}


def _tails(name: str) -> list[str]:
    """A name, and what follows each of its dots: what PEFT's lists know it by."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _accepted() -> str:
    names = ", ".join(module.split(".")[1] for module in MODULES)
    return f"accepted are {names}, a regular expression, or {ALL_LINEAR}"
