"""PEFT's ``LoraConfig``: the words that are written into one, and the setting that is read from a saved one."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from rora_theory.errors import InputError, shown
from rora_theory.inits import Init
from rora_theory.io.files import read_object
from rora_theory.scaling import check_positive, check_rank

FILE = "adapter_config.json"
"""The file in an adapter's folder."""

LARGEST = 1 << 22
"""Bytes of the largest configuration that is read; a list of every module of the largest models takes a tenth."""

MAX_ENTRIES = 20_000
"""Maximum number of entries of a list or pattern in a configuration: twice the modules of the largest dense models."""

PeftInit = Literal["kaiming_uniform", "gaussian"]
"""Initialisations of A that PEFT has."""

PEFT_INITS: dict[Init, bool | str] = {"kaiming_uniform": True, "gaussian": "gaussian"}
"""PEFT's ``init_lora_weights`` of each `PeftInit`."""

OF_DORA = "use_dora is set: the advice is of its low-rank part, and DoRA's magnitude steps alike at any alpha and rank"
"""What the user should know of a DoRA adapter's setting."""

CARRIED = (
    "use_dora", "lora_dropout", "bias", "lora_bias", "modules_to_save", "layers_to_transform", "layers_pattern",
    "exclude_modules", "target_parameters", "trainable_token_indices", "layer_replication", "fan_in_fan_out",
)  # fmt: skip
"""Entries of a saved ``LoraConfig`` that stay as they are at another rank."""

PASSED_OVER = (
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "use_rslora", "init_lora_weights", "target_modules", "rank_pattern", "alpha_pattern",
    "megatron_core", "qalora_group_size",
)  # fmt: skip
"""Entries that the advice gives anew, or that say nothing of training."""

PAPER_TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
"""The modules that the DoRA and RoRA experiments adapt."""

ALL_LINEAR = "all-linear"
"""PEFT's word for every linear module but the output head; it stands alone, not in a list."""

TaskType = Literal["CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"]
"""PEFT's task types."""


def peft_targets(names: Sequence[str] | str) -> str | list[str]:
    """``target_modules`` as PEFT takes them: `ALL_LINEAR` or a regular expression as a string, names as a list.

    Args:
      names: names such as ``q_proj`` and ``self_attn.q_proj``, or ``["all-linear"]``; a string is one of these, or a
        regular expression, which is told by its signs.

    Raises:
      InputError: none, what is no name, one twice, `ALL_LINEAR` beside others, or one that no module's name can be.

    Examples:
      >>> peft_targets(["all-linear"]), peft_targets(["q_proj", "v_proj"]), peft_targets(".*[qv]_proj")
      ('all-linear', ['q_proj', 'v_proj'], '.*[qv]_proj')
    """
    accepted = f"names of modules such as q_proj, each by itself, or {ALL_LINEAR} alone"
    if isinstance(names, str):
        if _SIGNS.search(names):
            return _expression(names)
        names = [names]
    if not isinstance(names, Iterable) or not all(isinstance(name, str) for name in names):
        raise InputError(f"targets is {shown(names)}; accepted are {accepted}")
    if not names:
        raise InputError(f"targets is empty; accepted are {accepted}")
    if list(names) == [ALL_LINEAR]:
        return ALL_LINEAR
    for name in names:
        if name == ALL_LINEAR or not re.fullmatch(r"\w+(\.\w+)*", name) or list(names).count(name) > 1:
            raise InputError(f"targets has {name!r} in {' '.join(names)!r}; accepted are {accepted}")
    return list(names)


_SIGNS = re.compile(r"[*+?|()\[\]{}^$\\]")
"""What a regular expression has, and no module's name."""


