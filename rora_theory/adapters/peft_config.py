"""PEFT's `adapter_config.json`: validation of its entries, and conversion of LoRA's configuration from and to it."""

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
"""Values of ``init_lora_weights``, as lower-case text, that do not change the base weights."""

Check = Callable[[Any], bool]
Entries = Mapping[str, tuple[Any, Check, str]]
"""Entries that affect what an adapter computes: PEFT's default, a predicate of valid values, and their description."""


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


_NO_SIGN = "an alpha of 0 disables the adapter, and a sign belongs in lora_B"

READ: Entries = {
    "alpha_pattern": ({}, _null_or(_object_of(_alpha)), f"an object of numbers above 0: {_NO_SIGN}"),
    "exclude_modules": (None, _null_or(_names), "a list of names, or a regular expression"),
    "init_lora_weights": (
        True,
        _init,
        "true, false, null, gaussian, eva or orthogonal (other values change the base weights)",
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
"""Entries of LoRA that affect what it computes."""
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
"""Entries that record an adapter's origin, or that have an effect only with an entry that is rejected."""
OFF: tuple[Any, ...] = (None, False, "none", [], {})
"""Values that disable the feature of any other entry, one of a later PEFT version included."""


def to_peft(config: LoraConfig, targets: Sequence[Target], base_model: str | None) -> dict[str, Any]:
    r"""Return the entries of PEFT's configuration file that affect what it computes.

    In PEFT, the first entry of a pattern that matches a module wins, so that their order matters. The patterns are
    written in resolved form instead: no two entries match the same name.

    PEFT has no flag for a rule whose kappa is neither 1 nor 1/2. Such a rule is written as LoRA with the alphas that
    give the same gamma, :math:`\alpha' = \gamma r`, in ``alpha_pattern`` if they differ between modules.

    Args:
      config: Configuration of the adapter.
      targets: Adapted modules, resolved from ``config``.
      base_model: Name or path of the base model.
    """
    kappa = exponent(config.rule)
    has_flag = kappa in KAPPAS.values()

    def alphas(target: Target) -> list[float]:
        if has_flag:
            return list(target.alphas)
        pairs = zip(target.alphas, target.ranks, strict=True)
        return [_alpha_as_lora(config, alpha, rank) if rank else alpha for alpha, rank in pairs]

    alpha: float = config.alpha if has_flag else _alpha_as_lora(config, config.alpha, config.rank)
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
    """Read the entries of a configuration file.

    Raises:
      InputError: If the file is missing or damaged, or has no ``peft_type``.
    """
    if not path.exists():
        raise InputError(f"{path.parent} has no {FILE}. Pass the folder of an adapter saved by PEFT.")
    values = read_json(path, LARGEST, accepted="the file as PEFT writes it")
    if not isinstance(values, dict):
        raise InputError(f"{path}: must contain a JSON object, as PEFT writes it, got a {type(values).__name__}")
    check_entry_counts(path, values)
    if not isinstance(values.get("peft_type"), str):
        kind = shown(values["peft_type"]) if "peft_type" in values else "no entry"
        raise InputError(f"{path}: peft_type must be a name, as PEFT writes it, got {kind}")
    return values


def checked(path: Path, values: Mapping[str, Any], read: Entries) -> dict[str, Any]:
    """Validate the entries of a configuration file, and fill in PEFT's defaults.

    Args:
      path: Path of the file in error messages.
      values: Entries of the file.
      read: Entries that affect what the adapter computes.

    Raises:
      InputError: If an entry is invalid, or enables a feature that this package does not support.
    """
    entries = {}
    for key, (default, check, valid_values) in read.items():
        entries[key] = values.get(key, default)
        if not check(entries[key]):
            raise InputError(f"{path}: {key} must be {valid_values}, got {shown(entries[key])}")
    for key, value in values.items():
        # Compare the types too: 0 == False, and a 0 of an unknown entry may not mean off.
        is_off = any(value == neutral and type(value) is type(neutral) for neutral in OFF)
        if key not in read and key not in IGNORED and not is_off:
            raise InputError(
                f"{path}: {_shown_key(key)} is not supported; it must be null, false or 'none', got {shown(value)}"
            )
    return entries


def lora_config_of(
    path: Path, values: Mapping[str, Any], llama_config: LlamaConfig
) -> tuple[LoraConfig, tuple[Target, ...]]:
    """Convert a file's entries to LoRA's configuration, and resolve it for a model.

    Args:
      path: Path of the file in error messages.
      values: Entries of the file.
      llama_config: Configuration of the model.

    Raises:
      InputError: If an entry is invalid, or the model does not have the modules and layers.
    """
    entries = checked(path, values, READ)
    try:
        config = _from_entries(entries, llama_config)
        return config, config.targets(llama_config, bounded=False)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _shown_key(key: str) -> str:
    return key if key.isidentifier() and len(key) < 80 else shown(key)


def _from_entries(entries: Mapping[str, Any], llama_config: LlamaConfig) -> LoraConfig:
    """Convert entries as PEFT does, ignoring names, layers and patterns that the model does not have."""
    modules, excluded = entries["target_modules"], entries["exclude_modules"] or ()
    layers = entries["layers_to_transform"]
    if not isinstance(modules, str):
        modules = known_names(llama_config, modules) or modules
    if layers == []:
        layers = None
    elif layers is not None:
        count = llama_config.num_hidden_layers
        indices = [layers] if isinstance(layers, int) else layers
        layers = [layer for layer in indices if 0 <= layer < count]
        if not layers:
            raise InputError(
                f"layers_to_transform must be from 0 to {count - 1}, got {shown(entries['layers_to_transform'])}"
            )
    chosen = matched(llama_config, modules, layers, exclude_modules=excluded)
    if excluded:
        # This package's configuration has no exclusions: list the remaining modules by their full names.
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
    """Return the entries of a pattern that apply to one of the ``chosen`` names, in the file's order."""
    pattern = entries[where] or {}
    used = set(deciding(where, pattern, chosen).values())
    return {key: value for key, value in pattern.items() if key in used}


def _pattern(targets: Sequence[Target], values: Callable[[Target], Sequence[Any]], default: Any) -> dict[str, Any]:
    """Return the pattern that gives each adapted module its value, such that no two entries match the same name.

    Entries are by module, or by full name if a module's layers differ. As regular expressions, full names match no
    other full name.
    """
    pattern: dict[str, Any] = {}
    for target in targets:
        by_layer = {layer: value for layer, value in enumerate(values(target)) if target.ranks[layer]}
        if len(set(by_layer.values())) == 1:
            pattern[target.module] = next(iter(by_layer.values()))
        else:
            pattern |= {full_name(layer, target.module): value for layer, value in by_layer.items()}
    return {name: value for name, value in pattern.items() if value != default}


def _alpha_as_lora(config: LoraConfig, alpha: float, rank: int) -> float:
    return alpha_for("lora", scaling=scaling_factor(config.rule, alpha=alpha, rank=rank), rank=rank)


def number(value: float) -> float | int:
    """Return a whole number as int, as PEFT writes alphas, and other numbers as float."""
    return int(value) if float(value).is_integer() else float(value)
