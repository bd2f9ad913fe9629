"""Tuned settings in the configuration files of PEFT, Axolotl and LLaMA-Factory, and the same files at another rank.

The keys of a file determine its format:

- PEFT: the ``adapter_config.json`` that ``save_pretrained`` writes, with the key ``peft_type``.
- Axolotl: YAML with the key ``adapter``.
- LLaMA-Factory: YAML or JSON with one of the keys ``stage``, ``finetuning_type``, ``lora_rank`` and ``lora_target``.

Names and defaults are those of Axolotl 0.18.0 (``src/axolotl/utils/schemas/``), LLaMA-Factory 0.9.6
(``src/llamafactory/hparams/finetuning_args.py``), and transformers 5.24.0 (``TrainingArguments``).

    tuned = read_trainer_config("axolotl.yml")
    advice = transfer(Setting(tuned.rank, tuned.alpha, tuned.learning_rate, tuned.rule, tuned.optimizer), rank=128)
    write_trainer_config("axolotl.yml", "axolotl_128.yml", advice)
"""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, isclose, nan
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rora_theory.advice.adapter_config import (
    ALL_LINEAR,
    FILE,
    LORA_ENTRIES,
    Check,
    is_a,
)
from rora_theory.advice.lora_config import SavedSetting, saved_from_entries
from rora_theory.advice.modules import AlphaGrouping
from rora_theory.advice.transfer import Advice
from rora_theory.errors import InputError, shown
from rora_theory.optimizers import OptimizerName, parse_optimizer
from rora_theory.runs.files import parse_json, parse_yaml, read_text, write_whole

Format = Literal["PEFT", "Axolotl", "LLaMA-Factory"]
"""Formats of configuration files."""

PEFT_KEYS = ("peft_type",)
AXOLOTL_KEYS = ("adapter",)
LLAMA_FACTORY_KEYS = ("stage", "finetuning_type", "lora_rank", "lora_target")
"""Keys by which a format is recognised; no other of the formats has them."""

AXOLOTL_ADAPTERS = ("lora", "qlora")
"""Values of Axolotl's ``adapter`` that are LoRA."""

TRAINER_LEARNING_RATE = 5e-5
"""Default of ``learning_rate`` in transformers' ``TrainingArguments``, which LLaMA-Factory extends."""

TRAINER_OPTIMIZER = "adamw_torch_fused"
"""Default of ``optim`` in transformers' ``TrainingArguments``, and of Axolotl's ``optimizer``."""

NOT_COVERED = (
    "adapter_name_or_path",
    "embedding_lr",
    "embedding_lr_scale",
    "lora_exclude_modules",
    "lora_fan_in_fan_out",
    "lora_model_dir",
    "lora_target_parameters",
    "loraplus_lr_ratio",
    "lr_groups",
    "peft_ensure_weight_tying",
    "peft_layer_replication",
    "peft_layers_pattern",
    "peft_layers_to_transform",
    "peft_trainable_token_indices",
    "relora",
)
"""Keys of the trainers that the advice does not cover. A file that is written keeps them."""

WITH_WARM_UP = "_with_warmup"
"""End of the Trainer's name of the constant rate after a warm-up; other schedules have a warm-up by any name."""

WARM_UP_KEYS = ("warmup_steps", "warmup_ratio")
"""Keys of the warm-up in both trainers."""

OTHER_OPTIMIZERS = ("use_galore", "use_apollo", "use_badam", "use_adam_mini", "use_muon")
"""LLaMA-Factory's flags that replace the optimizer of ``optim``."""


@dataclass(frozen=True)
class _Keys:
    """Keys of a format.

    Attributes:
      rank: Key of the rank.
      rslora: Key of the flag for ``alpha / sqrt(r)``.
    """

    rank: str
    rslora: str


