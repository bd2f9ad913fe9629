"""PEFT's `adapter_config.json`: its entries checked, and LoRA's as this package's configuration, and back."""

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rora_theory.adapters.lora import LoraConfig
from rora_theory.adapters.targets import Target, chooser, effective, full_name, matched
from rora_theory.errors import InputError
from rora_theory.llama import LlamaConfig
from rora_theory.scaling import KAPPAS, alpha_for, exponent, scaling_factor

FILE, LORA = "adapter_config.json", "LORA"
INITS = {"true": "kaiming_uniform", "false": "kaiming_uniform", "gaussian": "gaussian"} | dict.fromkeys(
    ("eva", "orthogonal"), "kaiming_uniform"
)
"""Values of ``init_lora_weights``, lower case, that leave the base weights alone; others change them."""

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


def _rate(value: Any) -> bool:
    return _is(int, float)(value) and 0 <= value < 1


READ: Entries = {
    "alpha_pattern": ({}, _null_or(_object_of(_alpha)), "an object of numbers above 0"),
    "exclude_modules": (None, _null_or(_names), "a list of names, or a regular expression"),
    "init_lora_weights": (True, lambda v: str(v).lower() in INITS, ", ".join(INITS)),
    "layers_pattern": (None, lambda v: v in (None, "", [], "layers", ["layers"]), "null or 'layers'"),
    "layers_to_transform": (
        None,
        lambda v: v is None or _is(int)(v) or _list_of(_is(int))(v),
        "indices of layers",
    ),
    "lora_alpha": (8, _alpha, "a number above 0"),
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

    A rule of another kappa than 1 or 1/2 has no flag in PEFT. It is written as LoRA's with the alpha that
    gives each module's gamma, :math:`\alpha' = \gamma r`, in ``alpha_pattern`` where that is not the same for
    all.
    """
    kappa = exponent(config.rule)
    alpha: float = config.alpha
    alpha_pattern = dict(config.alpha_pattern)
    if kappa not in KAPPAS.values():
        alpha = _alpha_as_lora(config, config.alpha, config.rank)
        alpha_pattern = _alphas_as_lora(config, targets, alpha)
    modules = config.target_modules
    return {
        "alpha_pattern": {key: _number(value) for key, value in alpha_pattern.items()},
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True if config.init == "kaiming_uniform" else config.init,
        "layers_to_transform": None if config.layers is None else list(config.layers),
        "lora_alpha": _number(alpha),
        "lora_dropout": config.dropout,
        "peft_type": LORA,
        "r": config.rank,
        "rank_pattern": dict(config.rank_pattern),
        "target_modules": modules if isinstance(modules, str) else list(modules),
        "task_type": "CAUSAL_LM",
        "use_dora": config.use_dora,
        "use_rslora": kappa == KAPPAS["rora"],
    }


def load(path: Path) -> Mapping[str, Any]:
    """The entries of a configuration file.

    Raises:
      InputError: missing or damaged, or without a ``peft_type``.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path.parent}: has no {FILE}; accepted is an adapter's folder as PEFT writes it") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not JSON ({error}); accepted is the file as PEFT writes it") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds a {type(values).__name__}; accepted is an object as PEFT writes it")
    if "peft_type" not in values:
        raise InputError(f"{path}: has no peft_type; accepted is the file as PEFT writes it")
    return values


def checked(path: Path, values: Mapping[str, Any], read: Entries) -> dict[str, Any]:
    """The entries in ``read``, with PEFT's defaults where the file has none.

    Raises:
      InputError: an entry that is wrong, or another that asks for what this package does not compute.
    """
    entries = {}
    for key, (default, check, accepted) in read.items():
        entries[key] = values.get(key, default)
        if not check(entries[key]):
            raise InputError(f"{path}: {key} is {entries[key]!r}; accepted is {accepted}")
    for key, value in values.items():
        # A type test beside the equality: 0 == False, and an unknown 0 need not mean off.
        off = any(value == neutral and type(value) is type(neutral) for neutral in OFF)
        if key not in read and key not in IGNORED and not off:
            raise InputError(f"{path}: {key} is {value!r}, which is not supported; accepted is null or false")
    return entries


def read(path: Path, values: Mapping[str, Any], llama_config: LlamaConfig) -> tuple[LoraConfig, tuple[Target, ...]]:
    """LoRA's configuration in a file's entries, resolved for a model.

    Raises:
      InputError: as `checked`, or modules and layers that the model does not have; names the file and the entry.
    """
    entries = checked(path, values, READ)
    try:
        config = _from_entries(entries, llama_config)
        return config, config.targets(llama_config)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _from_entries(entries: Mapping[str, Any], llama_config: LlamaConfig) -> LoraConfig:
    modules = entries["target_modules"]
    layers = entries["layers_to_transform"]
    layers = [layers] if isinstance(layers, int) else layers or None
    chosen = matched(llama_config, modules, layers)
    if entries["exclude_modules"]:
        # The modules that are left, one by one: this package's configuration has no exclusions.
        excluded = chooser("exclude_modules", entries["exclude_modules"])
        chosen = tuple(name for name in chosen if not excluded(name))
        modules, layers = chosen, None
    return LoraConfig(
        rank=entries["r"],
        alpha=entries["lora_alpha"],
        rule="rora" if entries["use_rslora"] else "lora",
        target_modules=modules,
        dropout=entries["lora_dropout"],
        init=INITS[str(entries["init_lora_weights"]).lower()],  # type: ignore[arg-type]
        # PEFT lets entries that match nothing pass; they are left out.
        rank_pattern=effective("rank_pattern", entries["rank_pattern"] or {}, chosen),
        alpha_pattern=effective("alpha_pattern", entries["alpha_pattern"] or {}, chosen),
        layers=layers,
        use_dora=entries["use_dora"],
    )


def _alphas_as_lora(config: LoraConfig, targets: Sequence[Target], default: float) -> dict[str, float]:
    """Alpha under LoRA's rule where it is not ``default``: by module, or by layer where a module's varies."""
    found: dict[str, float] = {}
    for target in targets:
        alphas = {
            layer: _alpha_as_lora(config, alpha, rank)
            for layer, (rank, alpha) in enumerate(zip(target.ranks, target.alphas, strict=True))
            if rank
        }
        if len(set(alphas.values())) == 1:
            found[target.module] = next(iter(alphas.values()))
        else:
            found |= {full_name(layer, target.module): alpha for layer, alpha in alphas.items()}
    return {re.escape(name): alpha for name, alpha in found.items() if alpha != default}


def _alpha_as_lora(config: LoraConfig, alpha: float, rank: int) -> float:
    return alpha_for("lora", scaling=scaling_factor(config.rule, alpha=alpha, rank=rank), rank=rank)


def _number(value: float) -> float | int:
    """A whole alpha as PEFT writes it, without a decimal point."""
    return int(value) if float(value).is_integer() else float(value)
