"""Learning rate of a planned LoRA run of a PyTorch model, as public sweeps lead to expect.

tuned = tune(model, config=LoraConfig(r=128), steps=2000, batch_size=8)
print(tuned.sentence())
TrainingArguments(learning_rate=tuned.learning_rate, max_steps=2000, lr_scheduler_type="cosine", ...)
"""

import copy

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper

from rora_theory.advice.best_rate import Run
from rora_theory.advice.lora_config import check_uniform, init_of
from rora_theory.errors import InputError, shown
from rora_theory.evidence.rate_prior import ExpectedRate, expected_rate
from rora_theory.measure.modules import check_not_sharded, count_parameters, select_modules, unwrap
from rora_theory.optimizers import SCHEDULES, Schedule
from rora_theory.scaling import check_choice, check_instance, check_integer, scaling_factor

UNSUPPORTED_ENTRIES = (
    "modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication", "alora_invocation_tokens"
)  # fmt: skip
"""Entries of a ``LoraConfig`` that train or copy other weights, or with which adapters act on some tokens only."""


def tune(
    model: torch.nn.Module,
    *,
    config: LoraConfig,
    steps: int,
    batch_size: int,
    schedule: Schedule = "cosine",
    family: str | None = None,
) -> ExpectedRate:
    """Return the learning rate that public sweeps lead to expect for a planned LoRA run with AdamW.

    Nothing is trained, and no weights are read: the rate depends on the model's number of parameters, and on the
    scaling, rank, batch, number of steps and schedule of the run. See `rora_theory.evidence.rate_prior` for the law,
    and for what the expected regrets assume. Short training runs did not improve on this rate in a test whose
    criterion was written before: `docs/results/probes.md`.

    Args:
      model: Base model without adapters. Its weights may be on the meta device.
      config: Configuration of the planned run's adapters.
      steps: Number of optimizer steps.
      batch_size: Number of records per optimizer step, over all devices and accumulated batches.
      schedule: Learning-rate schedule: cosine, linear or constant.
      family: Family of the model, one of `rora_theory.evidence.starting_rates.families`; None is another.

    Returns:
      The learning rate with its range, the expected regrets and the assumptions.

    Raises:
      InputError: If an argument is out of range, the configuration trains more than LoRA adapters of one rank and
        alpha or names a module that the model does not have, or the model already has adapters or sharded weights.
    """
    check_integer("steps", steps)
    check_integer("batch_size", batch_size)
    check_choice("schedule", schedule, SCHEDULES)
    check_instance("model", model, torch.nn.Module, "a torch.nn.Module")
    gain = config_gain(config)
    model = unwrap(model)
    check_no_adapters(model)
    check_not_sharded(model)
    # Report an entry that matches no module.
    if config.target_modules is not None:
        targets = config.target_modules
        select_modules(model, targets if isinstance(targets, str) else sorted(targets))
    remarks = ("DoRA's magnitudes are trained too; the law was measured without them.",) if config.use_dora else ()
    return expected_rate(
        Run(config.r, gain, steps, schedule, batch_size),
        config=copy.deepcopy(config),
        family=family,
        parameters=count_parameters(model) / 1e9,
        remarks=remarks,
    )


def check_no_adapters(model: torch.nn.Module) -> None:
    """Raise `InputError` if PEFT has changed a model: layers with adapters, a learned prompt, or a configuration.

    A learned prompt adds no layers to the base model, only a configuration to the model around it.
    """
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        if configs or isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            # Name the kinds of adapters if their configuration is known.
            kinds = [str(config.peft_type.value) for config in configs.values()] if isinstance(configs, dict) else []
            description = ", ".join(kinds) or type(module).__name__
            raise InputError(f"model must have no adapters of PEFT, got {description}. Pass the base model.")


def config_gain(config: LoraConfig) -> float:
    """Return gamma * r of a configuration.

    Raises:
      InputError: If the configuration is not LoRA's, trains more than adapters of one rank and alpha, or has an
        initialisation with B other than 0.
    """
    check_instance("config", config, LoraConfig, "a LoraConfig of PEFT")
    values = vars(config)
    check_uniform(values)
    # The law describes adapters that start at B = 0, with nothing else trained.
    for name in UNSUPPORTED_ENTRIES:
        if values.get(name):
            raise InputError(f"config.{name} must be empty, got {shown(values[name])}")
    if config.bias != "none":
        raise InputError(f"config.bias must be 'none', got {config.bias!r}")
    init_of(config.init_lora_weights)
    return scaling_factor("rslora" if config.use_rslora else "lora", alpha=config.lora_alpha, rank=config.r) * config.r
