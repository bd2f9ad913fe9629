"""Weights between Hugging Face's safetensors folders and the stacked tree of `model`. Nothing else is read:
no pickle.

Every name and shape is checked against the configuration before the first weight is read. Then one leaf of
the tree at a time is filled tensor by tensor and put on the device, so that the host holds one leaf and no
second model.
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
from rora_theory.io.files import check_regular, read_object, resolve_inside, temporary_path
from rora_theory.llama.config import LlamaConfig
from rora_theory.llama.model import Params, abstract_params
from rora_theory.llama.quantised import Quantised, dense_params, fill, is_quantised, quantise

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
_EMBEDDINGS = "model.embed_tokens.weight"
_STORED = {"F64", "F32", "F16", "BF16"}
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint: the file that holds it, its shape, and its type there."""

    file: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


def tensor_names(path: Sequence[str], layers: int) -> list[str]:
    """Hugging Face's names of the tensors in one leaf of the tree: one, or one a layer where the leaf is
    stacked.

    Examples:
      >>> tensor_names(("layers", "mlp.up_proj", "weight"), 2)
      ['model.layers.0.mlp.up_proj.weight', 'model.layers.1.mlp.up_proj.weight']
    """
    if path[0] != "layers":
        return ["lm_head.weight" if path[0] == "lm_head" else f"model.{path[0]}.weight"]
    name = path[1] if len(path) == 2 else f"{path[1]}.{path[2]}"
    return [f"model.layers.{i}.{name if len(path) == 3 else name + '.weight'}" for i in range(layers)]


def expected_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a checkpoint of this configuration, by Hugging Face's names."""
    shapes = {}
    for path, leaf in _leaves(abstract_params(config)):
        shape = leaf.shape[1:] if path[0] == "layers" else leaf.shape
        shapes.update(dict.fromkeys(tensor_names(path, config.num_hidden_layers), shape))
    return shapes


def check_shapes(where: str, found: Mapping[str, tuple[int, ...]], config: LlamaConfig) -> None:
    """Refuse tensors that are missing, left over, or of another shape than the configuration's.

    Raises:
      InputError: naming the first such tensors.
    """
    expected = expected_shapes(config)
    missing = [name for name in expected if name not in found]
    if missing:
        raise InputError(f"{where}: lacks {some(missing)}; accepted is every tensor the config implies")
    extra = [name for name in found if name not in expected]
    if extra:
        raise InputError(f"{where}: holds {some(extra)}, no part of the model that the config describes")
    for name, shape in expected.items():
        if tuple(found[name]) != shape:
            raise InputError(f"{where}: {name} has shape {tuple(found[name])}; the config implies {shape}")


def check_dtype(dtype: DTypeLike) -> np.dtype:
    """The dtype that weights may have in memory.

    Raises:
      InputError: another than float32, bfloat16 and float16.
    """
    try:
        kind = jnp.dtype(dtype)
    except TypeError:
        kind = None
    if kind is None or kind.name not in DTYPES:
        raise InputError(f"dtype is {dtype if kind is None else kind.name!r}; accepted are {', '.join(DTYPES)}")
    return kind


def check_finite(what: str, values: np.ndarray) -> None:
    """Refuse weights that are no numbers: a model of them gives figures that look like measurements.

    A float is NaN or infinite where all bits of its exponent are set; looking at bits takes a twentieth of the time
    of `numpy.isfinite` for bfloat16.

    Args:
      what: names the tensor.
      values: contiguous, of one of `DTYPES`.

    Raises:
      InputError: naming the tensor and the first such value.
    """
    mask, kind = _EXPONENT[values.dtype.name]
    bits = values.reshape(-1).view(kind)
    for start in range(0, len(bits), _BLOCK):
        exponents = bits[start : start + _BLOCK] & mask
        if exponents.max() == mask:
            first = start + int(np.argmax(exponents))
            at = ", ".join(str(int(i)) for i in np.unravel_index(first, values.shape))
            raise InputError(
                f"{what} is {float(values.reshape(-1)[first])} at [{at}] in {values.dtype.name}; accepted are finite "
                "numbers"
            )


