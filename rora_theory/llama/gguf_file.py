"""GGUF files of the architectures ``llama``, ``qwen2``, ``qwen3`` and ``gemma3``.

Their metadata becomes a configuration, their quantised blocks the weights of `model`. Mistral's files are of ``llama``
and say nothing of a sliding window: they are read without one.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Blocks are dequantised by the `gguf`
package.
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
from rora_theory.errors import InputError
from rora_theory.io.files import check_regular
from rora_theory.llama import rope
from rora_theory.llama.config import OTHER_MODELS, LinearRope, Llama3Rope, LlamaConfig, RopeScaling, check_layers, shown
from rora_theory.llama.families import FAMILIES, Family
from rora_theory.llama.model import Params
from rora_theory.llama.weights import assemble, check_finite, check_shapes

try:
    from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor, dequantize
except ImportError as error:
    GGMLQuantizationType = GGUFReader = ReaderTensor = dequantize = extras.missing(error)  # type: ignore[misc]

QUANTISATIONS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
"""Types of a tensor that are read."""

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}
"""Values of ``general.architecture`` that are read, and Hugging Face's ``model_type`` of each."""

_MODULES = {
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
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_FREQUENCIES = "rope_freqs.weight"
# Keys of the architecture that say nothing about the function computed.
_PASSED_OVER = ("vocab_size", "tensor_data_layout", "rope.scaling.finetuned")
_CHUNK = 1 << 24  # elements dequantised at once: 64 MiB in float32
_MOST_PARTS = 1 << 22  # parts of a header, each an object in memory; 128 000 tokens with their merges make one million

END_TOKENS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
"""Keys of the tokens that end a text: of a text, of a turn, of a message."""


class _Reader(GGUFReader):
    """The package's reader, which believes what a header says of lengths, made to stop at the file's end."""

    data: Any  # the map, then its bytes
    _parts = 0

    def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> np.ndarray:
        if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
            raise ValueError("it ends before what its header claims")
        self._parts += 1
        if self._parts > _MOST_PARTS:
            raise ValueError(f"its header has more than {_MOST_PARTS:,} parts")
        if type(self.data) is not np.ndarray:
            self.data = self.data.view(np.ndarray)  # each part is a view, and those of a memory map are large
        return super()._get(offset, dtype, count, override_order)


def open_gguf(path: Path) -> GGUFReader:
    """Map a GGUF file and parse its header, once for all that ask one after another about the same file.

    Raises:
      InputError: no such file, not a regular one, not a GGUF file, or one that is truncated or claims more than
        it has.
    """
    check_regular(path)
    found = path.stat()
    return _opened(path, (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns))


@lru_cache(maxsize=1)
def _opened(path: Path, version: tuple[int, ...]) -> GGUFReader:  # noqa: ARG001 (another version is another file)
    try:
        return _Reader(path)
    except (OSError, ValueError, KeyError, IndexError, OverflowError, RecursionError) as error:
        raise InputError(f"{path}: truncated, or not a GGUF file: {error}") from None


def read_value(reader: GGUFReader, where: str, name: str, kind: Any, default: Any = ...) -> Any:
    """One value of a file's metadata.

    Args:
      reader, where: the file, and its name in messages.
      name: of the key.
      kind: int, float, bool, str, a list of one of them such as ``list[str]``, or Any.
      default: what a file without the key has; none is required.

    Raises:
      InputError: the key is missing, or its value is damaged or of another type.
    """
    if name not in reader.fields:
        if default is ...:
            raise InputError(f"{where}: metadata lacks {name}")
        return default
    try:
        value = reader.fields[name].contents()
    except (ValueError, IndexError, TypeError) as error:
        raise InputError(f"{where}: metadata {name} is damaged: {error}") from None
    (wanted,) = get_args(kind) or (kind,)
    parts = value if kind is not wanted and isinstance(value, list) else [value]
    fits = (kind is wanted) != isinstance(value, list) and all(type(part) is wanted for part in parts)
    if kind is not Any and not fits:
        what = wanted.__name__ if kind is wanted else f"list of {wanted.__name__}"
        raise InputError(f"{where}: metadata {name} is {shown(value)}; accepted is a value of type {what}")
    return value


def config_from_gguf(reader: GGUFReader, where: str) -> LlamaConfig:
    """The configuration in a file's metadata and tensor list.

    LLaMA 3.1's rotary scaling is stored as divisors of the frequencies, ``rope_freqs.weight``, without the
    parameters that made them; they are recovered and checked against the divisors.

    Raises:
      InputError: another architecture, a key or a value that is not supported, or one that is missing.
    """
    used: set[str] = set()

    def get(name: str, kind: type, default: Any = ...) -> Any:
        used.add(name)
        return read_value(reader, where, name, kind, default)

    architecture = get("general.architecture", str)
    if architecture not in ARCHITECTURES:
        raise InputError(
            f"{where}: architecture is {shown(architecture)}; accepted are {', '.join(ARCHITECTURES)}; {OTHER_MODELS}"
        )
    keys = {name for name in reader.fields if name.startswith(f"{architecture}.")}
    used.update(f"{architecture}.{name}" for name in _PASSED_OVER)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in tensors:
        raise InputError(f"{where}: lacks token_embd.weight")
    heads, hidden = get(f"{architecture}.attention.head_count", int), get(f"{architecture}.embedding_length", int)
    for name, value in ((f"{architecture}.attention.head_count", heads), (f"{architecture}.embedding_length", hidden)):
        if value < 1:
            raise InputError(f"{where}: {name} is {value!r}; accepted is an integer of 1 or more")
    head_dim = get(f"{architecture}.attention.key_length", int, hidden // heads)
    for name in (f"{architecture}.attention.value_length", f"{architecture}.rope.dimension_count"):
        if (value := get(name, int, head_dim)) != head_dim:
            raise InputError(f"{where}: {name} is {value!r}; accepted is the head's length {head_dim}")
    for name in (f"{architecture}.expert_count", f"{architecture}.expert_used_count"):
        if value := get(name, int, 0):
            raise InputError(f"{where}: {name} is {value!r}; mixtures of experts are not supported")
    scaling_type = get(f"{architecture}.rope.scaling.type", str, "none")
    factor = get(f"{architecture}.rope.scaling.factor", float, 1.0)
    original = get(f"{architecture}.rope.scaling.original_context_length", int, None)
    if scaling_type not in ("none", "linear"):
        raise InputError(
            f"{where}: {architecture}.rope.scaling.type is {shown(scaling_type)}; accepted are none, linear"
        )
    family = FAMILIES[ARCHITECTURES[architecture]]
    theta = _decimal(get(f"{architecture}.rope.freq_base", float, family.rope_theta))
    layers = get(f"{architecture}.block_count", int)
    check_layers(f"{where}: {architecture}.block_count", layers)
    further = _gemma3_fields(get, where, layers, hidden // heads, head_dim) if architecture == "gemma3" else {}
    ends = dict.fromkeys(end for name in END_TOKENS if (end := get(name, int, None)) is not None)
    parts = {
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "hidden_size": hidden,
        "intermediate_size": get(f"{architecture}.feed_forward_length", int),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": get(f"{architecture}.attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "rms_norm_eps": _decimal(get(f"{architecture}.attention.layer_norm_rms_epsilon", float)),
        "rope_theta": theta,
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": not family.has_qkv_bias and "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "max_position_embeddings": get(f"{architecture}.context_length", int),
        "bos_token_id": get("tokenizer.ggml.bos_token_id", int, None),
        "eos_token_id": tuple(ends) if len(ends) > 1 else next(iter(ends), None),
        "pad_token_id": get("tokenizer.ggml.padding_token_id", int, None),
        "model_type": ARCHITECTURES[architecture],
        **further,
    }
    unknown = sorted(keys - used)
    if unknown:
        value = read_value(reader, where, unknown[0], Any)
        raise InputError(f"{where}: metadata {unknown[0]} is {shown(value)}; not supported")
    scaling: RopeScaling | None = None
    try:
        if scaling_type == "linear" and factor != 1:
            scaling = LinearRope(factor)
        config = LlamaConfig(**parts, rope_scaling=scaling)
        if _FREQUENCIES in tensors:
            if scaling is not None:
                raise InputError(f"{_FREQUENCIES} beside a linear scaling; accepted is one of them")
            config = _with_llama3(config, tensors[_FREQUENCIES], original)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    return config


def _gemma3_fields(
    get: Callable[..., Any], where: str, layers: int, hidden_per_head: int, head_dim: int
) -> dict[str, Any]:
    """Read the fields that Gemma 3 has and the other architectures have not.

    Files leave out what is the same in all released models: the period of the layers without window, the rotary base
    of the others, and the divisor of the scores, which differs in the model of 62 layers alone.
    """
    window = get("gemma3.attention.sliding_window", int)
    period = get("gemma3.attention.sliding_window_pattern", int, 6)
    if period < 1:
        raise InputError(f"{where}: gemma3.attention.sliding_window_pattern must be at least 1, got {period}")
    full = tuple(range(period - 1, layers, period))
    has_window = len(full) < layers
    return {
        "sliding_window": window if has_window else None,
        "full_attention_layers": full if has_window else (),
        "query_pre_attn_scalar": hidden_per_head if layers == 62 else head_dim,
        "rope_local_base_freq": _decimal(get("gemma3.rope.freq_base_swa", float, 10000.0)),
    }


def load_gguf(
    reader: GGUFReader,
    path: Path,
    config: LlamaConfig,
    dtype: DTypeLike = jnp.float32,
    shardings: Params | None = None,
    quantization: str = "none",
) -> Params:
    """The weights of a GGUF file, dequantised in float32 and converted to ``dtype``.

    With ``quantization``, a module's weights that the file has in such blocks keep them bit for bit.

    Args:
      reader, path: the file.
      config: of `config_from_gguf`.
      dtype: float32, bfloat16 or float16.
      shardings: where to put each leaf; None is the default device.
      quantization: of the modules' weights, see `weights.assemble`.

    Raises:
      InputError: tensors that are missing, unknown, of another shape than the configuration's, or quantised
        in a way that is not read, or not finite in ``dtype``.
    """
    found = {}
    for tensor in reader.tensors:
        if tensor.name == _FREQUENCIES:
            continue
        name = _hf_name(tensor.name, config.family)
        if name is None:
            raise InputError(f"{path}: holds {shown(tensor.name)}, no part of a {config.model_type} model")
        if tensor.tensor_type.name not in QUANTISATIONS:
            raise InputError(
                f"{path}: {tensor.name} is of type {tensor.tensor_type.name}; accepted are {', '.join(QUANTISATIONS)}"
            )
        found[name] = tensor
    shapes = {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in found.items()}
    check_shapes(str(path), shapes, config)
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads} if config.model_type == "llama" else {}

    def order(name: str) -> np.ndarray | None:
        projection = name.rpartition(".self_attn.")[2]
        interleaved = heads.get(projection[0]) if projection[1:].startswith("_proj") else None
        return _file_rows(config.head_dim, interleaved, shapes[name][0])

    def stored(name: str) -> np.ndarray | None:
        if found[name].tensor_type.name != quantization.upper():
            return None
        rows, blocks = order(name), np.concatenate([raw for _, raw in _raw(path, found[name])])
        if rows is None:
            return blocks
        ordered = np.empty_like(blocks)
        ordered[rows] = blocks
        return ordered

    def read(names: list[str], out: np.ndarray) -> None:
        for i, name in enumerate(names):
            rows = order(name)
            for start, raw in _raw(path, found[name]):
                block = dequantize(raw, GGMLQuantizationType(found[name].tensor_type))
                if name.endswith("norm.weight"):
                    block = block - np.float32(config.family.norm_offset)  # files hold the sum
                # LLaMA's rows of a head are stored as rotary pairs side by side; here a pair lies half a head apart.
                at = slice(start, start + len(block)) if rows is None else rows[start : start + len(block)]
                with np.errstate(over="ignore"):  # of float16: infinite here, and refused
                    out[i][at] = block
            check_finite(f"{path}: {found[name].name}", out[i])

    return assemble(config, dtype, read, shardings, quantization, stored)


def _file_rows(head_dim: int, heads: int | None, count: int) -> np.ndarray | None:
    """For each stored row of a q or k projection the row it belongs to; None where the order is kept."""
    if heads is None:
        return None
    return np.arange(count).reshape(heads, 2, head_dim // 2).swapaxes(1, 2).reshape(-1)


def _raw(path: Path, tensor: ReaderTensor) -> Iterator[tuple[int, np.ndarray]]:
    """A tensor as it is stored, some rows at a time: (first row, rows).

    Read from the file, not through the reader's map, whose pages would stay in memory beside the weights.
    """
    stored = tensor.data
    width = int(tensor.shape[0])
    step = max(1, _CHUNK // width) if stored.ndim > 1 else len(stored)
    row = stored.nbytes // len(stored)
    for start in range(0, len(stored), step):
        shape = (min(step, len(stored) - start), *stored.shape[1:])
        count, offset = int(np.prod(shape)), tensor.data_offset + start * row
        yield start, np.fromfile(path, stored.dtype, count=count, offset=offset).reshape(shape)


def _hf_name(name: str, family: Family) -> str | None:
    """Return Hugging Face's name of a GGUF tensor; None for one that no model of the family has."""
    if name in _TOP:
        return _TOP[name]
    norms = {ggml: getattr(family.norms, place) for ggml, place in _NORMS.items()}
    parts = name.split(".")
    module = (_MODULES | norms).get(parts[2]) if len(parts) == 4 else None
    if module is None or parts[0] != "blk" or parts[3] not in ("weight", "bias"):
        return None
    # An index has one spelling only: a second one (00, or digits of another script) would replace a layer's weights.
    if not re.fullmatch(r"0|[1-9][0-9]{0,8}", parts[1]):
        return None
    return f"model.layers.{parts[1]}.{module}.{parts[3]}"


def _decimal(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05 where the file's float32 reads 9.99999974e-06."""
    with np.errstate(over="ignore"):  # of a float64: infinite, and refused as such
        return float(str(np.float32(value)))


def _with_llama3(config: LlamaConfig, tensor: ReaderTensor, original: int | None) -> LlamaConfig:
    """The configuration with the llama3 scaling whose divisors ``rope_freqs.weight`` holds.

    The files do not say low and high frequency factors; every released model has 1 and 4 over 8192 tokens.
    """
    divisors = np.asarray(tensor.data, np.float32)
    plain = rope.frequencies(config)
    if divisors.shape != plain.shape or not np.all(np.isfinite(divisors)):
        raise InputError(f"{_FREQUENCIES} has shape {divisors.shape}; accepted are {len(plain)} numbers")
    if np.all(divisors == 1):
        return config
    factor = float(np.max(divisors))
    for length in dict.fromkeys((original or 8192, 8192, config.max_position_embeddings)):
        if factor < 1:
            break
        scaling = Llama3Rope(_decimal(factor), 1.0, 4.0, length)
        if np.allclose(rope.scaling_divisor(scaling, plain), divisors, rtol=1e-5, atol=0):
            return dataclasses.replace(config, rope_scaling=scaling)
    raise InputError(
        f"{_FREQUENCIES} with divisors up to {factor:g} is no llama3 scaling with frequency factors 1 and 4; "
        "accepted is the model's Hugging Face folder"
    )