@dataclass(frozen=True)
class _TrainerKeys(_Keys):
    """Keys of a trainer's format, with its defaults.

    Attributes:
      optimizer: Key of the optimizer.
      schedule: Key of the learning-rate schedule.
      epochs: Key of the number of epochs.
      default_schedule: Schedule of a file without one.
      default_epochs: Number of epochs of a file without one.
      default_learning_rate: Learning rate of a file without one; None if the trainer requires one.
    """

    optimizer: str
    schedule: str
    epochs: str
    default_schedule: str
    default_epochs: float
    default_learning_rate: float | None


PEFT = _Keys("r", "use_rslora")
AXOLOTL = _TrainerKeys(
    rank="lora_r",
    rslora="peft_use_rslora",
    optimizer="optimizer",
    schedule="lr_scheduler",
    epochs="num_epochs",
    default_schedule="cosine",
    default_epochs=1.0,
    default_learning_rate=None,
)
LLAMA_FACTORY = _TrainerKeys(
    rank="lora_rank",
    rslora="use_rslora",
    optimizer="optim",
    schedule="lr_scheduler_type",
    epochs="num_train_epochs",
    default_schedule="linear",
    default_epochs=3.0,
    default_learning_rate=TRAINER_LEARNING_RATE,
)

KEYS: dict[Format, _Keys] = {"PEFT": PEFT, "Axolotl": AXOLOTL, "LLaMA-Factory": LLAMA_FACTORY}
"""Keys of each format. All three store alpha as ``lora_alpha``, and the trainers the rate as ``learning_rate``."""


class _Document(NamedTuple):
    """A configuration file whose format is known."""

    path: Path
    format: Format
    text: str
    values: dict[str, Any]

    def entry(self, name: str, default: Any, check: Check, valid_values: str) -> Any:
        """Return the value of a key, or the default if the key is missing or null.

        Raises:
          InputError: If the value is invalid.
        """
        value = self.values.get(name)
        if value is None:
            return default
        if not check(value):
            raise InputError(f"{self.path}: {name} must be {valid_values}, got {shown(value)}")
        return value

    def flag(self, name: str) -> bool:
        """Return the value of a flag, which is off by default."""
        return bool(self.entry(name, False, is_a(bool), "true or false"))

    def rank(self, name: str, default: int | None = None) -> int:
        """Return the rank."""
        _, check, valid_values = LORA_ENTRIES["r"]
        rank = self.entry(name, default, check, valid_values)
        if rank is None:
            raise InputError(f"{self.path}: {name} must be {valid_values}, got no value")
        return int(rank)

    def alpha(self, default: float | None = None) -> float:
        """Return ``lora_alpha``."""
        alpha = self.entry("lora_alpha", default, LORA_ENTRIES["lora_alpha"][1], "a number above 0")
        if alpha is None:
            raise InputError(f"{self.path}: lora_alpha must be a number above 0, got no value")
        return float(alpha)

    def learning_rate(self, default: float | None = None) -> float:
        """Return the learning rate."""
        value: Any = self.values.get("learning_rate")
        value = default if value is None else value
        rate = _number_of(value)
        if not 0 < rate < inf:
            raise InputError(f"{self.path}: learning_rate must be a number above 0, got {shown(value)}")
        return rate

    def dropout(self) -> float:
        """Return ``lora_dropout``, which is 0 by default."""
        _, check, valid_values = LORA_ENTRIES["lora_dropout"]
        return _number_of(self.entry("lora_dropout", 0.0, lambda value: check(_number_of(value)), valid_values))

    def optimizer(self, name: str) -> OptimizerName:
        """Return the optimizer by this package's name."""
        trainer_name = self.entry(name, TRAINER_OPTIMIZER, is_a(str), "the name of an optimizer")
        try:
            return parse_optimizer(trainer_name)
        except InputError:
            raise InputError(
                f"{self.path}: {name} must be a variant of adamw or sgd, got {shown(trainer_name)}"
            ) from None

    def steps(self) -> int | None:
        """Return ``max_steps``, or None if the number of steps follows from the epochs."""
        steps = self.entry("max_steps", -1, is_a(int), "an integer")
        return int(steps) if steps > 0 else None

    def epochs(self, name: str, default: float) -> float:
        """Return the number of epochs."""
        return float(self.entry(name, default, lambda v: is_a(int, float)(v) and v > 0, "a number above 0"))


