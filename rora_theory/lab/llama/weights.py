"""Conversion of weights between Hugging Face's safetensors folders and the stacked tree of `model`.

Pickled weights are never read. Every name and shape is checked against the configuration before the first weight is
read. Then the tree is filled one leaf at a time, tensor by tensor, and each leaf is put on the device, so that the host
holds one leaf and no second model.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from rora_theory.errors import InputError
from rora_theory.lab.llama.config import LlamaConfig
from rora_theory.lab.llama.model import Params, abstract_params
from rora_theory.lab.llama.quantised import QuantisedWeight, dense_params, is_quantised, quantise, write_layer
from rora_theory.runs.files import check_regular, read_object, temporary_path

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = ("float32", "bfloat16", "float16")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
_FLOAT_TYPES = ("BF16", "F16", "F32", "F64")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Mask of the exponent of each dtype, and the integer type of its bits.
_EXPONENT_BITS = {
    "float32": (np.uint32(0x7F800000), np.uint32),
    "bfloat16": (np.uint16(0x7F80), np.uint16),
    "float16": (np.uint16(0x7C00), np.uint16),
}
_FINITE_CHECK_ELEMENTS = 1 << 18  # elements checked at a time, which fit in a cache


@dataclass(frozen=True)
class TensorHeader:
    """Header of a tensor in a safetensors file.

    Attributes:
      file: File that holds the tensor.
      shape: Shape of the tensor.
      dtype: Type of the numbers in the file, by safetensors' name.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def tensor_names(path: Sequence[str], layers: int) -> list[str]:
    """Return Hugging Face's names of the tensors in one leaf of the tree: one, or one for each layer.

    Examples:
      >>> tensor_names(("layers", "mlp.up_proj", "weight"), 2)
      ['model.layers.0.mlp.up_proj.weight', 'model.layers.1.mlp.up_proj.weight']
    """
    if path[0] != "layers":
        return ["lm_head.weight" if path[0] == "lm_head" else f"model.{path[0]}.weight"]
    name = path[1] if len(path) == 2 else f"{path[1]}.{path[2]}"
    return [f"model.layers.{i}.{name if len(path) == 3 else name + '.weight'}" for i in range(layers)]


def expected_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in a checkpoint of a configuration, by Hugging Face's names."""
    shapes = {}
    for path, leaf in _leaves(abstract_params(config)):
        shape = leaf.shape[1:] if path[0] == "layers" else leaf.shape
        shapes.update(dict.fromkeys(tensor_names(path, config.num_hidden_layers), shape))
    return shapes


def check_shapes(where: str, shapes: Mapping[str, tuple[int, ...]], config: LlamaConfig) -> None:
    """Check that a checkpoint has exactly the tensors of its configuration.

    Raises:
      InputError: Tensors are missing, unknown or of another shape; the message names the first ones.
    """
    # Compare the names first: a shape can only be compared for a tensor that is there.
    expected = expected_shapes(config)
    missing = [name for name in expected if name not in shapes]
    if missing:
        raise InputError(f"{where}: lacks {abbreviate_names(missing)}, which its configuration requires")
    extra = [name for name in shapes if name not in expected]
    if extra:
        raise InputError(f"{where}: holds {abbreviate_names(extra)}, which its configuration does not have")
    for name, shape in expected.items():
        if tuple(shapes[name]) != shape:
            raise InputError(f"{where}: {name} must have shape {shape} by its configuration, got {tuple(shapes[name])}")


def parse_dtype(dtype: DTypeLike) -> np.dtype:
    """Return the dtype of weights in memory.

    Raises:
      InputError: The dtype is none of float32, bfloat16 and float16.
    """
    try:
        checked = jnp.dtype(dtype)
    except TypeError:
        checked = None
    if checked is None or checked.name not in DTYPES:
        value = dtype if checked is None else checked.name
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {value!r}")
    return checked


