"""GGUF files: metadata, the q/k permutation, every type of tensor, and refused files."""

import dataclasses
import struct
import tracemalloc
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from support import gguf_files, numpy_llama

from rora_theory.errors import InputError
from rora_theory.lab.llama import LinearRope, Llama3Rope, LlamaConfig, forward, load, rope
from rora_theory.lab.llama.gguf_file import TENSOR_TYPES, config_from_gguf, load_gguf, open_gguf
from rora_theory.lab.llama.quantised import QuantisedWeight, dense_params

# Rows of 256: one block of the K-quantisations.
CONFIG = LlamaConfig(40, 256, 512, 2, 4, 2, 64, 1e-5, rope_theta=5e5, max_position_embeddings=512, pad_token_id=0)
GEMMA = dataclasses.replace(
    CONFIG, num_hidden_layers=3, model_type="gemma3_text", head_dim=32, tie_word_embeddings=True, sliding_window=8,
    full_attention_layers=(1,), query_pre_attn_scalar=32, rope_local_base_freq=1e4,
)  # fmt: skip
PERIOD = "gemma3.attention.sliding_window_pattern"


@pytest.fixture
def write(tmp_path, draw_tensors):
    """Return ``write(config, fields=..., encode=..., change=...)``, which writes a random model, see `gguf_files`."""

    def make(config=CONFIG, fields=(), **settings) -> Path:
        return gguf_files.write_model(tmp_path / "model.gguf", config, draw_tensors(config), fields, **settings)

    return make


def read(path: Path, dtype=jnp.float32):
    reader = open_gguf(path)
    config = config_from_gguf(reader, path.name)
    return config, load_gguf(reader, path, config, dtype)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 32, "pad_token_id": None},
        {"model_type": "qwen2", "tie_word_embeddings": True},
        {"model_type": "qwen3", "head_dim": 32},
    ],
)
def test_float32_gives_the_weights_and_the_config(change, write, draw_params):
    """LLaMA's rows of q and k are put in Hugging Face's order; Qwen's already have it."""
    expected = dataclasses.replace(CONFIG, **change)
    config, params = read(write(expected))
    assert config == expected
    jax.tree.map(np.testing.assert_array_equal, params, draw_params(expected))


def test_gemma3(write, draw_params):
    """The 1 that files add to norms is subtracted, and layers without window and missing entries are derived."""
    config, params = read(write(GEMMA, {PERIOD: 2}))
    assert config == GEMMA
    # 1 + w rounds to a multiple of 2^-23 for weights below 1, of 2^-22 below 3.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2**-22), params, draw_params(GEMMA))
    config = config_from_gguf(open_gguf(write(GEMMA)), "file")
    assert (config.sliding_window, config.full_attention_layers) == (8, ())