def _number_of(value: Any) -> float:
    """Return a number, or NaN. Text is converted, as the trainers do with a quoted number."""
    try:
        return float(value) if is_a(int, float, str)(value) else nan
    except (ValueError, OverflowError):
        return nan


def read_trainer_config(path: str | Path) -> SavedSetting:
    """Read the tuned setting from a configuration file of PEFT, Axolotl or LLaMA-Factory.

    Args:
      path: The file, or the folder of an adapter saved by PEFT.

    Returns:
      The setting. An ``adapter_config.json`` has no learning rate, optimizer, schedule or number of steps.

    Raises:
      InputError: If the format is unknown, or if a value is invalid or has no law.
    """
    document = _open_config(path)
    if document.format == "Axolotl":
        return _read_axolotl(document)
    if document.format == "LLaMA-Factory":
        return _read_llama_factory(document)
    return saved_from_entries(document.path, document.values)


def write_trainer_config(path: str | Path, out: str | Path, advice: Advice, *, per: AlphaGrouping = "one") -> None:
    """Write a configuration file again with the advised rank, alpha, rule and learning rate, and the new run.

    The number of steps and the schedule are written if they change, because the learning rate depends on them. YAML
    keeps its other keys, its comments and its layout. JSON keeps its other keys.

    Args:
      path: The file that `read_trainer_config` read.
      out: The new file, which must not exist.
      advice: Advice for the setting in the file.
      per: Modules that share an alpha, see `Advice.alpha_pattern`. A file has one alpha, so that ``"type"`` and
        ``"module"`` are valid only if the advice has one.

    Raises:
      InputError: If ``out`` exists or its folder does not, if the advice has several alphas, or if its alpha is not
        an integer where the trainer requires one.
    """
    # Check everything before the file is written.
    document, out = _open_config(path), Path(out)
    if out.exists():
        raise InputError(f"{out}: the file exists. Choose another name, or remove it.")
    if not out.parent.is_dir():
        raise InputError(f"{out}: {out.parent} is not a folder. Create it, or write to another one.")
    if not advice.fixes_alpha and advice.alpha_pattern(per):
        raise InputError(f"per must be 'one' to write one alpha to {out}, got {shown(per)}")
    changes = _changed_values(document, advice)
    if document.format == "PEFT" or document.path.suffix == ".json":
        write_whole(out, json.dumps(document.values | changes, indent=2) + "\n")
    else:
        write_whole(out, _edit_yaml(document, changes))


def _open_config(path: str | Path) -> _Document:
    """Read a file and recognise its format."""
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    supported = f"{FILE} of PEFT, or the YAML of Axolotl (key adapter) or LLaMA-Factory (key lora_rank)"
    text = read_text(path, accepted=supported)
    if path.suffix == ".json":
        values = parse_json(text, where=str(path), accepted=supported)
    else:
        values = parse_yaml(text, where=str(path), accepted=supported)
    # Recognise the format by keys that only one of them has.
    keys = {name for name in values if isinstance(name, str)} if isinstance(values, dict) else set()
    distinctive_keys: dict[Format, tuple[str, ...]] = {
        "PEFT": PEFT_KEYS,
        "Axolotl": AXOLOTL_KEYS,
        "LLaMA-Factory": LLAMA_FACTORY_KEYS,
    }
    formats = [name for name, format_keys in distinctive_keys.items() if keys & {*format_keys}]
    if len(formats) != 1:
        matches = " and ".join(formats) if formats else "neither"
        raise InputError(f"{path}: the format must be {supported}; its keys are those of {matches}")
    return _Document(path, formats[0], text, values)


