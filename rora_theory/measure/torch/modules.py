"""The linear modules of a PyTorch model: their names as PEFT matches them, and the model as it is without adapters."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers.pytorch_utils import Conv1D

from rora_theory.advice.lora_config import ALL_LINEAR
from rora_theory.errors import InputError, shown

HEADS = ("score", "classifier")
"""Where a model for sequence classification has its head, which PEFT's ``"all-linear"`` leaves out."""


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The module that the user wrote: without `DataParallel`, `DistributedDataParallel` or `torch.compile`."""
    while True:
        parallel = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)
        inner = getattr(model, "module", None) if isinstance(model, parallel) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, torch.nn.Module):
            return model
        model = inner


def base_model(model: torch.nn.Module) -> torch.nn.Module:
    """The model in which PEFT has put its layers, whose modules have the names that they have without PEFT."""
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model


def linear_modules(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Every linear module of a base model by its name; where PEFT has wrapped one, PEFT's layer in its place.

    Linear is what PyTorch calls so, transformers' ``Conv1D``, and any module with ``in_features`` and ``out_features``,
    as the quantised ones of bitsandbytes and others.
    """
    found: dict[str, torch.nn.Module] = {}
    wrapped: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in wrapped):
            continue
        inner = module
        if isinstance(module, BaseTunerLayer):
            wrapped.append(name)
            inner = module.get_base_layer()
        sizes = (getattr(inner, "in_features", None), getattr(inner, "out_features", None))
        if isinstance(inner, Conv1D) or all(isinstance(size, int) for size in sizes):
            found[name] = module
    return found


def linear_size(module: torch.nn.Module) -> int:
    """Number of weights of a linear module, quantised, wrapped by PEFT or neither."""
    linear: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return linear.weight.numel() if isinstance(linear, Conv1D) else linear.in_features * linear.out_features


def task_type(model: torch.nn.Module) -> str | None:
    """PEFT's task type of a transformers model; None of others."""
    name = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM"
    ends = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS"}
    ends |= {"ForTokenClassification": "TOKEN_CLS", "ForQuestionAnswering": "QUESTION_ANS"}
    return next((task for end, task in ends.items() if name.endswith(end)), None)


def layer_index(name: str) -> int:
    """The first number in a module's name; -1 where there is none.

    Examples:
      >>> layer_index("model.layers.3.mlp.experts.1.up_proj"), layer_index("head")
      (3, -1)
    """
    return next((int(part) for part in name.split(".") if re.fullmatch("[0-9]{1,9}", part)), -1)


def chosen(
    model: torch.nn.Module, target_modules: Sequence[str] | str | None, layers: Sequence[int] | None = None
) -> dict[str, torch.nn.Module]:
    """The linear modules of a base model that PEFT would adapt.

    Args:
      model: of `base_model`.
      target_modules: names, a regular expression or ``"all-linear"``, as PEFT takes them; None is what PEFT adapts
        already, and ``"all-linear"`` in a model that it does not.
      layers: those with these `layer_index`; None is all.

    Raises:
      InputError: a name that is no linear module's, or nothing chosen.
    """
    linear = linear_modules(model)
    kinds = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear))
    accepted = f"accepted are {kinds}, a regular expression, or {ALL_LINEAR}"
    adapted = {name: module for name, module in linear.items() if isinstance(module, BaseTunerLayer)}
    if target_modules is None and adapted:
        found = adapted
    elif target_modules is None or target_modules == ALL_LINEAR:
        heads = _heads(model)
        found = {name: module for name, module in linear.items() if name not in heads}
    else:
        entries = [target_modules] if isinstance(target_modules, str) else list(target_modules)
        for entry in entries:
            wanted = entry if isinstance(target_modules, str) else [entry]
            if not any(_matches(wanted, name) for name in linear):
                raise InputError(f"target_modules has {shown(entry)}, which matches no linear module; {accepted}")
        found = {name: module for name, module in linear.items() if _matches(target_modules, name)}
    if layers is not None:
        found = {name: module for name, module in found.items() if layer_index(name) in set(layers)}
    if not found:
        # Modules outside all layers have the index -1: a message that offers it would not help.
        known = sorted({layer_index(name) for name in linear} - {-1}) or [-1]
        raise InputError(
            f"target_modules {shown(target_modules)} with layers {shown(layers)} has no linear module; {accepted}, "
            f"and layers {known[0]} to {known[-1]}"
            if linear
            else "the model has no linear module; accepted is a model with one"
        )
    return found