@pytest.mark.parametrize("kind", [Type[name] for name in TENSOR_TYPES if name != "F32"])
def test_every_type_is_read_as_the_gguf_package_dequantises_it(kind, write):
    stored = {}

    def encode(name, array):
        if array.ndim == 1:
            return array, None
        # The types K have no quantiser in Python: take blocks of random bits, with plain scales.
        if kind in (Type.Q4_K, Type.Q5_K, Type.Q6_K):
            block, size = gguf.GGML_QUANT_SIZES[kind]
            count = array.size // block
            raw = np.random.default_rng(len(name)).integers(0, 256, (count, size), np.uint8)
            scale = np.random.default_rng(1).uniform(1e-3, 2e-3, (count, 2)).astype(np.float16).view(np.uint8)
            raw[:, :4] = raw[:, :4] if kind == Type.Q6_K else scale
            raw[:, -2:] = scale[:, :2] if kind == Type.Q6_K else raw[:, -2:]
            raw = raw.reshape(len(array), -1)
        else:
            raw = gguf.quantize(array, kind)
        stored[name] = raw
        return raw, kind

    config, params = read(write(encode=encode))
    layers = params["layers"]
    for name, raw in stored.items():
        parts = name.split(".")
        weight = layers[".".join(parts[3:5])]["weight"][int(parts[2])] if "layers" in parts else params[parts[-2]]
        rows = gguf_files.stored_rows(name, np.asarray(weight), CONFIG)
        np.testing.assert_array_equal(rows, gguf.dequantize(raw, kind), err_msg=name)
    assert config == CONFIG


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_0, Type.Q4_1])
def test_blocks_of_the_requested_type_are_kept_bit_for_bit(kind, write):
    """The bits are random, so that quantising again would change them.

    Blocks of another type are quantised again, and rows of q and k are put in order either way.
    """

    def encode(name, array):
        if array.ndim == 1 or name in ("lm_head.weight", "model.layers.1.mlp.up_proj.weight"):
            return array, None
        raw = np.random.default_rng(len(name)).integers(0, 256, (array.size // 32, gguf.GGML_QUANT_SIZES[kind][1]))
        raw[..., 1] &= 0x3F  # finite scales, and minima below
        raw[..., 3] &= 0x3F if kind == Type.Q4_1 else 0xFF
        return raw.astype(np.uint8).reshape(len(array), -1), kind

    path = write(encode=encode)
    _, dense = read(path)
    reader = open_gguf(path)
    quantised = load_gguf(reader, path, CONFIG, jnp.float32, quantization=kind.name.lower())
    dense_weight = quantised["layers"]["mlp.up_proj"].pop("weight").dense()
    weight = dense["layers"]["mlp.up_proj"].pop("weight")
    np.testing.assert_array_equal(dense_weight[0], weight[0])
    np.testing.assert_array_equal(dense_weight[1], gguf.dequantize(gguf.quantize(np.asarray(weight[1]), kind), kind))
    assert isinstance(quantised["layers"]["mlp.down_proj"]["weight"], QuantisedWeight)
    jax.tree.map(np.testing.assert_array_equal, dense_params(quantised), dense)


def test_large_tensors_are_read_in_blocks_of_rows_and_converted(write, draw_params, monkeypatch):
    monkeypatch.setattr("rora_theory.lab.llama.gguf_file._CHUNK_ELEMENTS", 256 * 7)
    for dtype in (jnp.float32, jnp.bfloat16):
        _, params = read(write(), dtype)
        jax.tree.map(np.testing.assert_array_equal, params, draw_params(CONFIG, dtype))


def put(name, array, kind=None):
    """Return a change that adds or replaces a tensor."""
    return lambda tensors: tensors.update({name: (array, kind)})


@pytest.mark.parametrize("factor", [1.0, 8.0, 32.0])
def test_llama3_scaling_is_recovered_from_the_divisors(factor, write):
    divisors = numpy_llama.llama3_divisors(rope.frequencies(CONFIG), factor, 1.0, 4.0, 8192).astype(np.float32)
    scaling = None if factor == 1 else Llama3Rope(factor, 1.0, 4.0, 8192)
    config, _ = read(write(change=put("rope_freqs.weight", divisors)))
    assert config == dataclasses.replace(CONFIG, rope_scaling=scaling)


LINEAR = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
DEFAULTS = {"llama.attention.head_count_kv": None, "llama.rope.freq_base": None}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (LINEAR, {"rope_scaling": LinearRope(4.0)}),
        (DEFAULTS, {"num_key_value_heads": 4, "rope_theta": 1e4}),
        ({"tokenizer.ggml.eot_token_id": 5}, {"eos_token_id": (2, 5)}),
        ({"tokenizer.ggml.eot_token_id": 2, "tokenizer.ggml.eom_token_id": 7}, {"eos_token_id": (2, 7)}),
        ({"tokenizer.ggml.eos_token_id": None}, {"eos_token_id": None}),
    ],
)
def test_further_metadata_is_in_the_config(fields, expected, write):
    assert config_from_gguf(open_gguf(write(fields=fields)), "file") == dataclasses.replace(CONFIG, **expected)