def _read_axolotl(document: _Document) -> SavedSetting:
    """Read the tuned setting from Axolotl's keys, translated to PEFT's entries."""
    path, values = document.path, document.values
    if values["adapter"] not in AXOLOTL_ADAPTERS:
        raise InputError(f"{path}: adapter must be {' or '.join(AXOLOTL_ADAPTERS)}, got {shown(values['adapter'])}")
    # lora_target_linear adds all linear modules to the list; PEFT's name for them stands alone.
    names: Any = ALL_LINEAR if document.flag("lora_target_linear") else values.get("lora_target_modules")
    entries = {
        "r": document.rank("lora_r"),
        "lora_alpha": document.alpha(),
        "use_rslora": document.flag("peft_use_rslora"),
        "use_dora": document.flag("peft_use_dora"),
        "init_lora_weights": True if not values.get("peft_init_lora_weights") else values["peft_init_lora_weights"],
        "target_modules": names or None,
        "rank_pattern": values.get("lora_rank_pattern"),
        "alpha_pattern": values.get("lora_alpha_pattern"),
        "lora_dropout": document.dropout(),
        "modules_to_save": values.get("lora_modules_to_save"),
    }
    # LoftQ starts from B other than 0.
    peft = values.get("peft")
    if isinstance(peft, dict) and peft.get("loftq_config"):
        raise InputError(f"{path}: peft must have no loftq_config, got {shown(peft)}. The law covers B = 0.")
    return _with_run(document, entries, AXOLOTL)


def _read_llama_factory(document: _Document) -> SavedSetting:
    """Read the tuned setting from LLaMA-Factory's keys, translated to PEFT's entries."""
    path, values = document.path, document.values
    kind = values.get("finetuning_type")
    if kind not in (None, "lora"):
        raise InputError(f"{path}: finetuning_type must be lora, got {shown(kind)}")
    # The law assumes AdamW or SGD, and B = 0 at the start.
    for name in ("pissa_init", *OTHER_OPTIMIZERS):
        if document.flag(name):
            raise InputError(f"{path}: {name} must be false, got True. The law covers AdamW and SGD from B = 0.")
    # Defaults of LLaMA-Factory: rank 8, twice the rank as alpha, and all linear modules.
    rank = document.rank("lora_rank", 8)
    names: Any = values.get("lora_target")
    if isinstance(names, str):
        names = [name.strip() for name in names.split(",")]
    if names is None or names == ["all"]:
        names = ALL_LINEAR
    extra: Any = values.get("additional_target")
    entries = {
        "r": rank,
        "lora_alpha": document.alpha(2.0 * rank),
        "use_rslora": document.flag("use_rslora"),
        "use_dora": document.flag("use_dora"),
        "target_modules": names,
        "lora_dropout": document.dropout(),
        "modules_to_save": [name.strip() for name in extra.split(",")] if isinstance(extra, str) else extra,
    }
    return _with_run(document, entries, LLAMA_FACTORY)


def _with_run(document: _Document, entries: Mapping[str, Any], keys: _TrainerKeys) -> SavedSetting:
    """Return the setting in PEFT's entries, with the learning rate, optimizer, schedule and steps of the trainer."""
    path, values = document.path, document.values
    # The entries are checked as PEFT's own; the trainer adds the run.
    saved = saved_from_entries(path, {"peft_type": "LORA", "task_type": "CAUSAL_LM"} | dict(entries))
    remarks = list(saved.remarks)
    if keys.default_learning_rate is not None and values.get("learning_rate") is None:
        remarks.append(f"{path} has no learning_rate: the Trainer's default, {keys.default_learning_rate:g}, is used")
    if names := [name for name in NOT_COVERED if values.get(name)]:
        remarks.append(f"{', '.join(names)} of {path}: not covered by the advice")
    return saved._replace(
        remarks=tuple(remarks),
        learning_rate=document.learning_rate(keys.default_learning_rate),
        optimizer=document.optimizer(keys.optimizer),
        # The names of schedules in this package leave out the warm-up.
        schedule=document.entry(keys.schedule, keys.default_schedule, is_a(str), "the name of a schedule").removesuffix(
            WITH_WARM_UP
        ),
        steps=document.steps(),
        epochs=document.epochs(keys.epochs, keys.default_epochs),
    )


