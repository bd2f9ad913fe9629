"""PEFT's ``adapter_config.json``: its names, and the one reader and validator of its entries.

The core install is enough: advice reads a tuned setting with it, adapters read what an adapter computes.
"""

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from rora_theory.errors import InputError, shown
from rora_theory.inits import Init
from rora_theory.runs.files import read_json

FILE = "adapter_config.json"
"""Name of the configuration file in an adapter's folder."""

LORA = "LORA"
"""PEFT's ``peft_type`` of LoRA, rsLoRA and DoRA."""

PeftInit = Literal["kaiming_uniform", "gaussian"]
"""Initialisations of A that PEFT has."""

PEFT_INITS: dict[Init, bool | str] = {"kaiming_uniform": True, "gaussian": "gaussian"}
"""PEFT's ``init_lora_weights`` of each `PeftInit`."""

INIT_LORA_WEIGHTS = dict.fromkeys(("true", "false", "none", "eva", "orthogonal"), "kaiming_uniform") | {
    "gaussian": "gaussian"
}
"""Distribution of A for each ``init_lora_weights``, as lower-case text, that does not change the base weights.

A saved adapter contains A itself. The distribution only describes its start, so that eva and orthogonal
count as the default.
"""

PAPER_TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
"""The modules that the DoRA and RoRA experiments adapt."""

ALL_LINEAR = "all-linear"
"""PEFT's name for every linear module but the output head; it is passed alone, never with other names."""

TaskType = Literal["CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"]
"""PEFT's task types."""

TASK_TYPES = (*get_args(TaskType), None)
"""Values of PEFT's ``task_type``, which may be absent."""

_REGEX_SIGNS = re.compile(r"[*+?|()\[\]{}^$\\]")
"""Characters of a regular expression that no module's name has."""


def without_list_of_all_linear(names: Sequence[str] | str) -> Sequence[str] | str:
    """Return `ALL_LINEAR` for a list of it alone, as command lines have it: PEFT reads it as a string only."""
    return ALL_LINEAR if list(names) == [ALL_LINEAR] else names


def peft_targets(names: Sequence[str] | str) -> str | list[str]:
    """Return ``target_modules`` as PEFT takes them: `ALL_LINEAR` or a regular expression as a string, names as a list.

    Args:
      names: Names such as ``q_proj`` and ``self_attn.q_proj``, or ``["all-linear"]``. A string is one of these, or a
        regular expression, which is recognised by its special characters.

    Raises:
      InputError: If there is no name, if a value is not a name or is listed twice, or if `ALL_LINEAR` is not alone.

    Examples:
      >>> peft_targets(["all-linear"]), peft_targets(["q_proj", "v_proj"]), peft_targets(".*[qv]_proj")
      ('all-linear', ['q_proj', 'v_proj'], '.*[qv]_proj')
    """
    valid = f"names of modules such as q_proj, each listed once, or {ALL_LINEAR} alone"
    if isinstance(names, str):
        # A string with special characters is a regular expression, any other a single name.
        if _REGEX_SIGNS.search(names):
            return _regular_expression(names)
        names = [names]
    if not isinstance(names, Iterable) or not all(isinstance(name, str) for name in names):
        raise InputError(f"targets must be {valid}, got {shown(names)}")
    if not names:
        raise InputError(f"targets must be {valid}, got an empty list")
    if without_list_of_all_linear(names) == ALL_LINEAR:
        return ALL_LINEAR
    # A name is a dotted path of identifiers, listed once.
    for name in names:
        if name == ALL_LINEAR or not re.fullmatch(r"\w+(\.\w+)*", name) or list(names).count(name) > 1:
            raise InputError(f"targets must be {valid}, got {name!r} in {' '.join(names)!r}")
    return list(names)


def _regular_expression(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise InputError(
            f"targets must be names of modules or a valid regular expression, got {shown(text)} ({error})"
        ) from None
    return text


def init_of(value: object) -> Init:
    """Return the distribution of A that PEFT's ``init_lora_weights`` names.

    Raises:
      InputError: If training would not start from B = 0 and a random A, or if A depends on the data.
    """
    for init, peft_value in PEFT_INITS.items():
        if type(peft_value) is type(value) and peft_value == value:
            return init
    raise InputError(
        f"init_lora_weights must be true or 'gaussian', got {shown(value)}. The law covers a random A with B = 0."
    )


def check_uniform(values: Mapping[str, Any]) -> None:
    """Raise `InputError` if ``values``, the entries of a ``LoraConfig``, give modules several ranks or alphas."""
    for name in ("rank_pattern", "alpha_pattern"):
        if values.get(name):
            raise InputError(f"{name} must be empty (one rank and one alpha for all), got {shown(values[name])}")


Check = Callable[[Any], bool]
Entries = Mapping[str, tuple[Any, Check, str]]
"""Entries of a configuration: PEFT's default, a predicate of valid values, and their description."""


def is_a(*kinds: type) -> Check:
    """Return a predicate of the values of a type; a bool is not an int."""
    return lambda value: isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))