def check_finite(name: str, values: np.ndarray) -> None:
    """Check that all weights are finite numbers.

    A float is NaN or infinite if all bits of its exponent are set. Testing the bits takes a twentieth of the time of
    `numpy.isfinite` for bfloat16.

    Raises:
      InputError: A value is not finite; the message names the first one.
    """
    # View the floats as integers, and test a block at a time to bound the temporary memory.
    exponent_mask, integer = _EXPONENT_BITS[values.dtype.name]
    bits = values.reshape(-1).view(integer)
    for start in range(0, len(bits), _FINITE_CHECK_ELEMENTS):
        exponents = bits[start : start + _FINITE_CHECK_ELEMENTS] & exponent_mask
        if exponents.max() == exponent_mask:
            first = start + int(np.argmax(exponents))
            index = ", ".join(str(int(i)) for i in np.unravel_index(first, values.shape))
            raise InputError(
                f"{name} must be finite in {values.dtype.name}, got {float(values.reshape(-1)[first])} at [{index}]"
            )


def build_params(
    config: LlamaConfig,
    dtype: DTypeLike,
    read: Callable[[list[str], np.ndarray], None],
    shardings: Params | None = None,
    quantization: str = "none",
    read_blocks: Callable[[str], np.ndarray | None] = lambda _: None,
) -> Params:
    """Build the tree of weights leaf by leaf.

    Args:
      dtype: Type of the weights: float32, bfloat16 or float16.
      read: Function ``read(names, out)`` that writes the tensor ``names[i]`` to ``out[i]``, converted to its dtype.
      shardings: Tree of `jax.sharding.Sharding` with the structure of the weights; None for the default device.
      quantization: Storage of the modules' weights, see `model.abstract_params`.
      read_blocks: Function ``read_blocks(name)`` that returns a tensor's stored blocks [out, bytes] if they are of the
        type ``quantization``. It returns None if the blocks must be made from the weights.

    Raises:
      InputError: The dtype or quantization is unknown, or weights exceed a block's float16 scale.
    """
    abstract = abstract_params(config, parse_dtype(dtype), quantization)
    # A weight in blocks is one leaf here, so that all its parts are filled together.
    leaves, structure = jax.tree.flatten_with_path(abstract, is_leaf=is_quantised)
    leaf_shardings = [None] * len(leaves) if shardings is None else jax.tree.leaves(shardings, is_leaf=is_quantised)
    built = []
    for (path, leaf), sharding in zip(leaves, leaf_shardings, strict=True):
        # Fill one leaf on the host: all layers of a module, or one array.
        keys = tuple(entry.key for entry in path)
        names = tensor_names(keys, config.num_hidden_layers)
        host = jax.tree.map(lambda part: np.empty(part.shape, part.dtype), leaf)
        if isinstance(leaf, QuantisedWeight):
            _fill_blocks(names, host, read, read_blocks)
        else:
            read(names, host if keys[0] == "layers" else host[None])
        # Wait for the copy to the device, so that the host's memory is free before the next leaf is allocated.
        built.append(jax.block_until_ready(_put(host, sharding)))
        del host
    return jax.tree.unflatten(structure, built)


def _fill_blocks(
    names: Sequence[str],
    out: QuantisedWeight,
    read: Callable[[list[str], np.ndarray], None],
    read_blocks: Callable[[str], np.ndarray | None],
) -> None:
    """Fill the layers of a quantised module with stored blocks, or with those that ggml computes from the weights."""
    # Stored blocks are copied; other weights are quantised one layer at a time, which bounds the dense memory.
    for layer, name in enumerate(names):
        blocks = read_blocks(name)
        if blocks is None:
            dense = np.empty((1, *out.shape[1:]), np.float32)
            read([name], dense)
            with np.errstate(over="ignore"):  # a float16 scale that overflows is refused below
                blocks = quantise(dense[0], out.kind)
        write_layer(out, layer, blocks)
        for numbers in (out.scales, out.mins):
            if numbers is not None:
                check_finite(f"a block's scale of {name}", numbers[layer])


def _put(host: Any, sharding: Any) -> Any:
    """Put an array, or the parts of a weight in blocks, on its devices."""
    if sharding is None:
        return jax.device_put(host)

    def put_part(part: np.ndarray, part_sharding: Any) -> jax.Array:
        if part_sharding.is_fully_addressable:
            return jax.device_put(part, part_sharding)
        # Several processes: each places its own part, and nothing is sent between them.
        return jax.make_array_from_callback(part.shape, part_sharding, lambda index: part[index])

    return jax.tree.map(put_part, host, sharding)


