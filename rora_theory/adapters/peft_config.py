"""PEFT's `adapter_config.json`: its entries checked, and LoRA's as this package's configuration, and back."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rora_theory.adapters.lora import LoraConfig
from rora_theory.adapters.targets import Target, deciding, full_name, known_names, matched
from rora_theory.advice.lora_config import FILE, LARGEST, check_entry_counts
from rora_theory.errors import InputError, shown
from rora_theory.io.files import read_json
from rora_theory.llama import LlamaConfig
from rora_theory.scaling import KAPPAS, alpha_for, exponent, scaling_factor

LORA = "LORA"
INIT_LORA_WEIGHTS = dict.fromkeys(("true", "false", "none", "eva", "orthogonal"), "kaiming_uniform") | {
    "gaussian": "gaussian"
}
"""Values of ``init_lora_weights``, as text in lower case, that leave the base weights alone; others change them."""

Check = Callable[[Any], bool]
Entries = Mapping[str, tuple[Any, Check, str]]
"""Entries that decide what an adapter computes: PEFT's default, what is accepted, and that in words."""


def _is(*kinds: type) -> Check:
    return lambda value: isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))


def _null_or(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _object_of(check: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def _names(value: Any) -> bool:
    return isinstance(value, str) or _list_of(_is(str))(value)


def _rank(value: Any) -> bool:
    return _is(int)(value) and 1 <= value < 2**31


def _alpha(value: Any) -> bool:
    return _is(int, float)(value) and 0 < value <= sys.float_info.max


def _init(value: Any) -> bool:
    return value is None or (isinstance(value, (bool, str)) and str(value).lower() in INIT_LORA_WEIGHTS)


def _rate(value: Any) -> bool:
    return _is(int, float)(value) and 0 <= value < 1


_NO_SIGN = "with 0 the adapter does nothing, and a sign belongs in lora_B"

READ: Entries = {
    "alpha_pattern": ({}, _null_or(_object_of(_alpha)), f"an object of numbers above 0: {_NO_SIGN}"),
    "exclude_modules": (None, _null_or(_names), "a list of names, or a regular expression"),
    "init_lora_weights": (
        True,
        _init,
        "true, false, null, gaussian, eva or orthogonal: others change the base's weights",
    ),
    "layers_pattern": (None, lambda v: v in (None, "", [], "layers", ["layers"]), "null or 'layers'"),
    "layers_to_transform": (
        None,
        lambda v: v is None or _is(int)(v) or _list_of(_is(int))(v),
        "indices of layers",
    ),
    "lora_alpha": (8, _alpha, f"a number above 0: {_NO_SIGN}"),
    "lora_dropout": (0.0, _rate, "a number from 0 to below 1"),
    "peft_type": (None, lambda v: v == LORA, "'LORA'"),
    "r": (8, _rank, "an integer of 1 or more"),
    "rank_pattern": ({}, _null_or(_object_of(_rank)), "an object of integers of 1 or more"),
    "target_modules": (None, _names, "a list of names, or a regular expression"),
    "task_type": (None, lambda v: v in (None, "CAUSAL_LM"), "'CAUSAL_LM'"),
    "use_dora": (False, _is(bool), "true or false"),
    "use_rslora": (False, _is(bool), "true or false"),
}
"""LoRA's entries."""
IGNORED = (
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
)
"""Entries that record where an adapter came from, or that matter only beside one that is refused."""
OFF: tuple[Any, ...] = (None, False, "none", [], {})
"""Values that switch off any other entry: a feature known here, or one that a later PEFT adds."""


def to_peft(config: LoraConfig, targets: Sequence[Target], base_model: str | None) -> dict[str, Any]:
    r"""The entries that decide what PEFT computes, by its names; it has its defaults for the rest.

    The first entry of a pattern that matches a module decides, so that their order would be part of the adapter. The
    patterns are written resolved instead: no two entries match one name.

    A rule of another kappa than 1 or 1/2 has no flag in PEFT. It is written as LoRA's with the alpha that
    gives each module's gamma, :math:`\alpha' = \gamma r`, in ``alpha_pattern`` where that is not the same for all.
    """
    kappa = exponent(config.rule)
    flagged = kappa in KAPPAS.values()

    def alphas(target: Target) -> list[float]:
        if flagged:
            return list(target.alphas)
        pairs = zip(target.alphas, target.ranks, strict=True)
        return [_alpha_as_lora(config, alpha, rank) if rank else alpha for alpha, rank in pairs]

    alpha: float = config.alpha if flagged else _alpha_as_lora(config, config.alpha, config.rank)
    modules = config.target_modules
    return {
        "alpha_pattern": {key: number(value) for key, value in _pattern(targets, alphas, alpha).items()},
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True if config.init == "kaiming_uniform" else config.init,
        "layers_to_transform": None if config.layers is None else list(config.layers),
        "lora_alpha": number(alpha),
        "lora_dropout": config.dropout,
        "peft_type": LORA,
        "r": config.rank,
        "rank_pattern": _pattern(targets, lambda target: target.ranks, config.rank),
        "target_modules": modules if isinstance(modules, str) else list(modules),
        "task_type": "CAUSAL_LM",
        "use_dora": config.use_dora,
        "use_rslora": kappa == KAPPAS["rora"],
    }


def read_entries(path: Path) -> Mapping[str, Any]:
    """The entries of a configuration file.

    Raises:
      InputError: missing or damaged, or without a ``peft_type``.
    """
    if not path.exists():
        raise InputError(f"{path.parent}: has no {FILE}; accepted is an adapter's folder as PEFT writes it")
    values = read_json(path, LARGEST, accepted="the file as PEFT writes it")
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds a {type(values).__name__}; accepted is an object as PEFT writes it")
    check_entry_counts(path, values)
    if not isinstance(values.get("peft_type"), str):
        found = shown(values["peft_type"]) if "peft_type" in values else "missing"
        raise InputError(f"{path}: peft_type is {found}; accepted is a name, as PEFT writes it")
    return values


def checked(path: Path, values: Mapping[str, Any], read: Entries) -> dict[str, Any]:
    """The entries in ``lora_config_of``, with PEFT's defaults where the file has none.

    Raises:
      InputError: an entry that is wrong, or another that asks for what this package does not compute.
    """
    entries = {}
    for key, (default, check, accepted) in read.items():
        entries[key] = values.get(key, default)
        if not check(entries[key]):
            raise InputError(f"{path}: {key} is {shown(entries[key])}; accepted is {accepted}")
    for key, value in values.items():
        # A type test beside the equality: 0 == False, and an unknown 0 need not mean off.
        off = any(value == neutral and type(value) is type(neutral) for neutral in OFF)
        if key not in read and key not in IGNORED and not off:
            raise InputError(
                f"{path}: {_named(key)} is {shown(value)}, which is not supported; accepted is null, false or 'none'"
            )
    return entries


def lora_config_of(
    path: Path, values: Mapping[str, Any], llama_config: LlamaConfig
) -> tuple[LoraConfig, tuple[Target, ...]]:
    """LoRA's configuration in a file's entries, resolved for a model.

    Raises:
      InputError: as `checked`, or modules and layers that the model does not have; names the file and the entry.
    """
    entries = checked(path, values, READ)
    try:
        config = _from_entries(entries, llama_config)
        return config, config.targets(llama_config, bounded=False)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _named(key: str) -> str:
    """A key of the file as a message shows it."""
    return key if key.isidentifier() and len(key) < 80 else shown(key)


def _from_entries(entries: Mapping[str, Any], llama_config: LlamaConfig) -> LoraConfig:
    """What PEFT makes of the entries: names, layers and patterns that the model has none of are passed over."""
    modules, excluded = entries["target_modules"], entries["exclude_modules"] or ()
    layers = entries["layers_to_transform"]
    if not isinstance(modules, str):
        modules = known_names(llama_config, modules) or modules
    if layers == []:
        layers = None
    elif layers is not None:
        count = llama_config.num_hidden_layers
        asked = [layers] if isinstance(layers, int) else layers
        layers = [layer for layer in asked if 0 <= layer < count]
        if not layers:
            raise InputError(
                f"layers_to_transform is {shown(entries['layers_to_transform'])}; accepted are 0 to {count - 1}"
            )
    chosen = matched(llama_config, modules, layers, exclude_modules=excluded)
    if excluded:
        # The modules that are left, one by one: this package's configuration has no exclusions.
        modules, layers = chosen, None
    return LoraConfig(
        rank=entries["r"],
        alpha=entries["lora_alpha"],
        rule="rora" if entries["use_rslora"] else "lora",
        target_modules=modules,
        dropout=entries["lora_dropout"],
        init=INIT_LORA_WEIGHTS[str(entries["init_lora_weights"]).lower()],  # type: ignore[arg-type]
        rank_pattern=_effective("rank_pattern", entries, chosen),
        alpha_pattern=_effective("alpha_pattern", entries, chosen),
        layers=layers,
        use_dora=entries["use_dora"],
    )


def _effective(where: str, entries: Mapping[str, Any], chosen: Sequence[str]) -> dict[str, Any]:
    """The entries of a pattern that decide for one of the ``chosen`` names, in the file's order."""
    pattern = entries[where] or {}
    used = set(deciding(where, pattern, chosen).values())
    return {key: value for key, value in pattern.items() if key in used}


def _pattern(targets: Sequence[Target], values: Callable[[Target], Sequence[Any]], default: Any) -> dict[str, Any]:
    """PEFT's pattern that gives each adapted module its value, so that no two entries match one name.

    By module, or by full name where a module's layers differ. The dots of a full name match no other name's.
    """
    found: dict[str, Any] = {}
    for target in targets:
        own = {layer: value for layer, value in enumerate(values(target)) if target.ranks[layer]}
        if len(set(own.values())) == 1:
            found[target.module] = next(iter(own.values()))
        else:
            found |= {full_name(layer, target.module): value for layer, value in own.items()}
    return {name: value for name, value in found.items() if value != default}


def _alpha_as_lora(config: LoraConfig, alpha: float, rank: int) -> float:
    return alpha_for("lora", scaling=scaling_factor(config.rule, alpha=alpha, rank=rank), rank=rank)


def number(value: float) -> float | int:
    """A whole alpha as PEFT writes it, without a decimal point."""
    return int(value) if float(value).is_integer() else float(value)
