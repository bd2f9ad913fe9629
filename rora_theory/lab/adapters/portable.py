r"""Portable form of an adapter, which every client interprets alike: one rank, one alpha, ``use_rslora`` false.

Not every program that serves adapters reads all of PEFT's settings: some ignore ``use_rslora``, some the patterns of
ranks and alphas (docs/serving.md). The portable form computes the same without them. For modules of rank r_i and
scaling gamma_i:

- All modules have the largest rank r: rows of A and columns of B beyond r_i are zero.
- All modules have one alpha, :math:`\gamma r` with the most common gamma, rounded to an integer of at least 1, because
  Ollama reads integers only and llama.cpp ignores an alpha of 0.
- If gamma_i is not alpha / r, B is multiplied by :math:`\gamma_i r / \alpha`, with one rounding in float32.

DoRA has no portable form, because it scales the base weights. Merge it into them instead.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rora_theory.advice.adapter_config import LORA, LORA_ENTRIES, validate_entries
from rora_theory.errors import InputError, shown
from rora_theory.lab.adapters.targets import first_matches
from rora_theory.scaling import Rule, alpha_for, scaling_factor

PREFIX = "base_model.model."
COPIED_ENTRIES = ("base_model_name_or_path", "lora_dropout", "peft_version", "revision")
"""Entries that are copied unchanged."""

Tensors = dict[str, np.ndarray]


def portable(
    path: Path, values: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> tuple[dict[str, Any], Tensors]:
    """Convert a LoRA or RoRA adapter of any model to portable form, see the module docstring.

    Returns:
      The entries and the tensors. A module's tensors are unchanged if it has the common rank and scaling, and the
      common alpha is an integer, as for LoRA with an integer alpha.

    Raises:
      InputError: If the adapter is not LoRA or is DoRA, an entry has no portable equivalent, or a tensor does not
        belong to a linear module.
    """
    if values["peft_type"] != LORA:
        kind = shown(values["peft_type"])
        raise InputError(f"{path}: peft_type {kind} has no portable form; supported: {LORA!r}")
    entries = validate_entries(path, values, LORA_ENTRIES)
    if entries["use_dora"]:
        raise InputError(
            f"{path}: use_dora true has no portable form, because DoRA scales the base weights. Merge the adapter into "
            "the model instead."
        )
    # Common rank and most common scaling, from which the common alpha follows.
    pairs = _pairs(path, tensors)
    ranks = {name: a.shape[0] for name, (a, _) in pairs.items()}
    gammas = _gammas(path, entries, ranks)
    rank, gamma = max(ranks.values()), Counter(gammas.values()).most_common(1)[0][0]
    alpha = max(1, round(alpha_for("lora", scaling=gamma, rank=rank)))
    # Rescale B where the scaling differs, and pad A and B to the common rank.
    portable_tensors: Tensors = {}
    for name, (a, b) in pairs.items():
        padding = rank - ranks[name]
        if (ratio := np.float32(gammas[name] * rank / alpha)) != 1:
            b = b * ratio
        portable_tensors[f"{PREFIX}{name}.lora_A.weight"] = np.pad(a, ((0, padding), (0, 0)))
        portable_tensors[f"{PREFIX}{name}.lora_B.weight"] = np.pad(b, ((0, 0), (0, padding)))
    # Entries that every client reads, with the defaults of those that some ignore.
    config = {key: values[key] for key in COPIED_ENTRIES if key in values} | {
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": alpha,
        "peft_type": LORA,
        "r": rank,
        "target_modules": _modules(entries, set(pairs)),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    return config, portable_tensors


def _pairs(path: Path, tensors: Mapping[str, np.ndarray]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return A and B of every module by its full name."""
    # Collect A and B of each module, and reject tensors of any other kind.
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for key, tensor in tensors.items():
        name, _, kind = key.removeprefix(PREFIX).rpartition(".lora_")
        if not key.startswith(PREFIX) or kind not in ("A.weight", "B.weight") or tensor.ndim != 2:
            raise InputError(
                f"{path.parent}: unsupported tensor {shown(key)}; supported: lora_A and lora_B of linear modules"
            )
        pairs.setdefault(name, {})[kind[0]] = tensor
    # Both factors must be there, with one rank.
    for name, pair in pairs.items():
        if len(pair) < 2 or pair["A"].shape[0] != pair["B"].shape[1] or not pair["A"].shape[0]:
            shapes = {kind: list(tensor.shape) for kind, tensor in pair.items()}
            raise InputError(f"{path.parent}: {name} must have A [r, p_in] and B [p_out, r], got {shapes}")
    if not pairs:
        raise InputError(f"{path.parent} has no tensors. Pass the folder of an adapter saved by PEFT.")
    return {name: (pair["A"], pair["B"]) for name, pair in pairs.items()}


def _gammas(path: Path, entries: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, float]:
    """Return the scaling that PEFT gives each module, or raise `InputError` if a rank differs from its entry."""
    rule: Rule = "rora" if entries["use_rslora"] else "lora"
    matches = {
        where: first_matches(where, entries[where] or {}, tuple(ranks)) for where in ("rank_pattern", "alpha_pattern")
    }

    def value(where: str, name: str, default: Any) -> Any:
        key = matches[where].get(name)
        return default if key is None else entries[where][key]

    gammas = {}
    for name, rank in ranks.items():
        # PEFT computes the scaling from the configured rank, so it must be that of the tensors.
        configured = value("rank_pattern", name, entries["r"])
        if rank != configured:
            raise InputError(f"{path}: r must be {rank} at {name}, the number of rows of its lora_A, got {configured}")
        gammas[name] = scaling_factor(rule, alpha=value("alpha_pattern", name, entries["lora_alpha"]), rank=rank)
    return gammas


def _modules(entries: Mapping[str, Any], names: set[str]) -> list[str]:
    """Return a list of modules that needs no layers and exclusions: the file's, or else all full names."""
    modules = entries["target_modules"]
    if isinstance(modules, str) or entries["layers_to_transform"] not in (None, []) or entries["exclude_modules"]:
        return sorted(names)
    return sorted(modules)