def accept_none(check: Check) -> Check:
    """Return a predicate that also accepts None."""
    return lambda value: value is None or check(value)


def list_of(check: Check) -> Check:
    """Return a predicate of lists whose items all satisfy ``check``."""
    return lambda value: isinstance(value, list) and all(map(check, value))


def _object_of(check: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def _is_module_selection(value: Any) -> bool:
    return isinstance(value, str) or list_of(is_a(str))(value)


def _is_rank(value: Any) -> bool:
    return is_a(int)(value) and 1 <= value < 2**31


def _is_alpha(value: Any) -> bool:
    return is_a(int, float)(value) and 0 < value <= sys.float_info.max


def _is_init(value: Any) -> bool:
    return value is None or (isinstance(value, (bool, str)) and str(value).lower() in INIT_LORA_WEIGHTS)


def _is_dropout(value: Any) -> bool:
    return is_a(int, float)(value) and 0 <= value < 1


_NO_SIGN = "an alpha of 0 disables the adapter, and a sign belongs in lora_B"

LORA_ENTRIES: Entries = {
    "alpha_pattern": ({}, accept_none(_object_of(_is_alpha)), f"an object of numbers above 0: {_NO_SIGN}"),
    "exclude_modules": (None, accept_none(_is_module_selection), "a list of names, or a regular expression"),
    "init_lora_weights": (
        True,
        _is_init,
        "true, false, null, gaussian, eva or orthogonal (other values change the base weights)",
    ),
    "layers_pattern": (None, lambda v: v in (None, "", [], "layers", ["layers"]), "null or 'layers'"),
    "layers_to_transform": (
        None,
        lambda v: v is None or is_a(int)(v) or list_of(is_a(int))(v),
        "indices of layers",
    ),
    "lora_alpha": (8, _is_alpha, f"a number above 0: {_NO_SIGN}"),
    "lora_dropout": (0.0, _is_dropout, "a number from 0 to below 1"),
    "peft_type": (None, lambda v: v == LORA, "'LORA'"),
    "r": (8, _is_rank, "an integer of 1 or more"),
    "rank_pattern": ({}, accept_none(_object_of(_is_rank)), "an object of integers of 1 or more"),
    "target_modules": (None, _is_module_selection, "a list of names, or a regular expression"),
    "task_type": (None, lambda v: v in (None, "CAUSAL_LM"), "'CAUSAL_LM'"),
    "use_dora": (False, is_a(bool), "true or false"),
    "use_rslora": (False, is_a(bool), "true or false"),
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


def read_config_entries(path: Path) -> dict[str, Any]:
    """Read the entries of a configuration file.

    Raises:
      InputError: If the file is missing or damaged, or has no ``peft_type``.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file. Pass the folder of an adapter saved by PEFT, or its {FILE}.")
    values = read_json(path, accepted="the file as PEFT writes it")
    if not isinstance(values, dict):
        raise InputError(f"{path}: must contain a JSON object, as PEFT writes it, got a {type(values).__name__}")
    if not isinstance(values.get("peft_type"), str):
        kind = shown(values["peft_type"]) if "peft_type" in values else "no entry"
        raise InputError(f"{path}: peft_type must be a name, as PEFT writes it, got {kind}")
    return values


def validate_entries(
    path: Path, values: Mapping[str, Any], entries: Entries, *, ignore_others: bool = False
) -> dict[str, Any]:
    """Validate the values of some entries, and fill in PEFT's defaults.

    Args:
      path: Path of the file in error messages.
      values: Entries of the file.
      entries: Entries to validate.
      ignore_others: Whether other entries may enable a feature, which is refused by default; those of `IGNORED` have
        no effect.

    Returns:
      The value of every key in ``entries``.

    Raises:
      InputError: If a value is invalid, or another entry enables a feature.
    """
    validated = {}
    for key, (default, check, valid_values) in entries.items():
        validated[key] = values.get(key, default)
        if not check(validated[key]):
            raise InputError(f"{path}: {key} must be {valid_values}, got {shown(validated[key])}")
    if ignore_others:
        return validated
    # Refuse other entries unless they are off.
    for key, value in values.items():
        # Compare the types too: 0 == False, and a 0 of an unknown entry may not mean off.
        is_off = any(value == neutral and type(value) is type(neutral) for neutral in OFF)
        if key not in entries and key not in IGNORED and not is_off:
            name = key if key.isidentifier() and len(key) < 80 else shown(key)
            raise InputError(f"{path}: {name} is not supported; it must be null, false or 'none', got {shown(value)}")
    return validated
