"""Loading and saving of adapters in PEFT's format: `adapter_config.json`, `adapter_model.safetensors`, a model card.

The tensors of layer i are ``base_model.model.model.layers.{i}.{module}.lora_A.weight`` [r, p_in], ``.lora_B.weight``
[p_out, r] and, for DoRA, ``.lora_magnitude_vector`` [p_out]. The files do not contain the scaling factor: PEFT computes
it from ``r``, ``lora_alpha``, ``use_rslora`` and the two patterns, so these entries are always written. The module
`peft_baselines` has the formats of the other methods.
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
from rora_theory.advice import adapter_config
from rora_theory.errors import InputError, shown
from rora_theory.lab.adapters import card, peft_baselines, peft_config
from rora_theory.lab.adapters.base import TrainableAdapter
from rora_theory.lab.adapters.bottleneck import BottleneckAdapter
from rora_theory.lab.adapters.full import FullAdapter
from rora_theory.lab.adapters.lora import LoraAdapter, LoraConfig, assemble_lora
from rora_theory.lab.adapters.portable import portable as portable_form
from rora_theory.lab.adapters.prefix import PrefixAdapter
from rora_theory.lab.adapters.targets import Target, full_name
from rora_theory.lab.llama import LlamaConfig
from rora_theory.lab.llama.hub import ModelSource
from rora_theory.runs import digests
from rora_theory.runs.files import check_regular, temporary_path, write_new

try:
    import safetensors
    import safetensors.numpy
except ImportError as error:
    safetensors = extras.missing(error)

CONFIG, WEIGHTS, PICKLE = adapter_config.FILE, "adapter_model.safetensors", "adapter_model.bin"
BASE_MODEL_DIGEST = "base_model_sha256"
"""Entry of the metadata with the SHA-256 of the base model's files."""
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
    base_model: str | ModelSource | None = None,
    portable: bool = False,
) -> None:
    """Save an adapter so that PEFT loads it and computes the same. PEFT does not support series and parallel adapters.

    A rule without a flag in PEFT (kappa neither 1 nor 1/2) is written as LoRA with the alphas that give the same
    scaling, see `peft_config.to_peft`, and is loaded as LoRA.

    `README.md` is the model card, see `card`. All files are written under temporary names and renamed. The
    configuration of an older adapter is removed first, and the new one is written last: if the process is killed in
    between, readers reject the folder instead of loading a mixture.

    Args:
      folder: Folder to write to, created if it does not exist.
      adapter: Adapter with concrete arrays.
      base_model: Name or path of the base model. With the model's location (`Model.origin`), the files contain its hub
        id and commit, if known, and the SHA-256 digest of its files, as ``base_model_sha256`` in the metadata of the
        safetensors file.
      portable: Whether to save LoRA and RoRA for clients that read fewer entries than PEFT, see `portable`.

    Raises:
      InputError: If ``folder`` is a file or cannot be written, in which case no partial file remains; or if the adapter
        has no portable form.
    """
    if adapter.config.replaces_weights:
        raise InputError(f"{folder}: trained weights cannot be saved as an adapter. Use save_merged to save the model.")
    folder, config = Path(folder), entries_of(adapter, base_model)
    tensors = _peft_tensors(adapter) if isinstance(adapter, LoraAdapter) else peft_baselines.adapter_tensors(adapter)
    metadata = {"format": "pt"}
    # A name may point to other weights later: record the commit and the digest of these.
    if isinstance(base_model, ModelSource):
        config["revision"], metadata[BASE_MODEL_DIGEST] = base_model.commit, base_model.sha256
    if portable:
        config, tensors = portable_form(folder / CONFIG, config, tensors)
    _write_files(folder, config, tensors, metadata, card.text(config, base_model))


def entries_of(adapter: TrainableAdapter, base_model: str | ModelSource | None = None) -> dict[str, Any]:
    """Return the entries of an adapter's `adapter_config.json`; for full fine-tuning, the entries that a `card` needs.

    Args:
      adapter: Adapter or trained weights.
      base_model: Name, path or location of the base model.
    """
    base = base_model.hub_id_or_path if isinstance(base_model, ModelSource) else base_model
    if isinstance(adapter, FullAdapter):
        return {"peft_type": card.FULL, "target_modules": list(adapter.config.target_modules)}
    if isinstance(adapter, LoraAdapter):
        return peft_config.to_peft(adapter.config, adapter.targets, base)
    assert isinstance(adapter, PrefixAdapter | BottleneckAdapter)
    return peft_baselines.baseline_to_peft(adapter, base)


