"""Fresh adapters of PEFT on a base model, for a setting of rank, alpha, rule and initialisation."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from rora_theory.advice.adapter_config import PEFT_INITS
from rora_theory.advice.setting import Setting
from rora_theory.errors import InputError, first_line
from rora_theory.scaling import exponent


def add_adapter(
    model: torch.nn.Module,
    setting: Setting,
    target_modules: Sequence[str] | str,
    alpha_pattern: Mapping[str, float] | None = None,
) -> Any:
    """Add a fresh LoRA adapter of a setting to a base model.

    Under any rule, PEFT's alpha / r is the setting's scaling alpha / r^kappa.

    Args:
      model: Base model without adapters, to which PEFT's layers are added.
      setting: Rank, alpha, rule and initialisation.
      target_modules: Target modules in PEFT's format.
      alpha_pattern: Alphas of modules that differ from the setting's, in PEFT's format.

    Returns:
      The PEFT model.

    Raises:
      InputError: If PEFT has no such initialisation or refuses the target modules.
    """
    if setting.init not in PEFT_INITS:
        raise InputError(f"init must be one of {', '.join(PEFT_INITS)}, got {setting.init!r}")
    # PEFT divides by the rank, so that alpha is multiplied by what the rule leaves.
    factor = setting.rank ** (1 - exponent(setting.rule))
    config: Any = LoraConfig(
        r=setting.rank,
        lora_alpha=factor * setting.alpha,
        alpha_pattern={name: factor * alpha for name, alpha in (alpha_pattern or {}).items()},
        init_lora_weights=PEFT_INITS[setting.init],
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
    )
    try:
        # Newer versions of transformers have warnings about PEFT's.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return get_peft_model(model, config)
    except ValueError as error:
        raise InputError(f"target_modules does not suit the model: {first_line(error)}") from error