def read_config(folder: Path) -> LlamaConfig:
    """Read the configuration in a folder's ``config.json``.

    Raises:
      InputError: The file is missing, is not JSON, or describes a model that is not supported.
    """
    path = folder / "config.json"
    try:
        return LlamaConfig.from_hf(read_object(path))
    except InputError as error:
        raise InputError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from None


def load_hf(
    folder: Path,
    config: LlamaConfig,
    dtype: DTypeLike = jnp.float32,
    shardings: Params | None = None,
    quantization: str = "none",
) -> Params:
    """Load the weights of a folder in Hugging Face layout: ``model.safetensors``, or shards and their index.

    Args:
      dtype: Type of the weights in memory, float32, bfloat16 or float16, whatever the type in the files.
      shardings: Tree of shardings with the structure of the weights; None for the default device.
      quantization: Storage of the modules' weights, quantised while they are read, see `build_params`.

    Raises:
      InputError: There are only pickled weights; a file is missing, truncated or outside the folder; or a tensor is
        missing, unknown, of another shape than the configuration's, not of a floating-point type, or not finite in
        ``dtype``.
    """
    headers = read_headers(folder)
    # Early checkpoints store the rotary frequencies, which the configuration determines.
    for name in [name for name in headers if name.endswith(".rotary_emb.inv_freq")]:
        del headers[name]
    # A tied model may store its output matrix again. As in transformers, the embeddings take its place.
    if config.tie_word_embeddings:
        headers.pop("lm_head.weight", None)
    check_shapes(str(folder), {name: header.shape for name, header in headers.items()}, config)
    for name, header in headers.items():
        if header.dtype not in _FLOAT_TYPES:
            raise InputError(
                f"{header.file}: {name} must be of a type among {', '.join(_FLOAT_TYPES)}, got {header.dtype}"
            )

    def read(names: list[str], out: np.ndarray) -> None:
        # Close the files after each leaf, so that mapped pages do not add up to a second model.
        with ExitStack() as stack:
            files = {file: stack.enter_context(_open(file)) for file in {headers[name].file for name in names}}
            for i, name in enumerate(names):
                with np.errstate(over="ignore"):  # a number of a wider type that overflows is refused below
                    out[i] = files[headers[name].file].get_tensor(name)
                check_finite(f"{headers[name].file}: {name}", out[i])

    return build_params(config, dtype, read, shardings, quantization)