def rewrite_portable(source: str | os.PathLike[str], folder: str | os.PathLike[str]) -> None:
    """Convert a saved adapter of any model to portable form, see `portable`.

    Args:
      source: Folder of a LoRA adapter saved by PEFT.
      folder: Folder to write to, created if it does not exist.

    Raises:
      InputError: If the adapter cannot be read, has no portable form, or cannot be written.
    """
    path, weights = Path(source) / CONFIG, Path(source) / WEIGHTS
    config, tensors = portable_form(path, adapter_config.read_config_entries(path), _read_tensors(weights))
    metadata = read_adapter_metadata(source) or {"format": "pt"}
    _write_files(Path(folder), config, tensors, metadata, card.text(config, config.get("base_model_name_or_path")))


def _write_files(
    folder: Path, config: Mapping[str, Any], tensors: dict[str, np.ndarray], metadata: Mapping[str, str], readme: str
) -> None:
    """Write the files of an adapter, each completely or not at all."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file. Pass a folder to save the adapter to.")
    # Serialise all files first, so that an error leaves the folder as it is.
    contents = {
        WEIGHTS: _sort_metadata(safetensors.numpy.save(tensors, metadata=dict(metadata))),
        card.FILE: readme.encode(),
        CONFIG: json.dumps(config, indent=2, sort_keys=True).encode(),
    }
    temporary_paths = {name: temporary_path(folder / name) for name in contents}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            write_new(temporary_paths[name], content)
        # Without a configuration the folder is no adapter, until the new one, the last file, is renamed.
        (folder / CONFIG).unlink(missing_ok=True)
        for name, path in temporary_paths.items():
            os.replace(path, folder / name)
    except OSError as error:
        raise InputError(f"{folder}: cannot write the adapter: {error.strerror or error}") from error
    finally:
        for path in temporary_paths.values():
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _sort_metadata(data: bytes) -> bytes:
    """Return a safetensors file with sorted metadata, which the library writes in varying order."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the tensors to 8 bytes
    return len(text).to_bytes(8, "little") + text + data[start:]


def load_peft(folder: str | os.PathLike[str], llama_config: LlamaConfig) -> Any:
    """Load an adapter saved by PEFT or by `save_peft`.

    Args:
      folder: Folder with `adapter_config.json` and `adapter_model.safetensors`; no file outside it is read.
      llama_config: Configuration of the base model.

    Returns:
      A `LoraAdapter`, `PrefixAdapter` or `BottleneckAdapter` in float32. LoRA's rule is ``"rora"`` if ``use_rslora`` is
      true, and ``"lora"`` otherwise. If the file excludes modules, the configuration lists all others by full name.

    Raises:
      InputError: If a file is missing, damaged or a pickle, the method or an entry is not supported, or a tensor is
        missing, unexpected, of another shape or not finite.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder. Pass a folder with {CONFIG} and {WEIGHTS}.")
    path, values = folder / CONFIG, adapter_config.read_config_entries(folder / CONFIG)
    kind = values["peft_type"]
    # Baselines have tensors and entries of their own.
    if kind in peft_baselines.ENTRIES_BY_TYPE:
        baseline = peft_baselines.read_baseline(path, values, llama_config)
        tensors = _read_tensors(folder / WEIGHTS)
        expected = peft_baselines.shapes(baseline, llama_config)
        _check_tensors(folder / WEIGHTS, tensors, expected, llama_config.num_hidden_layers)
        return peft_baselines.assemble_baseline(baseline, tensors, llama_config)
    if kind != adapter_config.LORA:
        supported = ", ".join(map(repr, (adapter_config.LORA, *peft_baselines.ENTRIES_BY_TYPE)))
        raise InputError(f"{path}: unsupported peft_type {kind!r}; supported: {supported}")
    # LoRA: compare the tensors with the shapes that the configuration and the model imply.
    config, targets = peft_config.lora_config_of(path, values, llama_config)
    tensors = _read_tensors(folder / WEIGHTS)
    shapes = {target.module: llama_config.module_shape(target.module) for target in targets}
    _check_tensors(folder / WEIGHTS, tensors, _expected_shapes(config, targets, shapes), llama_config.num_hidden_layers)
    # Stack each module's layers, padded to its largest rank.
    params_by_module = {}
    for target in targets:
        stacks = _empty_stacks(len(target.ranks), target.width, *shapes[target.module], use_dora=config.use_dora)
        for layer in _adapted_layers(target):
            for name, stack in stacks.items():
                tensor = tensors[_tensor_name(layer, target.module, name)]
                stack[layer][tuple(slice(size) for size in tensor.shape)] = tensor
        params_by_module[target.module] = {name: jnp.asarray(stack) for name, stack in stacks.items()}
    return assemble_lora(config, targets, params_by_module)


def read_adapter_metadata(folder: str | os.PathLike[str]) -> dict[str, str]:
    """Return the metadata of an adapter's safetensors file, see `save_peft`; empty if there are none."""
    with safetensors.safe_open(Path(folder) / WEIGHTS, framework="numpy") as file:
        return file.metadata() or {}


