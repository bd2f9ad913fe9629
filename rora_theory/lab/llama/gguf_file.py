"""Reading of GGUF files of the architectures ``llama``, ``qwen2``, ``qwen3`` and ``gemma3``.

A file's metadata becomes a configuration, and its tensors become the weights of `model`. The `gguf` package parses the
header and dequantises blocks. Mistral's files have the architecture ``llama`` and no entry for a sliding window; they
are read without one.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from rora_theory import extras
from rora_theory.errors import InputError, shown
from rora_theory.lab.llama import rope
from rora_theory.lab.llama.config import OTHER_MODELS, LinearRope, Llama3Rope, LlamaConfig, RopeScaling
from rora_theory.lab.llama.families import FAMILIES, Family
from rora_theory.lab.llama.model import Params
from rora_theory.lab.llama.weights import build_params, check_finite, check_shapes
from rora_theory.runs.files import check_regular

try:
    from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor, dequantize
except ImportError as error:
    GGMLQuantizationType = GGUFReader = ReaderTensor = dequantize = extras.missing(error)  # type: ignore[misc]

TENSOR_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
"""Supported types of a tensor."""

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}
"""Supported values of ``general.architecture``, and Hugging Face's ``model_type`` of each."""

# GGUF's names of tensors, and Hugging Face's.
_MODULES = {  # of a layer, ``blk.INDEX.MODULE``
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
_NORMS = {
    "attn_norm": "before_attention",
    "post_attention_norm": "after_attention",
    "ffn_norm": "before_feed_forward",
    "post_ffw_norm": "after_feed_forward",
}
"""GGUF's names of the norms of the residual stream, and the fields of `families.LayerNorms`."""
_OUTSIDE_LAYERS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_FREQUENCIES = "rope_freqs.weight"
# Keys of the architecture that do not change the function computed.
_IGNORED_KEYS = ("vocab_size", "tensor_data_layout", "rope.scaling.finetuned")
_CHUNK_ELEMENTS = 1 << 24  # elements dequantised at a time: 64 MiB in float32

END_TOKEN_KEYS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
"""Metadata keys of the tokens that end a text, a turn and a message."""


class _Reader(GGUFReader):
    """Reader of the `gguf` package that names a truncated file by the lengths in its header."""

    data: Any  # the memory map, then a plain view of its bytes

    def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> np.ndarray:
        if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
            raise ValueError("it ends before the length in its header")
        # Each part is a view of the data; views of a memory map are much larger objects than views of an array.
        if type(self.data) is not np.ndarray:
            self.data = self.data.view(np.ndarray)
        return super()._get(offset, dtype, count, override_order)


def open_gguf(path: Path) -> GGUFReader:
    """Map a GGUF file and parse its header. The last file is cached, so that consecutive calls parse it once.

    Raises:
      InputError: The file does not exist, is not a GGUF file, or is shorter than the lengths in its header.
    """
    check_regular(path)
    status = path.stat()
    return _open_version(path, (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))


@lru_cache(maxsize=1)
def _open_version(path: Path, version: tuple[int, ...]) -> GGUFReader:  # noqa: ARG001 (part of the cache's key)
    try:
        return _Reader(path)
    except (OSError, ValueError, KeyError, IndexError, OverflowError, RecursionError) as error:
        raise InputError(f"{path}: truncated, or not a GGUF file: {error}") from None


def read_metadata(reader: GGUFReader, where: str, name: str, kind: Any, default: Any = ...) -> Any:
    """Read one value of a file's metadata.

    Args:
      where: Name of the file, for the error.
      name: Key of the value.
      kind: Expected type: int, float, bool, str, a list of one of them such as ``list[str]``, or Any.
      default: Value for a file without the key; by default, such a file raises an error.

    Raises:
      InputError: The key is missing, or its value is damaged or of another type.
    """
    # A key without a default is required.
    if name not in reader.fields:
        if default is ...:
            raise InputError(f"{where}: metadata lacks {name}")
        return default
    try:
        value = reader.fields[name].contents()
    except (ValueError, IndexError, TypeError) as error:
        raise InputError(f"{where}: metadata {name} is damaged: {error}") from None
    if kind is Any:
        return value
    # Compare exact types: a bool is an int for isinstance.
    (element_type,) = get_args(kind) or (kind,)
    expects_list = kind is not element_type
    elements = value if expects_list and isinstance(value, list) else [value]
    if expects_list != isinstance(value, list) or not all(type(element) is element_type for element in elements):
        expected = f"list of {element_type.__name__}" if expects_list else element_type.__name__
        raise InputError(f"{where}: metadata {name} must be of type {expected}, got {shown(value)}")
    return value


def config_from_gguf(reader: GGUFReader, where: str) -> LlamaConfig:
    """Read the configuration in a file's metadata and tensor list.

    LLaMA 3.1's rotary scaling is stored as divisors of the frequencies, ``rope_freqs.weight``, without the parameters
    that made them. The parameters are recovered and checked against the divisors.

    Raises:
      InputError: The architecture, a key or a value is not supported, or one is missing.
    """
    used_keys: set[str] = set()

    def get(name: str, kind: type, default: Any = ...) -> Any:
        used_keys.add(name)
        return read_metadata(reader, where, name, kind, default)

    # One file of several has only some of the tensors, and only the first of them has the metadata.
    if (files := get("split.count", int, 1)) != 1:
        raise InputError(
            f"{where}: split.count must be 1, got {files}; the model is split into files. Join them with "
            "llama-gguf-split --merge."
        )

    # Architecture, and the tensors that the file holds.
    architecture = get("general.architecture", str)
    if architecture not in ARCHITECTURES:
        supported = ", ".join(ARCHITECTURES)
        raise InputError(f"{where}: architecture must be one of {supported}, got {shown(architecture)}; {OTHER_MODELS}")
    keys = {name for name in reader.fields if name.startswith(f"{architecture}.")}
    used_keys.update(f"{architecture}.{name}" for name in _IGNORED_KEYS)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in tensors:
        raise InputError(f"{where}: lacks token_embd.weight")

    hidden, heads, head_dim = _read_head_sizes(get, where, architecture)
    _refuse_experts(get, where, architecture)

    # Rotary embedding.
    scaling_type = get(f"{architecture}.rope.scaling.type", str, "none")
    factor = get(f"{architecture}.rope.scaling.factor", float, 1.0)
    original_length = get(f"{architecture}.rope.scaling.original_context_length", int, None)
    if scaling_type not in ("none", "linear"):
        raise InputError(f"{where}: {architecture}.rope.scaling.type must be none or linear, got {shown(scaling_type)}")
    family = FAMILIES[ARCHITECTURES[architecture]]
    theta = _shortest_decimal(get(f"{architecture}.rope.freq_base", float, family.rope_theta))

    # Fields of the configuration.
    layers = get(f"{architecture}.block_count", int)
    gemma3_fields = _gemma3_fields(get, where, layers, hidden // heads, head_dim) if architecture == "gemma3" else {}
    # A file may name several end tokens, such as the end of text and the end of a turn.
    eos_ids = dict.fromkeys(token for name in END_TOKEN_KEYS if (token := get(name, int, None)) is not None)
    fields = {
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "hidden_size": hidden,
        "intermediate_size": get(f"{architecture}.feed_forward_length", int),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": get(f"{architecture}.attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "rms_norm_eps": _shortest_decimal(get(f"{architecture}.attention.layer_norm_rms_epsilon", float)),
        "rope_theta": theta,
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": not family.has_qkv_bias and "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "max_position_embeddings": get(f"{architecture}.context_length", int),
        "bos_token_id": get("tokenizer.ggml.bos_token_id", int, None),
        "eos_token_id": tuple(eos_ids) if len(eos_ids) > 1 else next(iter(eos_ids), None),
        "pad_token_id": get("tokenizer.ggml.padding_token_id", int, None),
        "model_type": ARCHITECTURES[architecture],
        **gemma3_fields,
    }

    # A key that nothing above has used might change the function computed.
    unknown = sorted(keys - used_keys)
    if unknown:
        value = read_metadata(reader, where, unknown[0], Any)
        raise InputError(f"{where}: metadata {unknown[0]} is not supported, got {shown(value)}")

    # The rotary scaling is recovered last, because its divisors are compared with the plain frequencies.
    scaling: RopeScaling | None = None
    try:
        if scaling_type == "linear" and factor != 1:
            scaling = LinearRope(factor)
        config = LlamaConfig(**fields, rope_scaling=scaling)
        if _FREQUENCIES in tensors:
            if scaling is not None:
                raise InputError(f"has both {_FREQUENCIES} and a linear rotary scaling, which exclude each other")
            config = _recover_llama3_scaling(config, tensors[_FREQUENCIES], original_length)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    return config


def _read_head_sizes(get: Callable[..., Any], where: str, architecture: str) -> tuple[int, int, int]:
    """Read the hidden size, the number of heads and the width of a head.

    Raises:
      InputError: Keys, values and rotated parts of a head differ in width.
    """
    heads, hidden = get(f"{architecture}.attention.head_count", int), get(f"{architecture}.embedding_length", int)
    for name, value in ((f"{architecture}.attention.head_count", heads), (f"{architecture}.embedding_length", hidden)):
        if value < 1:
            raise InputError(f"{where}: {name} must be at least 1, got {value!r}")
    head_dim = get(f"{architecture}.attention.key_length", int, hidden // heads)
    for name in (f"{architecture}.attention.value_length", f"{architecture}.rope.dimension_count"):
        if (value := get(name, int, head_dim)) != head_dim:
            raise InputError(f"{where}: {name} must equal the width of a head, {head_dim}, got {value!r}")
    return hidden, heads, head_dim


def _refuse_experts(get: Callable[..., Any], where: str, architecture: str) -> None:
    """Raise `InputError` if the model is a mixture of experts."""
    for name in (f"{architecture}.expert_count", f"{architecture}.expert_used_count"):
        if value := get(name, int, 0):
            raise InputError(f"{where}: {name} must be 0, got {value!r}; mixtures of experts are not supported")


def _gemma3_fields(
    get: Callable[..., Any], where: str, layers: int, hidden_per_head: int, head_dim: int
) -> dict[str, Any]:
    """Read the fields of the configuration that only Gemma 3 has.

    Files omit what is the same in all released models: the period of the layers without window, the rotary base of the
    layers with one, and the divisor of the scores, which differs in the model of 62 layers only.
    """
    window = get("gemma3.attention.sliding_window", int)
    period = get("gemma3.attention.sliding_window_pattern", int, 6)
    if period < 1:
        raise InputError(f"{where}: gemma3.attention.sliding_window_pattern must be at least 1, got {period}")
    # Every period-th layer attends without a window.
    full = tuple(range(period - 1, layers, period))
    has_window = len(full) < layers
    return {
        "sliding_window": window if has_window else None,
        "full_attention_layers": full if has_window else (),
        "query_pre_attn_scalar": hidden_per_head if layers == 62 else head_dim,
        "rope_local_base_freq": _shortest_decimal(get("gemma3.rope.freq_base_swa", float, 10000.0)),
    }


def load_gguf(
    reader: GGUFReader,
    path: Path,
    config: LlamaConfig,
    dtype: DTypeLike = jnp.float32,
    shardings: Params | None = None,
    quantization: str = "none",
) -> Params:
    """Load the weights of a GGUF file, dequantised in float32 and converted to ``dtype``.

    With ``quantization``, modules whose weights the file stores in such blocks keep them bit for bit.

    Args:
      dtype: Type of the weights: float32, bfloat16 or float16.
      shardings: Tree of shardings with the structure of the weights; None for the default device.
      quantization: Storage of the modules' weights, see `weights.build_params`.

    Raises:
      InputError: A tensor is missing, unknown, of another shape than the configuration's, quantised in an unsupported
        way, or not finite in ``dtype``.
    """
    tensors = _tensors_by_hugging_face_name(reader, path, config)
    # GGUF lists the fastest axis first.
    shapes = {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in tensors.items()}
    check_shapes(str(path), shapes, config)

    # Number of heads of the projections whose rows, and biases, LLaMA files store in another order.
    permuted_heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}

    def row_order(name: str) -> np.ndarray | None:
        module = name.split(".")[-2]
        if config.model_type != "llama" or module not in permuted_heads:
            return None
        return _unpermuted_rows(shapes[name][0], permuted_heads[module])

    # Blocks of the requested type are kept without rounding; a permutation of rows does not change them.
    def read_blocks(name: str) -> np.ndarray | None:
        if tensors[name].tensor_type.name != quantization.upper():
            return None
        rows, blocks = row_order(name), np.concatenate([raw for _, raw in _stored_rows(path, tensors[name])])
        if rows is None:
            return blocks
        ordered = np.empty_like(blocks)
        ordered[rows] = blocks
        return ordered

    # Dequantise a few rows at a time, so that the float32 copy of a large tensor is never held whole.
    def read(names: list[str], out: np.ndarray) -> None:
        for i, name in enumerate(names):
            rows = row_order(name)
            for start, raw in _stored_rows(path, tensors[name]):
                block = dequantize(raw, GGMLQuantizationType(tensors[name].tensor_type))
                # Files hold the sum of the offset and the weight.
                if name.endswith("norm.weight"):
                    block = block - np.float32(config.family.norm_offset)
                # Rows in their order, or scattered to where the permutation puts them.
                at = slice(start, start + len(block)) if rows is None else rows[start : start + len(block)]
                with np.errstate(over="ignore"):  # a number that overflows float16 is refused below
                    out[i][at] = block
            check_finite(f"{path}: {tensors[name].name}", out[i])

    return build_params(config, dtype, read, shardings, quantization, read_blocks)


def _tensors_by_hugging_face_name(reader: GGUFReader, path: Path, config: LlamaConfig) -> dict[str, ReaderTensor]:
    """Return the tensors that hold weights; `InputError` for one that the family lacks or whose type is unsupported."""
    tensors = {}
    for tensor in reader.tensors:
        if tensor.name == _FREQUENCIES:
            continue
        name = _hugging_face_name(tensor.name, config.family)
        if name is None:
            raise InputError(f"{path}: holds {shown(tensor.name)}, which a {config.model_type} model does not have")
        if tensor.tensor_type.name not in TENSOR_TYPES:
            raise InputError(
                f"{path}: {tensor.name} must be of a type among {', '.join(TENSOR_TYPES)}, "
                f"got {tensor.tensor_type.name}"
            )
        tensors[name] = tensor
    return tensors


def _unpermuted_rows(rows: int, heads: int) -> np.ndarray:
    """Return the row of the projection that each stored row belongs to.

    LLaMA's files store the two rows of a rotary pair next to each other. Here they are half a head apart.
    """
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def _stored_rows(path: Path, tensor: ReaderTensor) -> Iterator[tuple[int, np.ndarray]]:
    """Read a tensor as it is stored, in chunks of rows; yield the index of the first row and the rows.

    The rows are read from the file, not from the reader's memory map, whose pages would stay in memory with the
    weights.
    """
    stored = tensor.data
    row_elements = int(tensor.shape[0])
    row_bytes = stored.nbytes // len(stored)
    step = max(1, _CHUNK_ELEMENTS // row_elements) if stored.ndim > 1 else len(stored)
    for start in range(0, len(stored), step):
        shape = (min(step, len(stored) - start), *stored.shape[1:])
        count, offset = int(np.prod(shape)), tensor.data_offset + start * row_bytes
        yield start, np.fromfile(path, stored.dtype, count=count, offset=offset).reshape(shape)


def _hugging_face_name(name: str, family: Family) -> str | None:
    """Return Hugging Face's name of a GGUF tensor; None if no model of the family has such a tensor."""
    # Tensors outside the layers, then those of a layer: blk.INDEX.MODULE.weight or .bias.
    if name in _OUTSIDE_LAYERS:
        return _OUTSIDE_LAYERS[name]
    norms = {gguf_name: getattr(family.norms, field) for gguf_name, field in _NORMS.items()}
    parts = name.split(".")
    module = (_MODULES | norms).get(parts[2]) if len(parts) == 4 else None
    if module is None or parts[0] != "blk" or parts[3] not in ("weight", "bias"):
        return None
    # A layer's index has one spelling only. Another (00, or digits of another script) would replace its weights.
    if not re.fullmatch(r"0|[1-9][0-9]{0,8}", parts[1]):
        return None
    return f"model.layers.{parts[1]}.{module}.{parts[3]}"


def _shortest_decimal(value: float) -> float:
    """Return the shortest decimal that is the same float32: 1e-05 for a file's 9.99999974e-06.

    GGUF stores the numbers of `config.json` in float32. This restores them, so that both files give one configuration.
    """
    with np.errstate(over="ignore"):  # a float64 that overflows is refused by the configuration
        return float(str(np.float32(value)))


def _recover_llama3_scaling(config: LlamaConfig, tensor: ReaderTensor, original_length: int | None) -> LlamaConfig:
    """Return the configuration with the llama3 scaling whose divisors ``rope_freqs.weight`` holds.

    The files do not contain the low and high frequency factors; every released model has 1 and 4 over 8192 tokens.
    """
    # Divisors of the plain frequencies; all equal to 1 means no scaling.
    divisors = np.asarray(tensor.data, np.float32)
    plain = rope.frequencies(config)
    if divisors.shape != plain.shape or not np.all(np.isfinite(divisors)):
        raise InputError(f"{_FREQUENCIES} must hold {len(plain)} finite numbers, got shape {divisors.shape}")
    if np.all(divisors == 1):
        return config
    # The slowest frequencies are divided by the factor itself. Try the plausible original lengths.
    factor = float(np.max(divisors))
    for length in dict.fromkeys((original_length or 8192, 8192, config.max_position_embeddings)):
        if factor < 1:
            break
        scaling = Llama3Rope(_shortest_decimal(factor), 1.0, 4.0, length)
        if np.allclose(rope.scaling_divisor(scaling, plain), divisors, rtol=1e-5, atol=0):
            return dataclasses.replace(config, rope_scaling=scaling)
    raise InputError(
        f"{_FREQUENCIES} with divisors up to {factor:g} matches no llama3 scaling with frequency factors 1 and 4. "
        "Use the model's Hugging Face folder."
    )
