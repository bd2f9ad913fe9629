r"""An adapter's files in the form that every client reads alike: one rank, one alpha, ``use_rslora`` false.

Not all that serves adapters reads what PEFT does: some know no ``use_rslora``, some no patterns of ranks or alphas
(docs/serving.md). What computes the same without them, for a module of rank r_i and gamma_i:

- one rank r, the largest: rows of A and columns of B beyond r_i are zero;
- one alpha, :math:`\gamma r` with the gamma of most modules, to the next integer of 1 or more: Ollama reads no other
  number, and llama.cpp leaves an alpha of 0 out;
- where gamma_i is not alpha / r, B is multiplied by :math:`\gamma_i r / \alpha`: one rounding of float32.

DoRA has no such form, since it scales the base's own weights: it can be merged into them, or refused.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rora_theory.adapters import peft_config
from rora_theory.adapters.targets import deciding
from rora_theory.errors import InputError, shown
from rora_theory.scaling import Rule, alpha_for, scaling_factor

PREFIX = "base_model.model."
KEPT = ("base_model_name_or_path", "lora_dropout", "peft_version", "revision")
"""Entries that are taken over as they are."""

Tensors = dict[str, np.ndarray]


def portable(
    path: Path, values: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> tuple[dict[str, Any], Tensors]:
    """A LoRA or RoRA adapter of any model in portable form, see the module docstring.

    Args:
      path: of the configuration, for errors.
      values: its entries, as PEFT writes them.
      tensors: by PEFT's names, float32.

    Returns:
      the entries and the tensors. Those of a module are as they were where its rank is the common one and its gamma r
      is the common alpha, as in LoRA of an integer alpha.

    Raises:
      InputError: not LoRA, or DoRA; an entry that PEFT would follow and that no portable adapter can; a tensor that is
        not of a linear module's pair.
    """
    if values["peft_type"] != peft_config.LORA:
        found = shown(values["peft_type"])
        raise InputError(f"{path}: peft_type is {found}, which has no portable form; accepted is {peft_config.LORA!r}")
    entries = peft_config.checked(path, values, peft_config.READ)
    if entries["use_dora"]:
        raise InputError(
            f"{path}: use_dora is true: it scales the base's own weights, which no LoRA adapter does; accepted is to "
            "merge it into the model"
        )
    pairs = _pairs(path, tensors)
    ranks = {name: a.shape[0] for name, (a, _) in pairs.items()}
    gammas = _gammas(path, entries, ranks)
    rank, gamma = max(ranks.values()), Counter(gammas.values()).most_common(1)[0][0]
    alpha = max(1, round(alpha_for("lora", scaling=gamma, rank=rank)))
    written: Tensors = {}
    for name, (a, b) in pairs.items():
        missing = rank - ranks[name]
        if (ratio := np.float32(gammas[name] * rank / alpha)) != 1:
            b = b * ratio
        written[f"{PREFIX}{name}.lora_A.weight"] = np.pad(a, ((0, missing), (0, 0)))
        written[f"{PREFIX}{name}.lora_B.weight"] = np.pad(b, ((0, 0), (0, missing)))
    config = {key: values[key] for key in KEPT if key in values} | {
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": alpha,
        "peft_type": peft_config.LORA,
        "r": rank,
        "target_modules": _modules(entries, set(pairs)),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    return config, written


def _pairs(path: Path, tensors: Mapping[str, np.ndarray]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A and B of every module, by its full name."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for key, tensor in tensors.items():
        name, _, kind = key.removeprefix(PREFIX).rpartition(".lora_")
        if not key.startswith(PREFIX) or kind not in ("A.weight", "B.weight") or tensor.ndim != 2:
            raise InputError(
                f"{path.parent}: has the tensor {shown(key)}; accepted are lora_A and lora_B of linear modules"
            )
        found.setdefault(name, {})[kind[0]] = tensor
    for name, pair in found.items():
        if len(pair) < 2 or pair["A"].shape[0] != pair["B"].shape[1] or not pair["A"].shape[0]:
            shapes = {kind: list(tensor.shape) for kind, tensor in pair.items()}
            raise InputError(f"{path.parent}: {name} has {shapes}; accepted is A [r, p_in] with B [p_out, r]")
    if not found:
        raise InputError(f"{path.parent}: has no tensors; accepted is an adapter as PEFT writes it")
    return {name: (pair["A"], pair["B"]) for name, pair in found.items()}


def _gammas(path: Path, entries: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, float]:
    """The scaling that PEFT gives each module. Raises `InputError` where a tensor's rank is not its entry's."""
    rule: Rule = "rora" if entries["use_rslora"] else "lora"
    decided = {
        where: deciding(where, entries[where] or {}, tuple(ranks)) for where in ("rank_pattern", "alpha_pattern")
    }

    def value(where: str, name: str, default: Any) -> Any:
        key = decided[where].get(name)
        return default if key is None else entries[where][key]

    found = {}
    for name, rank in ranks.items():
        promised = value("rank_pattern", name, entries["r"])
        if rank != promised:
            raise InputError(f"{path}: r is {promised} at {name}; accepted is {rank}, the rows of its lora_A")
        found[name] = scaling_factor(rule, alpha=value("alpha_pattern", name, entries["lora_alpha"]), rank=rank)
    return found


def _modules(entries: Mapping[str, Any], names: set[str]) -> list[str]:
    """The modules as a list without layers or exclusions: the file's own where that is one, else every full name."""
    modules = entries["target_modules"]
    if isinstance(modules, str) or entries["layers_to_transform"] not in (None, []) or entries["exclude_modules"]:
        return sorted(names)
    return sorted(modules)