def adapter_digest(folder: str | os.PathLike[str]) -> str:
    """Compute the SHA-256 digest of the two files that `load_peft` reads, see `digests.of_files`.

    Raises:
      InputError: If a file cannot be read.
    """
    return digests.of_files(Path(folder) / name for name in (CONFIG, WEIGHTS))


def _tensor_name(layer: int, module: str, kind: str) -> str:
    return f"base_model.model.{full_name(layer, module)}.{SUFFIXES[kind]}"


def _adapted_layers(target: Target) -> list[int]:
    return [layer for layer, rank in enumerate(target.ranks) if rank]


def _peft_tensors(adapter: LoraAdapter) -> dict[str, np.ndarray]:
    """Return the tensors of every adapted layer by PEFT's names, without the padding of ranks."""
    tensors = {}
    for target in adapter.targets:
        stacks = {kind: np.asarray(stack) for kind, stack in adapter.params[target.module].items()}
        for layer in _adapted_layers(target):
            rank = target.ranks[layer]
            for kind, stack in stacks.items():
                tensor = {"lora_A": stack[layer, :rank], "lora_B": stack[layer, ..., :rank]}.get(kind, stack[layer])
                tensors[_tensor_name(layer, target.module, kind)] = np.ascontiguousarray(tensor)
    return tensors


def _empty_stacks(count: int, width: int, p_out: int, p_in: int, *, use_dora: bool) -> dict[str, np.ndarray]:
    """Return stacks to fill: zeros in the padding of ranks, magnitudes of one in layers that are not adapted."""
    stacks = {
        "lora_A": np.zeros((count, width, p_in), np.float32),
        "lora_B": np.zeros((count, p_out, width), np.float32),
    }
    if use_dora:
        stacks["lora_magnitude_vector"] = np.ones((count, p_out), np.float32)
    return stacks


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Read all tensors of a safetensors file in float32."""
    if os.path.exists(path):
        check_regular(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        pickle = path.with_name(PICKLE)
        if pickle.exists():
            raise InputError(
                f"{pickle}: pickle files are not read, because they can run code. Save the adapter as {WEIGHTS}."
            ) from error
        raise InputError(f"{path.parent} has no {WEIGHTS}. Pass the folder of an adapter saved by PEFT.") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}). Pass a readable file.") from error
    # Decode the bytes directly, because NumPy lacks bfloat16.
    try:
        raw = safetensors.deserialize(data)
    except safetensors.SafetensorError as error:
        raise InputError(f"{path} is damaged or truncated ({error}). Copy or save the file again.") from error
    tensors = {}
    for name, tensor in raw:
        if tensor["dtype"] not in DTYPES:
            raise InputError(f"{path}: {name} has dtype {tensor['dtype']}; supported: {', '.join(DTYPES)}")
        array = np.frombuffer(tensor["data"], DTYPES[tensor["dtype"]])
        tensors[name] = array.reshape(tensor["shape"]).astype(np.float32)
    return tensors


def _expected_shapes(
    config: LoraConfig, targets: Sequence[Target], module_shapes: Mapping[str, tuple[int, int]]
) -> dict[str, Shape]:
    """Return the shape of every tensor of an adapter by name."""
    shapes: dict[str, Shape] = {}
    for target in targets:
        p_out, p_in = module_shapes[target.module]
        for layer in _adapted_layers(target):
            rank = target.ranks[layer]
            shapes[_tensor_name(layer, target.module, "lora_A")] = (rank, p_in)
            shapes[_tensor_name(layer, target.module, "lora_B")] = (p_out, rank)
            if config.use_dora:
                shapes[_tensor_name(layer, target.module, "lora_magnitude_vector")] = (p_out,)
    return shapes


def _check_tensors(path: Path, tensors: Mapping[str, np.ndarray], expected: Mapping[str, Shape], layers: int) -> None:
    """Raise `InputError` unless the tensors are those that the configuration implies for this model."""
    # A layer that the model does not have shows that the adapter belongs to another model.
    for name in tensors:
        layer = re.match(r"base_model\.model\.model\.layers\.([0-9]{1,9})\.", name)
        if layer and int(layer[1]) >= layers:
            raise InputError(f"{path}: an adapter for another model: has {shown(name)}; the model has {layers} layers")
        if name not in expected:
            raise InputError(f"{path}: unexpected tensor {shown(name)}, which {CONFIG} does not imply for this model")
    # Every tensor must be there, with the right shape and finite values.
    for name, shape in expected.items():
        if name not in tensors:
            raise InputError(f"{path}: missing tensor {name}, which {CONFIG} implies for this model")
        if tensors[name].shape != shape:
            raise InputError(
                f"{path}: an adapter for another model: {name} must have shape {list(shape)}, "
                f"got {list(tensors[name].shape)}"
            )
        if not np.isfinite(tensors[name]).all():
            raise InputError(f"{path}: {name} has a value that is not finite. Save the adapter again.")