_EXPONENT = {
    "float32": (np.uint32(0x7F800000), np.uint32),
    "bfloat16": (np.uint16(0x7F80), np.uint16),
    "float16": (np.uint16(0x7C00), np.uint16),
}
_BLOCK = 1 << 18  # elements looked at together: they fit in a cache


def assemble(
    config: LlamaConfig,
    dtype: DTypeLike,
    read: Callable[[list[str], np.ndarray], None],
    shardings: Params | None = None,
    quantization: str = "none",
    stored: Callable[[str], np.ndarray | None] = lambda _: None,
) -> Params:
    """Build the tree of weights leaf by leaf.

    Args:
      config: gives the tree.
      dtype: float32, bfloat16 or float16.
      read: ``read(names, out)`` fills ``out[i]`` with the tensor ``names[i]``, converted.
      shardings: a tree of `jax.sharding.Sharding` like the weights', or None for the default device.
      quantization: of the modules' weights, see `abstract_params`.
      stored: ``stored(name)`` is a tensor's own blocks where they are of that type, [out, bytes]; None where they are
        to be made of its weights.

    Raises:
      InputError: another dtype or quantization, or weights that are beyond a block's float16 scale.
    """
    kind = check_dtype(dtype)
    abstract = abstract_params(config, kind, quantization)
    leaves, structure = jax.tree.flatten_with_path(abstract, is_leaf=is_quantised)
    places = [None] * len(leaves) if shardings is None else jax.tree.leaves(shardings, is_leaf=is_quantised)
    built = []
    for (path, leaf), place in zip(leaves, places, strict=True):
        keys = tuple(entry.key for entry in path)
        names = tensor_names(keys, config.num_hidden_layers)
        host = jax.tree.map(lambda part: np.empty(part.shape, part.dtype), leaf)
        if isinstance(leaf, Quantised):
            _read_blocks(names, host, read, stored)
        else:
            read(names, host if keys[0] == "layers" else host[None])
        # Waiting lets the host's copy go before the next leaf is allocated.
        built.append(jax.block_until_ready(_put(host, place)))
        del host
    return jax.tree.unflatten(structure, built)


def _read_blocks(
    names: Sequence[str],
    out: Quantised,
    read: Callable[[list[str], np.ndarray], None],
    stored: Callable[[str], np.ndarray | None],
) -> None:
    """Fill the layers of a module's blocks: with the file's own, or with what ggml makes of its weights."""
    for layer, name in enumerate(names):
        blocks = stored(name)
        if blocks is None:
            wide = np.empty((1, *out.shape[1:]), np.float32)
            read([name], wide)
            with np.errstate(over="ignore"):  # of a float16 scale: infinite here, and refused
                blocks = quantise(wide[0], out.kind)
        fill(out, layer, blocks)
        for numbers in (out.scales, out.mins):
            if numbers is not None:
                check_finite(f"a block's scale of {name}", numbers[layer])


def _put(host: Any, place: Any) -> Any:
    """An array, or the parts of one in blocks, on its devices; with several processes each places its own part, and
    nothing is sent."""
    if place is None:
        return jax.device_put(host)

    def one(part: np.ndarray, sharding: Any) -> jax.Array:
        if sharding.is_fully_addressable:
            return jax.device_put(part, sharding)
        return jax.make_array_from_callback(part.shape, sharding, lambda index: part[index])

    return jax.tree.map(one, host, place)


