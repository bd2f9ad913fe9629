r"""PEFT's adapter folder: `adapter_config.json` and `adapter_model.safetensors`, read and written, with a model card.

A tensor of layer i is ``base_model.model.model.layers.{i}.{module}.lora_A.weight`` [r, p_in],
``.lora_B.weight`` [p_out, r] and, under DoRA, ``.lora_magnitude_vector`` [p_out]. The scaling is in no
tensor: PEFT recomputes it from ``r``, ``lora_alpha``, ``use_rslora`` and the two patterns, so these are
always written, ``use_rslora`` above all. The other methods' files: `peft_baselines`.
"""

import contextlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from rora_theory import extras
from rora_theory.adapters import card, peft_baselines, peft_config
from rora_theory.adapters.base import TrainableAdapter
from rora_theory.adapters.bottleneck import BottleneckAdapter
from rora_theory.adapters.full import FullAdapter
from rora_theory.adapters.lora import LoraAdapter, LoraConfig, assemble_lora
from rora_theory.adapters.portable import portable as portable_form
from rora_theory.adapters.prefix import PrefixAdapter
from rora_theory.adapters.targets import Target, full_name
from rora_theory.errors import InputError, shown
from rora_theory.io import digests
from rora_theory.io.files import check_regular, name_beside, write_new
from rora_theory.llama import LlamaConfig
from rora_theory.llama.hub import Located
from rora_theory.llama.model import Params

try:
    import safetensors
    import safetensors.numpy
except ImportError as error:
    safetensors = extras.missing(error)

CONFIG, WEIGHTS, PICKLE = peft_config.FILE, "adapter_model.safetensors", "adapter_model.bin"
SUFFIXES = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_magnitude_vector": "lora_magnitude_vector",
}
DTYPES: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}

Shape = tuple[int, ...]


PeftAdapter = LoraAdapter | PrefixAdapter | BottleneckAdapter


def save_peft(
    folder: str | os.PathLike[str],
    adapter: PeftAdapter,
    *,
    base_model: str | Located | None = None,
    portable: bool = False,
    trained: card.Trained | None = None,
) -> None:
    """Write an adapter so that PEFT opens it and computes the same; series and parallel ones PEFT does not know.

    A rule that PEFT has no flag for (kappa neither 1 nor 1/2) is written as LoRA with the alphas that give
    the same scaling, see `peft_config.to_peft`, and so reads back as LoRA.

    `README.md` is its model card, see `card`. All files are written beside and renamed. Over an older adapter
    its configuration goes first and the new one comes last: killed between, the folder is refused by every
    reader rather than read as a mixture.

    Args:
      folder: made where it is missing.
      adapter: with concrete arrays.
      base_model: name or path of the base model, for readers that look it up. With where it was loaded from
        (`Model.origin`), what is written is its hub id and commit, if it has them, and the digest of the files used,
        which may be a GGUF file made from the hub's: ``base_model_sha256`` in the metadata of the safetensors file,
        PEFT having no entry for it.
      portable: write LoRA and RoRA so that readers with less than PEFT's entries compute the same, see `portable`.
      trained: what the model card says of the run; None is nothing.

    Raises:
      InputError: ``folder`` is a file or can't be written (a full disk); no part of a file is left. With ``portable``,
        an adapter that has no such form: DoRA, and what is not LoRA.
    """
    if adapter.config.replaces:
        raise InputError(f"{folder}: trained weights are no adapter; accepted is the whole model, by save_merged")
    folder, config = Path(folder), entries_of(adapter, base_model)
    tensors = _tensors(adapter) if isinstance(adapter, LoraAdapter) else peft_baselines.tensors(adapter)
    metadata = {"format": "pt"}
    if isinstance(base_model, Located):
        config["revision"], metadata["base_model_sha256"] = base_model.commit, base_model.sha256
    if portable:
        config, tensors = portable_form(folder / CONFIG, config, tensors)
    _write(folder, config, tensors, metadata, card.text(config, base_model, trained))


def entries_of(adapter: TrainableAdapter, base_model: str | Located | None = None) -> dict[str, Any]:
    """The entries of an adapter's `adapter_config.json`; of trained weights, which have none, what a `card` needs."""
    base = base_model.base if isinstance(base_model, Located) else base_model
    if isinstance(adapter, FullAdapter):
        return {"peft_type": card.FULL, "target_modules": list(adapter.config.target_modules)}
    if isinstance(adapter, LoraAdapter):
        return peft_config.to_peft(adapter.config, adapter.targets, base)
    assert isinstance(adapter, PrefixAdapter | BottleneckAdapter)
    return peft_baselines.baseline_to_peft(adapter, base)