def _changed_values(document: _Document, advice: Advice) -> dict[str, Any]:
    """Return the new values of the keys that the advice changes.

    Raises:
      InputError: If the trainer requires an integer alpha and the advice has another.
    """
    keys, values = KEYS[document.format], document.values
    alpha: float = _as_integer(advice.lora_alpha) or advice.lora_alpha
    is_rslora = False
    if isinstance(alpha, float) and isinstance(keys, _TrainerKeys):
        # Both trainers declare lora_alpha as an integer. With use_rslora the same scaling may have one.
        alpha, is_rslora = _as_integer(advice.alpha) or advice.alpha, True
        if not advice.is_rslora or isinstance(alpha, float):
            raise InputError(_integer_message(document, advice))
    # Write only what differs, so that the rest of the file stays as it is.
    changes: dict[str, Any] = {keys.rank: advice.setting.rank, "lora_alpha": alpha}
    if bool(values.get(keys.rslora)) != is_rslora:
        changes[keys.rslora] = is_rslora
    if isinstance(keys, _TrainerKeys):
        old_rate = document.learning_rate(keys.default_learning_rate)
        # Leave a rate as it is written if it differs by rounding only.
        if not isclose(advice.learning_rate, old_rate, rel_tol=1e-6):
            changes["learning_rate"] = float(f"{advice.learning_rate:.6g}")
        # The rate is that of the new run.
        run = advice.run
        if "steps" in run.changed:
            changes["max_steps"] = run.to_steps
        if "schedule" in run.changed:
            has_warm_up = run.to_schedule == "constant" and any(values.get(name) for name in WARM_UP_KEYS)
            changes[keys.schedule] = f"{run.to_schedule}{WITH_WARM_UP if has_warm_up else ''}"
    return {name: value for name, value in changes.items() if name not in values or values[name] != value}


def _integer_message(document: _Document, advice: Advice) -> str:
    rule, alpha = ("rslora", advice.alpha) if advice.is_rslora else ("lora", advice.lora_alpha)
    return (
        f"{document.path}: {document.format} requires an integer lora_alpha, got {advice.lora_alpha:.6g} from the "
        f"advice. Set the new rule to {rule} and the new alpha to {max(1, round(alpha))} (to_rule, to_alpha): the "
        "learning rate then compensates."
    )


def _as_integer(value: float) -> int | None:
    """Return the integer that a value is up to rounding errors, or None."""
    nearest = round(value)
    return nearest if nearest and isclose(value, nearest, rel_tol=1e-9) else None


def _edit_yaml(document: _Document, changes: Mapping[str, Any]) -> str:
    """Return the YAML text with some values replaced, which keeps comments and layout.

    Raises:
      InputError: If the text cannot be edited.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.util import load_yaml_guess_indent

    editor = YAML()
    editor.preserve_quotes, editor.width = True, 1 << 20
    values, indent, offset = load_yaml_guess_indent(document.text.replace("\r\n", "\n"), yaml=editor)
    editor.indent(sequence=indent, offset=offset)
    # New keys are inserted before the rank, or before the first key.
    keys, rank = list(values), KEYS[document.format].rank
    position = keys.index(rank) if rank in keys else 0
    for name, value in changes.items():
        scalar = value if isinstance(value, str) else editor.load(_yaml_number(value))
        if name in keys:
            values[name] = scalar
        else:
            values.insert(position, name, scalar)
    stream = io.StringIO()
    editor.dump(values, stream)
    text = stream.getvalue().replace("\n", "\r\n" if "\r\n" in document.text else "\n")
    if parse_yaml(text, where=str(document.path)) != document.values | dict(changes):
        raise InputError(f"{document.path}: cannot be edited. Write every key on a line of its own.")
    return text


def _yaml_number(value: Any) -> str:
    """Return YAML of a number or a bool. The trainers read YAML 1.1, in which ``3e-05``, without a dot, is text."""
    if isinstance(value, int):
        return str(value).lower()
    mantissa, _, exponent = repr(float(value)).partition("e")
    mantissa += "" if "." in mantissa else ".0"
    return f"{mantissa}e{exponent}" if exponent else mantissa
