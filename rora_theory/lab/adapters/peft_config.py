"""Conversion of LoRA's configuration from and to the entries of PEFT's `adapter_config.json`."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rora_theory.advice.adapter_config import INIT_LORA_WEIGHTS, LORA, LORA_ENTRIES, validate_entries
from rora_theory.errors import InputError, shown
from rora_theory.lab.adapters.lora import LoraConfig
from rora_theory.lab.adapters.targets import Target, first_matches, full_name, known_names, matched
from rora_theory.lab.llama import LlamaConfig
from rora_theory.scaling import KAPPAS, alpha_for, exponent, scaling_factor


def to_peft(config: LoraConfig, targets: Sequence[Target], base_model: str | None) -> dict[str, Any]:
    r"""Return the entries of PEFT's configuration file that affect what it computes.

    In PEFT, the first entry of a pattern that matches a module wins, so that their order matters. The patterns are
    written in resolved form instead: no two entries match the same name.

    PEFT has no flag for a rule whose kappa is neither 1 nor 1/2. Such a rule is written as LoRA with the alphas that
    give the same gamma, :math:`\alpha' = \gamma r`, in ``alpha_pattern`` if they differ between modules.
    """
    kappa = exponent(config.rule)
    has_flag = kappa in KAPPAS.values()

    def alphas(target: Target) -> list[float]:
        if has_flag:
            return list(target.alphas)
        pairs = zip(target.alphas, target.ranks, strict=True)
        return [_alpha_as_lora(config, alpha, rank) if rank else alpha for alpha, rank in pairs]

    # Common alpha; modules that need another one are listed in alpha_pattern.
    alpha: float = config.alpha if has_flag else _alpha_as_lora(config, config.alpha, config.rank)
    # Entries that decide what PEFT computes; the others are constants of a causal language model.
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


def lora_config_of(
    path: Path, values: Mapping[str, Any], llama_config: LlamaConfig
) -> tuple[LoraConfig, tuple[Target, ...]]:
    """Convert a file's entries to LoRA's configuration, and resolve it for a model.

    Raises:
      InputError: If an entry is invalid, or the model does not have the modules and layers.
    """
    entries = validate_entries(path, values, LORA_ENTRIES)
    try:
        config = _from_entries(entries, llama_config)
        return config, config.targets(llama_config, bounded=False)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _from_entries(entries: Mapping[str, Any], llama_config: LlamaConfig) -> LoraConfig:
    """Convert entries as PEFT does, ignoring names, layers and patterns that the model does not have."""
    modules, excluded = entries["target_modules"], entries["exclude_modules"] or ()
    layers = entries["layers_to_transform"]
    # PEFT ignores names that match nothing, provided that another name matches.
    if not isinstance(modules, str):
        modules = known_names(llama_config, modules) or modules
    # PEFT reads an empty list as all layers, and ignores layers that do not exist.
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
        rank_pattern=_matching_entries("rank_pattern", entries, chosen),
        alpha_pattern=_matching_entries("alpha_pattern", entries, chosen),
        layers=layers,
        use_dora=entries["use_dora"],
    )


def _matching_entries(name: str, entries: Mapping[str, Any], modules: Sequence[str]) -> dict[str, Any]:
    """Return the entries of the pattern ``name`` that apply to one of the modules, in the file's order."""
    pattern = entries[name] or {}
    used = set(first_matches(name, pattern, modules).values())
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
