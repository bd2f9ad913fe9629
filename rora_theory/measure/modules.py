"""Linear modules of a PyTorch model, selected by PEFT's rules, and contexts that leave the model as it was."""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from transformers.pytorch_utils import Conv1D

from rora_theory.advice.adapter_config import ALL_LINEAR
from rora_theory.errors import InputError, shown

CLASSIFIER_NAMES = ("score", "classifier")
"""Attributes that hold the head of a sequence classifier, which PEFT's ``"all-linear"`` leaves out."""


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """Return the module inside `DataParallel`, `DistributedDataParallel` and `torch.compile`."""
    while True:
        parallel = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)
        inner = getattr(model, "module", None) if isinstance(model, parallel) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, torch.nn.Module):
            return model
        model = inner


def base_model(model: torch.nn.Module) -> torch.nn.Module:
    """Return the model inside a PEFT model; its modules have the same names as without PEFT."""
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model


def linear_modules(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return every linear module of a base model by its name.

    A module is linear if it is transformers' ``Conv1D`` or has ``in_features`` and ``out_features``, like
    `torch.nn.Linear` and the quantised layers of bitsandbytes. A module that PEFT has wrapped is returned as PEFT's
    layer.
    """
    modules: dict[str, torch.nn.Module] = {}
    wrapped: list[str] = []
    for name, module in model.named_modules():
        # Skip what is inside a layer of PEFT: its base layer and its adapters.
        if any(name.startswith(f"{outer}.") for outer in wrapped):
            continue
        inner = module
        if isinstance(module, BaseTunerLayer):
            wrapped.append(name)
            inner = module.get_base_layer()
        # Quantised layers are recognised by their sizes: their classes belong to other packages.
        sizes = (getattr(inner, "in_features", None), getattr(inner, "out_features", None))
        if isinstance(inner, Conv1D) or all(isinstance(size, int) for size in sizes):
            modules[name] = module
    return modules


def linear_size(module: torch.nn.Module) -> int:
    """Return the number of weights of a linear module, which may be quantised or wrapped by PEFT."""
    linear: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return linear.weight.numel() if isinstance(linear, Conv1D) else linear.in_features * linear.out_features


def count_parameters(model: torch.nn.Module) -> int:
    """Return the number of parameters of a base model, of which quantised linear modules may store fewer elements."""
    weights = {module: getattr(module, "weight", None) for module in linear_modules(model).values()}
    packed = [module for module, weight in weights.items() if weight is None or weight.numel() != linear_size(module)]
    packed_weights = {id(weights[module]) for module in packed}
    whole = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in packed_weights)
    return whole + sum(linear_size(module) for module in packed)


def task_type(model: torch.nn.Module) -> str | None:
    """Return PEFT's task type of a transformers model, or None if it has none."""
    name = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM"
    # Without an encoder, a model for conditional generation is causal: it reads images and text.
    suffixes = dict.fromkeys(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"), "CAUSAL_LM")
    suffixes |= {"ForSequenceClassification": "SEQ_CLS"}
    suffixes |= {"ForTokenClassification": "TOKEN_CLS", "ForQuestionAnswering": "QUESTION_ANS"}
    return next((task for suffix, task in suffixes.items() if name.endswith(suffix)), None)


def layer_index(name: str) -> int:
    """Return the first number in a module's name, or -1 if it has none.

    Examples:
      >>> layer_index("model.layers.3.mlp.experts.1.up_proj"), layer_index("head")
      (3, -1)
    """
    return next((int(part) for part in name.split(".") if re.fullmatch("[0-9]{1,9}", part)), -1)


def select_modules(
    model: torch.nn.Module, target_modules: Sequence[str] | str | None, layers: Sequence[int] | None = None
) -> dict[str, torch.nn.Module]:
    """Return the linear modules of a base model that PEFT would adapt.

    Args:
      model: Base model, see `base_model`.
      target_modules: Names, a regular expression or ``"all-linear"``, in PEFT's format. None selects the modules that
        PEFT already adapts, or ``"all-linear"`` if there are none.
      layers: Indices of the layers to include, see `layer_index`; None includes all.

    Returns:
      The modules by name, in the order of the model.

    Raises:
      InputError: If an argument is of another type, an entry matches no linear module, or no module is left.
    """
    for argument, value in (("target_modules", target_modules), ("layers", layers)):
        if not isinstance(value, Iterable | None):
            raise InputError(f"{argument} must be a sequence or None, got {shown(value)}")
    # Report an invalid regular expression here, with the name of the argument.
    if isinstance(target_modules, str):
        try:
            re.compile(target_modules)
        except re.error as error:
            raise InputError(
                f"target_modules must be a regular expression if it is a string, got {shown(target_modules)}: {error}"
            ) from None
    # All linear modules, and their kinds for error messages.
    linear = linear_modules(model)
    kinds = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear))
    supported = f"supported: {kinds}, a regular expression, or {ALL_LINEAR}"
    adapted = {name: module for name, module in linear.items() if isinstance(module, BaseTunerLayer)}
    # Without targets: what PEFT adapts already, or every linear module but the head.
    if target_modules is None and adapted:
        modules = adapted
    elif target_modules is None or target_modules == ALL_LINEAR:
        heads = _heads(model)
        modules = {name: module for name, module in linear.items() if name not in heads}
    else:
        # PEFT ignores an entry without a match; report it, since it is probably misspelt.
        entries = [target_modules] if isinstance(target_modules, str) else list(target_modules)
        for entry in entries:
            pattern = entry if isinstance(target_modules, str) else [entry]
            if not any(_matches(pattern, name) for name in linear):
                raise InputError(f"target_modules has {shown(entry)}, which matches no linear module; {supported}")
        modules = {name: module for name, module in linear.items() if _matches(target_modules, name)}
    if layers is not None:
        modules = {name: module for name, module in modules.items() if layer_index(name) in set(layers)}
    if not modules:
        if not linear:
            raise InputError(f"the model has no linear module: {type(model).__name__}")
        # Leave out -1, the index of modules outside all layers: suggesting it would not help.
        indices = sorted({layer_index(name) for name in linear} - {-1}) or [-1]
        raise InputError(
            f"target_modules {shown(target_modules)} with layers {shown(layers)} has no linear module; {supported}, "
            f"and layers {indices[0]} to {indices[-1]}"
        )
    return modules