WRONG = (7, 2.5, "x" * 400, [1, 2], ["a"], True, float("nan"))
FIELDS = {key: value for key, value in gguf_files.model_fields(CONFIG).items() if value is not None}
FIELDS |= {"general.architecture": "llama", "llama.rope.scaling.type": "linear"}
TYPES = {key: type(value) for key, value in FIELDS.items() if key != "llama.vocab_size"} | {
    "llama.attention.key_length": int,
    "llama.attention.value_length": int,
    "llama.rope.scaling.factor": float,
    "llama.rope.scaling.original_context_length": int,
    "llama.expert_count": int,
    "llama.expert_used_count": int,
    "tokenizer.ggml.eot_token_id": int,
    "split.count": int,
}


class Metadata(gguf.GGUFReader):
    """Metadata of a valid file with one value replaced, as the reader returns it, and one tensor."""

    def __init__(self, fields):
        self.fields = {key: Value(value) for key, value in fields.items()}
        self.tensors = [Value(None)]


class Value:
    name, shape = "token_embd.weight", (256, 40)

    def __init__(self, value):
        self.value = value

    def contents(self):
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


def test_a_field_of_the_wrong_type_is_refused_by_name():
    assert config_from_gguf(Metadata(FIELDS), "file") == dataclasses.replace(CONFIG, tie_word_embeddings=True)
    errors = (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), IndexError("list index"))
    for key, kind in TYPES.items():
        for value in (*WRONG, *errors, *([10**30] if kind is int else [])):
            if type(value) is kind and value in (7, 2.5):
                continue
            if key.endswith("original_context_length") and value == 10**30:
                continue  # has no effect without divisors
            with pytest.raises(InputError) as caught:
                config_from_gguf(Metadata(FIELDS | {key: value}), "file")
            message = str(caught.value)
            assert message.startswith("file: "), (key, value)
            assert len(message) < 300, (key, value)
            assert "\n" not in message, (key, value)


def header(*values: bytes, tensors: int = 0, entries: int = 1) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, entries) + b"".join(values)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


ARRAY, UINT8, STRING = 9, 0, 8
CLAIMS = {
    "2^60 numbers": header(text("k"), struct.pack("<IIQ", ARRAY, UINT8, 1 << 60)),
    "2^60 strings": header(text("k"), struct.pack("<IIQ", ARRAY, STRING, 1 << 60)),
    "2^60 empty lists": header(text("k"), struct.pack("<IIQ", ARRAY, ARRAY, 1 << 60)),
    "a string of 2^62 bytes": header(text("k"), struct.pack("<IQ", STRING, 1 << 62)),
    "a string of 2^64 bytes": header(text("k"), struct.pack("<IQ", STRING, (1 << 64) - 1)),
    "2^60 entries": header(entries=1 << 60),
    "2^60 tensors": header(entries=0, tensors=1 << 60),
    "a tensor of 2^32 dimensions": header(text("t"), struct.pack("<I", (1 << 32) - 1), entries=0, tensors=1),
    "lists in lists": header(text("k"), struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 1) * 3000),
    "a tensor of 2^66 elements": header(
        text("t"), struct.pack("<IQQIQ", 2, 1 << 33, 1 << 33, 0, 0), bytes(64), entries=0, tensors=1
    ),
    "a tensor at 2^62": header(text("t"), struct.pack("<IQIQ", 1, 1, 0, 1 << 62), bytes(64), entries=0, tensors=1),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_header_that_claims_more_than_the_file_has(claim, tmp_path, time_limit):
    path = tmp_path / "model.gguf"
    path.write_bytes(CLAIMS[claim])
    tracemalloc.start()
    try:
        with time_limit(10), pytest.raises(InputError, match=r"model\.gguf: truncated, or not a GGUF file") as caught:
            open_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)


def test_a_header_is_parsed_once_per_version_of_a_file(write):
    path = write()
    reader = open_gguf(path)
    assert open_gguf(path) is reader
    assert write() == path
    assert open_gguf(path) is not reader


def damaged(kind):
    """Return row 3 of a matrix, with NaN as its first number or as the scale of its first block."""
    array = np.ones((512, 256), np.float32)
    if kind == Type.Q8_0:
        array = gguf.quantize(array, kind)
        array[3, :2] = np.array([np.nan], np.float16).view(np.uint8)
        return array, kind
    array[3, 0] = np.nan
    return array.astype(np.float16 if kind == Type.F16 else np.float32), None