def lora_config(model: torch.nn.Module) -> LoraConfig | None:
    """The configuration of the model's LoRA, the active one of several; None where it has none."""
    configs = getattr(model, "peft_config", {})
    layer = next((each for each in model.modules() if isinstance(each, BaseTunerLayer)), None)
    active = [] if layer is None else layer.active_adapters
    ordered = [*(configs[name] for name in active if name in configs), *configs.values()]
    return next((config for config in ordered if isinstance(config, LoraConfig)), None)


def adapted_targets(model: torch.nn.Module) -> str | list[str]:
    """``target_modules`` of what PEFT adapts already, or ``"all-linear"``."""
    for config in getattr(model, "peft_config", {}).values():
        targets = getattr(config, "target_modules", None)
        if targets:
            return targets if isinstance(targets, str) else sorted(targets)
    return ALL_LINEAR


def _matches(target_modules: Sequence[str] | str, name: str) -> bool:
    given = target_modules if isinstance(target_modules, str) else list(target_modules)
    return bool(check_target_module_exists(LoraConfig(target_modules=given), name))


def _heads(model: torch.nn.Module) -> set[str]:
    """What ``"all-linear"`` leaves out: the output embeddings, or the head of sequence classification."""
    of_model = getattr(model, "get_output_embeddings", None)
    output = of_model() if callable(of_model) else None
    if output is None and task_type(model) == "SEQ_CLS":
        output = next((getattr(model, name) for name in HEADS if hasattr(model, name)), None)
    return {name for name, module in model.named_modules() if module is output}


def is_prompt_learning(model: torch.nn.Module) -> bool:
    """Return whether the active adapter of a PEFT model is a learned prompt, which lies outside the base model.

    Raises:
      InputError: The adapter replaces attention layers (PEFT's adaption prompt).
    """
    config: Any = getattr(model, "active_peft_config", None)
    if getattr(config, "is_adaption_prompt", False):
        raise InputError(f"the model has an adapter of peft_type {config.peft_type.value!r}, which is not supported")
    return bool(getattr(config, "is_prompt_learning", False))


@contextmanager
def without_adapters(model: torch.nn.Module) -> Iterator[None]:
    """Switch off PEFT's adapters in the layers of a model, and restore them as they were.

    Raises:
      InputError: An adapter is merged into the weights, so that the base model can't be measured.
    """
    switched = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    layers: list[Any] = [each for each in model.modules() if isinstance(each, switched)]
    for layer in layers:
        if getattr(layer, "merged", False):
            raise InputError("an adapter is merged into the model; accepted is one that is not (unmerge_adapter)")
    before = [layer.disable_adapters for layer in layers]
    needed = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            if not disabled:
                layer.enable_adapters(True)
        for parameter, requires_grad in needed:
            parameter.requires_grad_(requires_grad)


@contextmanager
def with_autograd() -> Iterator[None]:
    """Let autograd record, though the caller is within ``torch.no_grad`` or ``torch.inference_mode``."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def unchanged(model: torch.nn.Module) -> Iterator[None]:
    """Restore PyTorch's random generators and the buffers of a model that a forward pass in training mode updates.

    Such are the statistics of a BatchNorm and the vectors of a spectral norm. Integers of a linear module are its
    quantised weights, which no pass changes and which are not copied.

    Raises:
      InputError: Weights that were created within ``torch.inference_mode``, which autograd can't use.
    """
    if any(each.is_inference() for each in (*model.parameters(), *model.buffers())):
        raise InputError(
            "the model's weights were created within torch.inference_mode, which has no gradients. Load the model "
            "outside it."
        )
    linear = set(linear_modules(model).values())
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        if module.training
        for name, buffer in module.named_buffers(recurse=False)
        if not (module in linear and not buffer.is_floating_point()) and not buffer.is_meta
    ]
    devices = {each.device for each in model.parameters() if each.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=[device.index for device in devices]):
            yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                setattr(module, name, buffer.copy_(value))