def read_config(folder: Path) -> LlamaConfig:
    """The configuration in a folder's ``config.json``.

    Raises:
      InputError: the file is not there, is not JSON, or describes a model that is not supported.
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
    """The weights of a folder in Hugging Face layout: ``model.safetensors``, or shards and their index.

    Args:
      folder, config: as `read_config` reads it.
      dtype: float32, bfloat16 or float16, whatever the type on disk.
      shardings: where to put each leaf; None is the default device.
      quantization: of the modules' weights, made as they are read, see `assemble`.

    Raises:
      InputError: pickled weights alone; files that are missing, truncated or outside the folder; tensors that
        are missing, unknown, of another shape than the configuration's, of a type that is not floating
        point, or not finite in ``dtype``.
    """
    stored = headers(folder)
    for name in [name for name in stored if name.endswith(".rotary_emb.inv_freq")]:
        del stored[name]  # early checkpoints store what the configuration determines
    tied = "lm_head.weight" if config.tie_word_embeddings else ""
    head = stored.pop(tied, None)
    check_shapes(str(folder), {name: tensor.shape for name, tensor in stored.items()}, config)
    for name, tensor in stored.items():
        if tensor.dtype not in _STORED:
            raise InputError(
                f"{tensor.file}: {name} is of type {tensor.dtype}; accepted are {', '.join(sorted(_STORED))}"
            )
    if head is not None and not _same(head, tied, stored[_EMBEDDINGS], _EMBEDDINGS):
        raise InputError(f"{head.file}: lm_head.weight differs from the embeddings, but tie_word_embeddings is true")

    def read(names: list[str], out: np.ndarray) -> None:
        # Closed after each leaf, so that mapped pages do not add up to a second model.
        with ExitStack() as stack:
            files = {file: stack.enter_context(_open(file)) for file in {stored[name].file for name in names}}
            for i, name in enumerate(names):
                with np.errstate(over="ignore"):  # of a wider type: infinite here, and refused
                    out[i] = files[stored[name].file].get_tensor(name)
                check_finite(f"{stored[name].file}: {name}", out[i])

    return assemble(config, dtype, read, shardings, quantization)


def save_hf(
    folder: Path,
    params: Params,
    config: LlamaConfig,
    *,
    tokenizer_from: Path | None = None,
    files: Mapping[str, bytes] | None = None,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a folder that transformers opens: ``config.json``, weights, and the tokenizer's files.

    Written beside and renamed: the folder is there whole or not at all.

    Args:
      folder: new, or empty.
      params: weights, written in the dtype they have; those held in blocks are written dense.
      config: theirs.
      tokenizer_from: a folder whose tokenizer files to copy.
      files: further files by their names.
      shard_bytes: size above which the weights are split into several files.

    Raises:
      InputError: the folder holds something, weights that contradict the configuration, or a disk that is
      full.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: there already; accepted is a new or empty folder")
    expected, params = abstract_params(config), dense_params(params)
    if {path: leaf.shape for path, leaf in _leaves(params)} != {path: leaf.shape for path, leaf in _leaves(expected)}:
        raise InputError(f"{folder}: not written; the weights are not those of a model of this config")
    beside = temporary_path(folder)
    try:
        beside.mkdir(parents=True)
        _write_weights(beside, params, config, shard_bytes)
        dtype = jax.tree.leaves(params)[0].dtype.name
        described = config.to_hf() | {"dtype": dtype, "torch_dtype": dtype}
        (beside / "config.json").write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")
        for weights in beside.glob("*.safetensors"):  # which the library keeps from all but their owner
            shutil.copymode(beside / "config.json", weights)
        for name in TOKENIZER_FILES:
            if tokenizer_from is not None and (tokenizer_from / name).is_file():
                shutil.copyfile(tokenizer_from / name, beside / name)
        for name, content in (files or {}).items():
            (beside / name).write_bytes(content)
        if folder.exists():
            folder.rmdir()
        beside.rename(folder)
    except OSError as error:
        raise InputError(f"{folder}: not written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _write_weights(folder: Path, params: Params, config: LlamaConfig, shard_bytes: int) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    tensors: list[tuple[str, Any, int | None]] = []  # name, leaf, layer
    for path, leaf in _leaves(params):
        stacked = path[0] == "layers"
        for i, name in enumerate(tensor_names(path, config.num_hidden_layers)):
            tensors.append((name, leaf, i if stacked else None))
    shards: list[list[tuple[str, Any, int | None]]] = [[]]
    size = total = 0
    for tensor in tensors:
        count = tensor[1].nbytes if tensor[2] is None else tensor[1].nbytes // config.num_hidden_layers
        if shards[-1] and size + count > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size, total = size + count, total + count
    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    for file, shard in zip(names, shards, strict=True):
        arrays = {name: np.ascontiguousarray(leaf if layer is None else leaf[layer]) for name, leaf, layer in shard}
        try:
            save_file(arrays, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from error
    if len(shards) > 1:
        where = {name: file for file, shard in zip(names, shards, strict=True) for name, _, _ in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def weight_map(folder: Path) -> dict[str, str]:
    """The index of a folder with shards: the file of each tensor.

    Raises:
      InputError: there is none, it is damaged, or it names what is no safetensors file of the folder.
    """
    index = folder / INDEX
    if not os.path.exists(index):
        raise InputError(_no_weights(folder))
    where = read_object(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise InputError(f"{index}: weight_map is missing or empty; accepted is an object of tensor to file")
    for file in where.values():
        resolve_inside(folder, file, where=index, links=True)  # links: the hub's cache has the files elsewhere
        if file != os.path.basename(file) or "\\" in file or not file.endswith(".safetensors"):
            raise InputError(f"{index}: names {file!r}; accepted is a .safetensors file of the same folder")
    return where


def headers(folder: Path) -> dict[str, Stored]:
    """Every tensor of the folder's safetensors, from the files' headers; of the files that `load_hf` reads.

    Raises:
      InputError: as `load_hf` of files that are missing, truncated or outside the folder, and of the index.
    """
    if os.path.exists(folder / SINGLE):
        return dict(_header(folder / SINGLE))
    where = weight_map(folder)
    stored: dict[str, Stored] = {}
    for file in sorted(set(where.values())):
        if not os.path.exists(folder / file):
            raise InputError(f"{folder / file}: not there, though {INDEX} names it")
        for name, tensor in _header(folder / file):
            if where.get(name) != file:
                raise InputError(f"{folder / file}: holds {name}, which {INDEX} places in {where.get(name)}")
            stored[name] = tensor
    lost = [name for name in where if name not in stored]
    if lost:
        raise InputError(f"{folder / where[lost[0]]}: lacks {some(lost)}, which {INDEX} places there")
    return stored


def _no_weights(folder: Path) -> str:
    """Why a folder without safetensors is refused."""
    if not folder.is_dir():
        return f"{folder}: no such folder"
    files = sorted(path.name for path in folder.iterdir())
    pickled = [name for name in files if name.endswith(_PICKLED)]
    if pickled:
        return (
            f"{folder}: its weights are pickled ({some(pickled)}), and a pickle can run code: it is never "
            "read; accepted are safetensors or GGUF"
        )
    gguf = [name for name in files if name.endswith(".gguf")]
    if gguf:
        return f"{folder}: has no safetensors; to read a GGUF file name it: {folder / gguf[0]}"
    return f"{folder}: has no weights; accepted is {SINGLE}, or shards and {INDEX}"


def _header(file: Path) -> Iterator[tuple[str, Stored]]:
    with _open(file) as handle:
        for name in handle.keys():  # noqa: SIM118 (not a mapping)
            tensor = handle.get_slice(name)
            yield name, Stored(file, tuple(tensor.get_shape()), tensor.get_dtype())


def _open(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    check_regular(file)
    try:
        return safe_open(file, framework="np")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: truncated, or not a safetensors file: {error}") from None


def _same(a: Stored, a_name: str, b: Stored, b_name: str) -> bool:
    with _open(a.file) as first, _open(b.file) as second:
        return a.shape == b.shape and np.array_equal(first.get_tensor(a_name), second.get_tensor(b_name))


def _leaves(tree: Params) -> Iterator[tuple[tuple[str, ...], Any]]:
    for path, leaf in jax.tree.leaves_with_path(tree):
        yield tuple(entry.key for entry in path), leaf


def some(names: Sequence[str]) -> str:
    """The first names, and how many more."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