def extra_layer(index):
    """Return a change that adds a tensor to a layer with this index; `00` would replace the weights of layer 0."""
    return lambda tensors: tensors.update({f"blk.{index}.ffn_up.weight": tensors["blk.0.ffn_up.weight"]})


ODD_DIVISORS = put("rope_freqs.weight", np.linspace(1, 8, 32, dtype=np.float32))
FAULTS = [
    ({"llama.block_count": None}, None, r"lacks llama\.block_count"),
    ({"llama.block_count": 3}, None, r"lacks model\.layers\.2"),
    ({"llama.attention.head_count": 0}, None, "head_count .* 0$"),
    ({"llama.attention.head_count_kv": 3}, None, "num_key_value_heads .* 3$"),
    ({"llama.rope.dimension_count": 32}, None, "dimension_count .* 32$"),
    ({"llama.expert_count": 8}, None, "expert_count .* 8;"),
    ({"llama.rope.scaling.type": "yarn"}, None, "'yarn'"),
    ({"llama.attention.sliding_window": 4096}, None, "sliding_window .* 4096$"),
    ({"llama.attention.layer_norm_rms_epsilon": None}, None, "lacks .*rms_epsilon"),
    ({"split.count": 3}, None, r"split\.count .* 3.*--merge"),
    ({"general.architecture": "gemma2"}, None, r"'gemma2'.*rora_theory\.measure"),
    ({}, lambda tensors: tensors.pop("token_embd.weight"), r"lacks token_embd\.weight"),
    ({}, put("blk.0.attn_q.bias", np.ones(256, np.float32)), "lacks .*bias"),
    *(({}, extra_layer(index), "holds '?blk") for index in ("00", "²", "٣", "9" * 5000)),
    ({}, put("blk.0.ffn_up.weight", np.zeros((512, 256), np.int8), Type.I8), r"blk\.0\.ffn_up\.weight .* I8$"),
    *(
        ({}, put("blk.1.ffn_up.weight", *damaged(kind)), r"ffn_up\.weight .* got nan at \[3, 0\]")
        for kind in (Type.F32, Type.F16, Type.Q8_0)
    ),
    ({}, ODD_DIVISORS, "no llama3 scaling"),
    ({}, put("rope_freqs.weight", np.ones(31, np.float32)), "31"),
    (LINEAR, ODD_DIVISORS, r"rope_freqs\.weight .*linear"),
]
GEMMA_FAULTS = [
    ({PERIOD: 0}, None, r"sliding_window_pattern.* 0"),
    ({"gemma3.attention.sliding_window": None}, None, r"lacks gemma3\.attention\.sliding_window"),
]


@pytest.mark.parametrize(
    ("config", "fields", "change", "message"),
    [(CONFIG, *fault) for fault in FAULTS] + [(GEMMA, *fault) for fault in GEMMA_FAULTS],
)
def test_unsupported_is_refused_by_name(config, fields, change, message, write):
    path = write(config, fields, change=change)
    with pytest.raises(InputError, match=rf"model\.gguf: .*{message}") as caught:
        read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0, 3, 20, 400, -64])
def test_a_truncated_file_is_refused(keep, write):
    path = write()
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"model\.gguf: truncated"):
        read(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        open_gguf(tmp_path / "absent.gguf")


@pytest.mark.slow
def test_smollm2_by_its_name():
    """The model of the installed package continues a well-known sentence."""
    gguf_files.packaged("smollm2-135m")
    model = load("smollm2-135m")
    assert model.config.num_hidden_layers == 30
    assert model.config.tie_word_embeddings
    tokens = jnp.array([model.tokenizer.encode("The capital of France is")])
    logits = jax.jit(forward, static_argnames="config")(model.params, tokens, model.config)
    assert model.tokenizer.decode([int(jnp.argmax(logits[0, -1]))]) == " Paris"