def lora_config(model: torch.nn.Module) -> LoraConfig | None:
    """Return the configuration of the model's active LoRA adapter, or None if it has none."""
    configs = getattr(model, "peft_config", {})
    layer = next((module for module in model.modules() if isinstance(module, BaseTunerLayer)), None)
    active = [] if layer is None else layer.active_adapters
    ordered = [*(configs[name] for name in active if name in configs), *configs.values()]
    return next((config for config in ordered if isinstance(config, LoraConfig)), None)


def adapted_targets(model: torch.nn.Module) -> str | list[str]:
    """Return ``target_modules`` of the model's adapter, or ``"all-linear"`` if it has none."""
    for config in getattr(model, "peft_config", {}).values():
        targets = getattr(config, "target_modules", None)
        if targets:
            return targets if isinstance(targets, str) else sorted(targets)
    return ALL_LINEAR


def _matches(target_modules: Sequence[str] | str, name: str) -> bool:
    pattern = target_modules if isinstance(target_modules, str) else list(target_modules)
    return bool(check_target_module_exists(LoraConfig(target_modules=pattern), name))


def _heads(model: torch.nn.Module) -> set[str]:
    """Return the names that ``"all-linear"`` excludes: the output embeddings, or the head of a classifier."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    if head is None and task_type(model) == "SEQ_CLS":
        head = next((getattr(model, name) for name in CLASSIFIER_NAMES if hasattr(model, name)), None)
    return {name for name, module in model.named_modules() if module is head}


def is_prompt_learning(model: torch.nn.Module) -> bool:
    """Return whether the active adapter of a PEFT model is a learned prompt, which lies outside the base model.

    Raises:
      InputError: If the adapter replaces attention layers (PEFT's adaption prompt).
    """
    config: Any = getattr(model, "active_peft_config", None)
    if getattr(config, "is_adaption_prompt", False):
        raise InputError(f"the model has an adapter of peft_type {config.peft_type.value!r}, which is not supported")
    return bool(getattr(config, "is_prompt_learning", False))


@contextmanager
def without_adapters(model: torch.nn.Module) -> Iterator[None]:
    """Disable PEFT's adapters in the layers of a model, and restore their state on exit.

    Raises:
      InputError: If an adapter is merged into the weights, so that the base model can't be measured.
    """
    adapted = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    layers: list[Any] = [module for module in model.modules() if isinstance(module, adapted)]
    for layer in layers:
        if getattr(layer, "merged", False):
            raise InputError("an adapter is merged into the model. Call unmerge_adapter on the model first.")
    # enable_adapters also changes requires_grad, so restore both.
    before = [layer.disable_adapters for layer in layers]
    requirements = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    # The original state is restored also if the block raises an error.
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            if not disabled:
                layer.enable_adapters(True)
        for parameter, requires_grad in requirements:
            parameter.requires_grad_(requires_grad)


def check_not_sharded(model: torch.nn.Module) -> None:
    """Raise `InputError` if a weight is sharded over processes."""
    for name, module in model.named_modules():
        if _is_sharded(module):
            raise InputError(
                f"model must have whole weights in one process, got shards in {name or type(model).__name__} (FSDP or "
                "DeepSpeed). Pass the model before it is sharded."
            )


def check_weights(model: torch.nn.Module, *, offloaded: bool) -> None:
    """Raise `InputError` if a weight is on the meta device or sharded over processes.

    Args:
      model: Model.
      offloaded: Whether weights may be there that a hook of accelerate loads when they are needed.
    """
    check_not_sharded(model)
    for name, module in model.named_modules():
        is_loaded_later = offloaded and hasattr(module, "_hf_hook")
        if not is_loaded_later and any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            raise InputError(
                f"model must have its weights in memory, got {name or type(model).__name__} on the meta device. "
                "Load the model without offloading, on one device."
            )


def _is_sharded(module: torch.nn.Module) -> bool:
    """Return whether the weights are shards of FSDP, tensor parallelism or DeepSpeed, recognised without importing."""
    names = {base.__name__ for base in type(module).__mro__}
    parameters = list(module.parameters(recurse=False))
    return bool(names & {"FullyShardedDataParallel", "FSDPModule"}) or any(
        type(parameter).__name__ == "DTensor" or hasattr(parameter, "ds_id") for parameter in parameters
    )


def trainable_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Return the parameters of a model that receive gradients."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def remove_adapters(model: Any) -> None:
    """Remove PEFT's layers from a PEFT model, so that its base model is as it was.

    PEFT's ``unload`` leaves the trained copies of other modules in the model. Their originals are put back.
    """
    originals = [
        (parent, name, child.original_module)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, ModulesToSaveWrapper)
    ]
    model.unload()
    for parent, name, original in originals:
        setattr(parent, name, original.get_base_layer() if isinstance(original, BaseTunerLayer) else original)


@contextmanager
def with_autograd() -> Iterator[None]:
    """Enable autograd, even if the caller is within ``torch.no_grad`` or ``torch.inference_mode``.

    The caller's autocast applies, without its cache, which would hide the updates of trained weights until its exit.
    """
    is_cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.set_autocast_cache_enabled(is_cached)


@contextmanager
def preserved_state(model: torch.nn.Module) -> Iterator[None]:
    """Restore on exit PyTorch's random generators and the buffers that a forward pass in training mode updates.

    Examples of such buffers are the statistics of a BatchNorm and the vectors of a spectral norm.

    Raises:
      InputError: If weights were created within ``torch.inference_mode``, which autograd can't use.
    """
    if any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers())):
        raise InputError(
            "the model's weights were created within torch.inference_mode, so they can't have gradients. "
            "Load the model outside it."
        )
    # Do not copy integer buffers of linear modules: they are quantised weights, which no pass changes.
    linear = set(linear_modules(model).values())
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        if module.training
        for name, buffer in module.named_buffers(recurse=False)
        if not (module in linear and not buffer.is_floating_point()) and not buffer.is_meta
    ]
    # The generators of the CPU and of every GPU with weights.
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=[device.index for device in devices]):
            yield
    finally:
        # Copy in place, so that references to the buffers stay valid.
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                setattr(module, name, buffer.copy_(value))