def save_hf(
    folder: Path,
    params: Params,
    config: LlamaConfig,
    *,
    tokenizer_from: Path | None = None,
    files: Mapping[str, bytes] | None = None,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Save a folder that transformers opens: ``config.json``, weights, and the tokenizer's files.

    The folder is written under another name and renamed, so that it is complete or absent.

    Args:
      folder: New or empty folder.
      params: Weights, saved in their dtype; weights in blocks are saved dense.
      tokenizer_from: Folder to copy the tokenizer's files from; None copies none.
      files: Content of further files by their names.
      shard_bytes: Size above which the weights are split into several files.

    Raises:
      InputError: The folder is not empty, the weights contradict the configuration, or the disk is full.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: must be a new or empty folder")
    # Compare the shapes before writing gigabytes.
    expected, params = abstract_params(config), dense_params(params)
    if {path: leaf.shape for path, leaf in _leaves(params)} != {path: leaf.shape for path, leaf in _leaves(expected)}:
        raise InputError(f"{folder}: not written, because the weights are not those of a model of this configuration")
    new = temporary_path(folder)
    try:
        new.mkdir(parents=True)
        # Weights and configuration.
        _write_weights(new, params, config, shard_bytes)
        dtype = jax.tree.leaves(params)[0].dtype.name
        settings = config.to_hf() | {"dtype": dtype, "torch_dtype": dtype}
        (new / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
        # safetensors makes its files readable by their owner only.
        for weights in new.glob("*.safetensors"):
            shutil.copymode(new / "config.json", weights)
        # Tokenizer and further files.
        for name in TOKENIZER_FILES:
            if tokenizer_from is not None and (tokenizer_from / name).is_file():
                shutil.copyfile(tokenizer_from / name, new / name)
        for name, content in (files or {}).items():
            (new / name).write_bytes(content)
        # Replace an empty folder by the complete one.
        if folder.exists():
            folder.rmdir()
        new.rename(folder)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _write_weights(folder: Path, params: Params, config: LlamaConfig, shard_bytes: int) -> None:
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    # The leaf of the tree that holds each tensor, and the tensor's layer if the leaf is stacked.
    tensors: dict[str, tuple[Any, int | None]] = {}
    for path, leaf in _leaves(params):
        is_stacked = path[0] == "layers"
        for i, name in enumerate(tensor_names(path, config.num_hidden_layers)):
            tensors[name] = leaf, i if is_stacked else None

    # One file for each shard, and the index of several.
    split = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor[0].nbytes // (1 if tensor[1] is None else config.num_hidden_layers),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    for file, names in split.filename_to_tensors.items():
        arrays = {}
        for name in names:
            leaf, layer = tensors[name]
            arrays[name] = np.ascontiguousarray(leaf if layer is None else leaf[layer])
        try:
            save_file(arrays, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from error
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def read_weight_map(folder: Path) -> dict[str, str]:
    """Read the index of a folder with shards: the file of each tensor.

    Raises:
      InputError: The index is missing or damaged, or it names something other than a safetensors file of the folder.
    """
    index = folder / INDEX
    if not os.path.exists(index):
        raise InputError(_explain_missing_weights(folder))
    file_of_tensor = read_object(index).get("weight_map")
    if not isinstance(file_of_tensor, dict) or not file_of_tensor:
        raise InputError(f"{index}: weight_map must be an object from tensors to files, and not empty")
    for file in file_of_tensor.values():
        # A name without folders. It may be a link, because the hub's cache stores the files elsewhere.
        if not isinstance(file, str) or file != os.path.basename(file) or not file.endswith(".safetensors"):
            raise InputError(f"{index}: names {file!r}, which is not a .safetensors file of the same folder")
    return file_of_tensor


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold the weights of a folder, the index of shards included; some may be missing.

    Raises:
      InputError: There is neither a single file nor an index, or the index is damaged.
    """
    # A single file has precedence, and needs no index.
    if os.path.exists(folder / SINGLE):
        return [folder / SINGLE]
    return [folder / INDEX, *(folder / name for name in sorted(set(read_weight_map(folder).values())))]


def read_headers(folder: Path) -> dict[str, TensorHeader]:
    """Read the headers of all tensors in the safetensors files that `load_hf` reads.

    Raises:
      InputError: A file is missing, truncated or outside the folder.
    """
    headers: dict[str, TensorHeader] = {}
    for file in weight_files(folder):
        if file.name != INDEX:
            headers |= _file_headers(file)
    return headers


def _explain_missing_weights(folder: Path) -> str:
    """Return the message for a folder without safetensors."""
    if not folder.is_dir():
        return f"{folder}: no such folder"
    # Name what the folder holds instead, with the way to use it.
    files = sorted(path.name for path in folder.iterdir())
    pickled = [name for name in files if name.endswith(_PICKLE_SUFFIXES)]
    if pickled:
        return (
            f"{folder}: its weights are pickled ({abbreviate_names(pickled)}), and a pickle can run code. "
            "Convert them to safetensors or GGUF."
        )
    gguf = [name for name in files if name.endswith(".gguf")]
    if gguf:
        return f"{folder}: no safetensors. To load a GGUF file, pass its path: {folder / gguf[0]}"
    return f"{folder}: no weights. It must contain {SINGLE}, or shards and {INDEX}."


def _file_headers(file: Path) -> dict[str, TensorHeader]:
    with _open(file) as handle:
        tensors = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (not a mapping)
        return {
            name: TensorHeader(file, tuple(tensor.get_shape()), tensor.get_dtype()) for name, tensor in tensors.items()
        }


def _open(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    check_regular(file)
    try:
        return safe_open(file, framework="np")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: truncated, or not a safetensors file: {error}") from None


def _leaves(tree: Params) -> Iterator[tuple[tuple[str, ...], Any]]:
    for path, leaf in jax.tree.leaves_with_path(tree):
        yield tuple(entry.key for entry in path), leaf


def abbreviate_names(names: Sequence[str]) -> str:
    """Return the first three names, and the number of further ones."""
    first_names = ", ".join(names[:3])
    return first_names if len(names) <= 3 else f"{first_names} and {len(names) - 3} more"