def _expression(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise InputError(f"targets is {shown(text)}: {error}; accepted is a regular expression, or names") from None
    return text


def init_of(word: object) -> Init:
    """The law of A that PEFT's ``init_lora_weights`` names.

    Raises:
      InputError: one that does not begin with B = 0 and a random A, or whose A depends on the data.
    """
    for init, known in PEFT_INITS.items():
        if type(known) is type(word) and known == word:
            return init
    raise InputError(
        f"init_lora_weights is {shown(word)}, whose steps are not covered here: the law is of B = 0 and a random A; "
        "accepted are true and 'gaussian'"
    )


def check_task_type(word: object) -> None:
    """Raise `InputError` unless it is a `TaskType` or None."""
    if word is not None and word not in get_args(TaskType):
        raise InputError(f"task_type is {shown(word)}; accepted are {', '.join(get_args(TaskType))}")


def check_uniform(values: Mapping[str, Any]) -> None:
    """Raise `InputError` where ``values``, the entries of a ``LoraConfig``, give modules several ranks or alphas."""
    for name in ("rank_pattern", "alpha_pattern"):
        if values.get(name):
            raise InputError(f"{name} is {shown(values[name])}; accepted is none: one rank and one alpha")


def check_entry_counts(path: Path, values: Mapping[str, Any]) -> None:
    """Raise `InputError` for a list or pattern of more than `MAX_ENTRIES`, as each is matched with each module."""
    for key, value in values.items():
        if isinstance(value, list | dict) and len(value) > MAX_ENTRIES:
            raise InputError(f"{path}: {shown(key)} has {len(value):,} entries; accepted are at most {MAX_ENTRIES:,}")


class Saved(NamedTuple):
    """What a saved adapter says of itself.

    Attributes:
      rank: r.
      alpha: lora_alpha.
      rule: ``"rslora"`` where use_rslora is set.
      init: law of A.
      targets: target_modules for `peft_targets`; None where the file has none or a regular expression.
      remarks: what the user should know, a sentence each.
      expression: the regular expression of target_modules, or None.
      task_type: PEFT's.
      others: of `CARRIED` what the file has, where it is not PEFT's default.
    """

    rank: int
    alpha: float
    rule: Literal["lora", "rslora"]
    init: Init
    targets: tuple[str, ...] | None
    remarks: tuple[str, ...]
    expression: str | None = None
    task_type: TaskType | None = "CAUSAL_LM"
    others: Mapping[str, Any] = {}


def read_adapter_config(path: str | Path) -> Saved:
    """The setting in an ``adapter_config.json``, PEFT's defaults where it is silent.

    Args:
      path: the file, or the adapter's folder.

    Raises:
      InputError: no such file, not LoRA's, an entry that is wrong, patterns (modules of several ranks or alphas), or an
        init that `init_of` refuses.
    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    values = read_object(path, LARGEST, accepted="an adapter_config.json as PEFT writes it")
    check_entry_counts(path, values)

    def entry(name: str, default: Any, kind: type | tuple[type, ...], accepted: str) -> Any:
        value = values.get(name, default)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise InputError(f"{path}: {name} is {shown(value)}; accepted is {accepted}")
        return value

    if values.get("peft_type") != "LORA":
        raise InputError(f"{path}: peft_type is {shown(values.get('peft_type'))}; accepted is 'LORA'")
    try:
        check_uniform(values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    rank = entry("r", 8, int, "an integer of 1 or more")
    alpha = entry("lora_alpha", 8, (int, float), "a number above 0")
    try:
        check_rank(rank)
        check_positive("lora_alpha", alpha)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    try:
        init = init_of(values.get("init_lora_weights", True))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    targets = entry("target_modules", None, (list, str, type(None)), "a list of names, or a regular expression")
    task_type = entry("task_type", None, (str, type(None)), "a task type of PEFT's, or null")
    try:
        check_task_type(task_type)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    silent = [name for name in ("r", "lora_alpha") if name not in values]
    remarks = [f"{path} has no {name}: PEFT's default, 8, is taken" for name in silent]
    if values.get("use_dora"):
        remarks.append(OF_DORA)
    unknown = [name for name in values if name not in (*CARRIED, *PASSED_OVER) and values[name]]
    if unknown:
        remarks.append(f"{', '.join(unknown)} of {path}: not carried over, and not known to the law")
    others = {name: values[name] for name in CARRIED if values.get(name) and values[name] != "none"}
    expression = None
    if targets is not None:
        if not all(isinstance(name, str) for name in targets):
            raise InputError(f"{path}: target_modules is {shown(targets)}; accepted is a list of names")
        try:
            found = peft_targets(targets)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        expression = found if isinstance(found, str) and found != ALL_LINEAR else None
        targets = None if expression else (found,) if isinstance(found, str) else tuple(found)
    rslora = entry("use_rslora", False, bool, "true or false")
    rule: Literal["lora", "rslora"] = "rslora" if rslora else "lora"
    return Saved(rank, float(alpha), rule, init, targets, tuple(remarks), expression, task_type, others)