def rewrite_portable(source: str | os.PathLike[str], folder: str | os.PathLike[str]) -> None:
    """Write the adapter in ``source``, of any model, in portable form (see `portable`) to ``folder``.

    Args:
      source: a LoRA adapter's folder as PEFT writes it.
      folder: made where it is missing.

    Raises:
      InputError: as `load_peft`, but for what depends on the model, and as `save_peft`.
    """
    path, weights = Path(source) / CONFIG, Path(source) / WEIGHTS
    config, tensors = portable_form(path, peft_config.read_entries(path), _read_tensors(weights))
    with safetensors.safe_open(weights, framework="numpy") as file:
        metadata = file.metadata() or {"format": "pt"}
    _write(Path(folder), config, tensors, metadata, card.text(config, config.get("base_model_name_or_path")))


def _write(
    folder: Path, config: Mapping[str, Any], tensors: dict[str, np.ndarray], metadata: Mapping[str, str], readme: str
) -> None:
    """All files, as `save_peft` says."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; accepted is a folder to write the adapter to")
    contents = {
        WEIGHTS: _sorted(safetensors.numpy.save(tensors, metadata=dict(metadata))),
        card.FILE: readme.encode(),
        CONFIG: json.dumps(config, indent=2, sort_keys=True).encode(),
    }
    parts = {name: name_beside(folder / name) for name in contents}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            write_new(parts[name], content)
        (folder / CONFIG).unlink(missing_ok=True)
        for name, part in parts.items():
            os.replace(part, folder / name)
    except OSError as error:
        raise InputError(f"{folder}: adapter not written: {error.strerror or error}") from error
    finally:
        for part in parts.values():
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)


def _sorted(data: bytes) -> bytes:
    """A safetensors file with the entries of its metadata in order, which the library writes in a new one each time."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + data[start:]


def load_peft(folder: str | os.PathLike[str], llama_config: LlamaConfig, params: Params | None = None) -> Any:
    """Read an adapter that PEFT, or `save_peft`, wrote.

    Args:
      folder: holds `adapter_config.json` and `adapter_model.safetensors`; nothing outside it is read.
      llama_config: the base model's.
      params: the base weights; where given, LoRA's shapes are checked against them, not against the configuration.

    Returns:
      the adapter (a `LoraAdapter`, `PrefixAdapter` or `BottleneckAdapter`), float32 whatever the file's dtype, LoRA
      with rule ``"rora"`` where ``use_rslora`` is true and ``"lora"`` where not. Its config lists modules by their
      full names where the file excludes some.

    Raises:
      InputError: a missing or damaged file, a pickle, a method not among these, an entry this package does not
        support, a tensor that is missing, unexpected, of another shape or not finite.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: is not a folder; accepted is one with {CONFIG} and {WEIGHTS}")
    path, values = folder / CONFIG, peft_config.read_entries(folder / CONFIG)
    kind = values["peft_type"]
    if kind in peft_baselines.READ:
        baseline = peft_baselines.read_baseline(path, values, llama_config)
        found = _read_tensors(folder / WEIGHTS)
        _check(folder / WEIGHTS, found, peft_baselines.shapes(baseline, llama_config), llama_config.num_hidden_layers)
        return peft_baselines.assemble_baseline(baseline, found, llama_config)
    if kind != peft_config.LORA:
        accepted = ", ".join(map(repr, (peft_config.LORA, *peft_baselines.READ)))
        raise InputError(f"{path}: peft_type is {kind!r}; accepted is {accepted}")
    config, targets = peft_config.lora_config_of(path, values, llama_config)
    found = _read_tensors(folder / WEIGHTS)
    shapes = {target.module: _module_shape(target.module, llama_config, params) for target in targets}
    _check(folder / WEIGHTS, found, _expected(config, targets, shapes), llama_config.num_hidden_layers)
    tensors = {}
    for target in targets:
        stacks = _empty(len(target.ranks), target.width, *shapes[target.module], use_dora=config.use_dora)
        for layer in _adapted(target):
            for name, stack in stacks.items():
                tensor = found[_tensor_name(layer, target.module, name)]
                stack[layer][tuple(slice(size) for size in tensor.shape)] = tensor
        tensors[target.module] = {name: jnp.asarray(stack) for name, stack in stacks.items()}
    return assemble_lora(config, targets, tensors)


def adapter_digest(folder: str | os.PathLike[str]) -> str:
    """The SHA-256 of an adapter, see `digests.of_files`: of the two files that `load_peft` reads.

    Raises:
      InputError: a file that can't be read.
    """
    return digests.of_files(Path(folder) / name for name in (CONFIG, WEIGHTS))


def _tensor_name(layer: int, module: str, kind: str) -> str:
    return f"base_model.model.{full_name(layer, module)}.{SUFFIXES[kind]}"


def _adapted(target: Target) -> list[int]:
    return [layer for layer, rank in enumerate(target.ranks) if rank]


def _tensors(adapter: LoraAdapter) -> dict[str, np.ndarray]:
    """The tensors of every adapted layer at their true ranks, by PEFT's names."""
    found = {}
    for target in adapter.targets:
        stacks = {kind: np.asarray(stack) for kind, stack in adapter.params[target.module].items()}
        for layer in _adapted(target):
            rank = target.ranks[layer]
            for kind, stack in stacks.items():
                own = {"lora_A": stack[layer, :rank], "lora_B": stack[layer, ..., :rank]}.get(kind, stack[layer])
                found[_tensor_name(layer, target.module, kind)] = np.ascontiguousarray(own)
    return found


