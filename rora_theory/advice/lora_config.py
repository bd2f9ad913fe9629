"""The tuned setting in a saved PEFT ``LoraConfig``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rora_theory.advice.adapter_config import (
    ALL_LINEAR,
    LORA_ENTRIES,
    TASK_TYPES,
    Entries,
    TaskType,
    accept_none,
    check_uniform,
    init_of,
    is_a,
    list_of,
    peft_targets,
    validate_entries,
)
from rora_theory.errors import InputError
from rora_theory.inits import Init
from rora_theory.optimizers import OptimizerName
from rora_theory.scaling import check_choice

DORA_REMARK = (
    "use_dora is set: the advice covers its low-rank part; the step of DoRA's magnitude has no alpha and no rank"
)
"""Remark on the setting of a DoRA adapter."""

COPIED_ENTRIES = (
    "use_dora", "lora_dropout", "bias", "lora_bias", "modules_to_save", "layers_to_transform", "layers_pattern",
    "exclude_modules", "target_parameters", "trainable_token_indices", "layer_replication", "fan_in_fan_out",
    "ensure_weight_tying",
)  # fmt: skip
"""Entries of a saved ``LoraConfig`` that stay as they are at another rank."""

NOT_COPIED = (
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "use_rslora", "init_lora_weights", "target_modules", "rank_pattern", "alpha_pattern",
    "megatron_core", "qalora_group_size",
)  # fmt: skip
"""Entries that the advice replaces, or that do not affect training."""

ADVICE_ENTRIES: Entries = {
    "peft_type": LORA_ENTRIES["peft_type"],
    "r": LORA_ENTRIES["r"],
    "lora_alpha": LORA_ENTRIES["lora_alpha"],
    "use_rslora": LORA_ENTRIES["use_rslora"],
    "target_modules": (
        None,
        accept_none(lambda value: isinstance(value, str) or list_of(is_a(str))(value)),
        "a list of names, or a regular expression",
    ),
}
"""Entries that the advice reads whose value alone decides whether they are valid."""


class SavedSetting(NamedTuple):
    """The tuned setting in a saved adapter, or in the configuration file of a trainer.

    Attributes:
      rank: Rank of the adapter.
      alpha: PEFT's ``lora_alpha``.
      rule: ``"rslora"`` if ``use_rslora`` is set.
      init: Distribution of A.
      targets: Target modules for `peft_targets`; None if the file has none or a regular expression.
      remarks: Sentences on defaults that were assumed and on entries that the advice does not cover.
      expression: Regular expression of the target modules, or None.
      task_type: PEFT's task type.
      other_entries: Entries of `COPIED_ENTRIES` in the file that differ from PEFT's default.
      learning_rate: Learning rate, which only a trainer's file has.
      optimizer: Optimizer in a trainer's file.
      schedule: Name of the learning-rate schedule in a trainer's file, without the suffix of a warm-up.
      steps: Maximum number of steps in a trainer's file; None if the epochs determine it.
      epochs: Number of epochs in a trainer's file.
    """

    rank: int
    alpha: float
    rule: Literal["lora", "rslora"]
    init: Init
    targets: tuple[str, ...] | None
    remarks: tuple[str, ...]
    expression: str | None = None
    task_type: TaskType | None = "CAUSAL_LM"
    other_entries: Mapping[str, Any] = {}
    learning_rate: float | None = None
    optimizer: OptimizerName | None = None
    schedule: str | None = None
    steps: int | None = None
    epochs: float | None = None


def saved_from_entries(path: Path, values: Mapping[str, Any]) -> SavedSetting:
    """Return the tuned setting in the entries of a ``LoraConfig``.

    Args:
      path: Path of the file in error messages.
      values: Entries, as PEFT writes them.

    Raises:
      InputError: If the entries are not LoRA's, one is invalid, modules have several ranks or alphas, or `init_of`
        refuses the initialisation.
    """
    # Validate single entries, then the combinations that the law does not cover.
    entries = validate_entries(path, values, ADVICE_ENTRIES, ignore_others=True)
    try:
        check_uniform(values)
        init = init_of(values.get("init_lora_weights", True))
        check_choice("task_type", values.get("task_type"), TASK_TYPES)
        # PEFT's empty list adapts the target parameters alone.
        has_no_modules = entries["target_modules"] is None or (
            entries["target_modules"] == [] and values.get("target_parameters")
        )
        targets = None if has_no_modules else peft_targets(entries["target_modules"])
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    # A regular expression and a single name are both strings; only a name is a target by itself.
    expression = targets if isinstance(targets, str) and targets != ALL_LINEAR else None
    names = None
    if targets is not None and expression is None:
        names = (targets,) if isinstance(targets, str) else tuple(targets)
    # Remarks for the user: defaults, DoRA, and entries that the law does not cover.
    remarks = [
        f"{path} has no {name}: PEFT's default, 8, is used" for name in ("r", "lora_alpha") if name not in values
    ]
    if values.get("use_dora"):
        remarks.append(DORA_REMARK)
    unknown_names = [name for name in values if name not in (*COPIED_ENTRIES, *NOT_COPIED) and values[name]]
    if unknown_names:
        remarks.append(f"{', '.join(unknown_names)} of {path}: not copied, and not covered by the law")
    return SavedSetting(
        entries["r"],
        float(entries["lora_alpha"]),
        "rslora" if entries["use_rslora"] else "lora",
        init,
        names,
        tuple(remarks),
        expression,
        values.get("task_type"),
        {name: values[name] for name in COPIED_ENTRIES if values.get(name) and values[name] != "none"},
    )