def _empty(count: int, width: int, p_out: int, p_in: int, *, use_dora: bool) -> dict[str, np.ndarray]:
    """Stacks to fill: zeros where a rank is padded, magnitude one where a layer is not adapted."""
    stacks = {
        "lora_A": np.zeros((count, width, p_in), np.float32),
        "lora_B": np.zeros((count, p_out, width), np.float32),
    }
    if use_dora:
        stacks["lora_magnitude_vector"] = np.ones((count, p_out), np.float32)
    return stacks


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file in float32."""
    if os.path.exists(path):
        check_regular(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        pickle = path.with_name(PICKLE)
        if pickle.exists():
            raise InputError(f"{pickle}: a pickle can run code and is not read; accepted is {WEIGHTS}") from error
        raise InputError(f"{path.parent}: has no {WEIGHTS}; accepted is a folder as PEFT writes it") from error
    try:
        raw = safetensors.deserialize(data)
    except safetensors.SafetensorError as error:
        raise InputError(f"{path}: is damaged or cut off ({error}); accepted is a whole file") from error
    found = {}
    for name, tensor in raw:
        if tensor["dtype"] not in DTYPES:
            raise InputError(f"{path}: {name} is {tensor['dtype']}; accepted are {', '.join(DTYPES)}")
        array = np.frombuffer(tensor["data"], DTYPES[tensor["dtype"]])
        found[name] = array.reshape(tensor["shape"]).astype(np.float32)
    return found


def _module_shape(module: str, llama_config: LlamaConfig, params: Params | None) -> tuple[int, int]:
    if params is None:
        return llama_config.module_shape(module)
    _, p_out, p_in = params["layers"][module]["weight"].shape
    return p_out, p_in


def _expected(config: LoraConfig, targets: Sequence[Target], shapes: Mapping[str, tuple[int, int]]) -> dict[str, Shape]:
    """Shape of every tensor that the configuration promises, by name."""
    found: dict[str, Shape] = {}
    for target in targets:
        p_out, p_in = shapes[target.module]
        for layer in _adapted(target):
            rank = target.ranks[layer]
            found[_tensor_name(layer, target.module, "lora_A")] = (rank, p_in)
            found[_tensor_name(layer, target.module, "lora_B")] = (p_out, rank)
            if config.use_dora:
                found[_tensor_name(layer, target.module, "lora_magnitude_vector")] = (p_out,)
    return found


def _check(path: Path, tensors: Mapping[str, np.ndarray], expected: Mapping[str, Shape], layers: int) -> None:
    """Refuse a file that is not what its configuration promises for this model."""
    for name in tensors:
        layer = re.match(r"base_model\.model\.model\.layers\.([0-9]{1,9})\.", name)
        if layer and int(layer[1]) >= layers:
            raise InputError(f"{path}: an adapter for another model: has {shown(name)}; the model has {layers} layers")
        if name not in expected:
            raise InputError(f"{path}: has {shown(name)}; accepted is what {CONFIG} promises for this model")
    for name, shape in expected.items():
        if name not in tensors:
            raise InputError(f"{path}: has no {name}; accepted is what {CONFIG} promises for this model")
        if tensors[name].shape != shape:
            found = list(tensors[name].shape)
            raise InputError(f"{path}: an adapter for another model: {name} is {found}; accepted is {list(shape)}")
        if not np.isfinite(tensors[name]).all():
            raise InputError(f"{path}: {name} has a value that is not finite; accepted are finite numbers")
