"""Checkpoints in Hugging Face's layout are read and written completely, refused by name, and never unpickled."""

import dataclasses
import json
import os
import pickle
import resource
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rora_theory.errors import InputError
from rora_theory.lab.llama import LlamaConfig
from rora_theory.lab.llama.weights import INDEX, SINGLE, check_finite, load_hf, read_config, save_hf


def equal(a, b) -> bool:
    same = jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b)
    return all(jax.tree.leaves(same))


@pytest.fixture
def biased(tiny):
    return dataclasses.replace(tiny, attention_bias=True, mlp_bias=True)


@pytest.fixture
def write(tmp_path, draw_tensors):
    """Return ``write(config, shards=1, change=..., dtype=float32)``: a checkpoint folder in Hugging Face's layout."""

    def make(config: LlamaConfig, shards: int = 1, change=lambda tensors: None, dtype=np.float32) -> Path:
        folder = tmp_path / "model"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config.to_hf()))
        tensors = {name: a.astype(dtype) for name, a in draw_tensors(config).items()}
        change(tensors)
        if shards == 1:
            save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
            return folder
        # Shards cut across layers: a stacked leaf is gathered from several files.
        names = sorted(tensors)
        where = {}
        for i in range(shards):
            file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            save_file({name: tensors[name] for name in names[i::shards]}, folder / file)
            where |= dict.fromkeys(names[i::shards], file)
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
        return folder

    return make


@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_gives_its_weights(shards, write, biased, draw_params):
    folder = write(biased, shards)
    config = read_config(folder)
    assert config == biased
    assert equal(load_hf(folder, config), draw_params(biased))


@pytest.mark.parametrize("file_dtype", [np.float32, np.float16, jnp.bfloat16, np.float64])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_any_float_type_becomes_the_requested_one(file_dtype, dtype, write, tiny, draw_tensors):
    params = load_hf(write(tiny, dtype=file_dtype), tiny, dtype)
    expected = draw_tensors(tiny)["model.layers.1.mlp.up_proj.weight"].astype(file_dtype).astype(dtype)
    weight = params["layers"]["mlp.up_proj"]["weight"]
    assert weight.dtype == dtype
    np.testing.assert_array_equal(np.asarray(weight[1]), expected)


def test_tensors_that_the_configuration_replaces_are_not_read(write, tiny, draw_tensors, draw_params):
    """A tied model may store a head, and early checkpoints hold the rotary frequencies."""
    tied = dataclasses.replace(tiny, tie_word_embeddings=True)
    weights, folder = draw_tensors(tied), write(tied)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    save_file(weights, folder / SINGLE)
    assert equal(load_hf(folder, tied), draw_params(tied))


@pytest.mark.parametrize(
    ("file_dtype", "dtype", "value"),
    [
        (np.float32, jnp.float32, np.nan),
        (np.float32, jnp.bfloat16, np.inf),
        (jnp.bfloat16, jnp.float32, -np.inf),
        (jnp.bfloat16, jnp.bfloat16, np.nan),
        (np.float16, jnp.float16, np.inf),
        (np.float64, jnp.float32, 1e300),
        (np.float32, jnp.float16, 1e6),
    ],
)
def test_non_finite_weights_are_refused(file_dtype, dtype, value, write, tiny):
    name = "model.layers.1.mlp.up_proj.weight"
    folder = write(tiny, change=lambda tensors: tensors[name].__setitem__((3, 5), value), dtype=file_dtype)
    message = rf"{name} .*{jnp.dtype(dtype).name}, got -?(nan|inf) at \[3, 5\]"
    with pytest.raises(InputError, match=rf"^{folder / SINGLE}: {message}") as caught:
        load_hf(folder, tiny, dtype)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_every_finite_number_is_accepted(dtype):
    ends = jnp.finfo(dtype)
    values = np.array([0, ends.tiny, ends.max, ends.min, ends.smallest_subnormal], dtype).repeat(10**5)
    check_finite("tensor", values)
    values[-1] = np.nan  # in the last block
    with pytest.raises(InputError, match=r"tensor .* nan at \[499999\]"):
        check_finite("tensor", values)


def put(name, array):
    """Return a change that adds or replaces a tensor."""
    return lambda tensors: tensors.update({name: array})


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"),
            r"lacks model\.layers\.1\.mlp\.up_proj\.weight",
        ),
        (put("model.layers.2.mlp.up_proj.weight", np.zeros((40, 32), np.float32)), r"holds model\.layers\.2"),
        (put("model.embed_tokens.weight", np.zeros((47, 32), np.float32)), r"embed_tokens.* \(48, 32\).* \(47, 32\)"),
        (put("model.norm.weight", np.zeros(32, np.int8)), r"model\.norm\.weight .* I8$"),
    ],
)
def test_tensors_that_contradict_the_config_are_named(shards, change, message, write, tiny):
    with pytest.raises(InputError, match=message) as caught:
        load_hf(write(tiny, shards, change), tiny)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0, 4, 200, -8])
@pytest.mark.parametrize("shards", [1, 2])
def test_a_truncated_file_is_named(keep, shards, write, tiny):
    folder = write(tiny, shards)
    file = sorted(folder.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(InputError, match=f"{file.name}: truncated"):
        load_hf(folder, tiny)


class Trap:
    """An object whose unpickling creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_a_pickle_is_refused_without_reading_it(name, tiny, tmp_path):
    trap = tmp_path / "executed"
    (tmp_path / name).write_bytes(pickle.dumps(Trap(str(trap))))
    with pytest.raises(InputError, match=rf"{name}.*safetensors or GGUF"):
        load_hf(tmp_path, tiny)
    assert not trap.exists()


def test_a_folder_without_weights_or_configuration(tmp_path, tiny):
    with pytest.raises(InputError, match="no such folder"):
        load_hf(tmp_path / "absent", tiny)
    with pytest.raises(InputError, match="no weights"):
        load_hf(tmp_path, tiny)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(InputError, match=r"GGUF.*model\.gguf"):
        load_hf(tmp_path, tiny)
    with pytest.raises(InputError, match=r"config\.json: no such file"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(InputError, match=r"config\.json.*model_type"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("not json", "is not JSON"),
        ("[]", "holds a list"),
        ('{"weight_map": {}}', "weight_map"),
        ('{"weight_map": ["a"]}', "weight_map"),
        ({"model.norm.weight": "../secret.safetensors"}, r"names '\.\./secret"),
        ({"model.norm.weight": "/etc/secret.safetensors"}, "names '/etc"),
        ({"model.norm.weight": "sub/a.safetensors"}, "names 'sub/a"),
        ({"model.norm.weight": "weights.bin"}, r"names 'weights\.bin'"),
        ({"model.norm.weight": 3}, "names 3"),
        ({"model.norm.weight": "absent.safetensors"}, r"absent\.safetensors: no such file"),
    ],
)
def test_a_bad_index_is_refused(index, message, write, tiny, tmp_path):
    """The index has another form, or extra entries."""
    folder = write(tiny, 2)
    # The path outside the folder exists and would load.
    save_file({"model.norm.weight": np.ones(32, np.float32)}, tmp_path / "secret.safetensors")
    if isinstance(index, dict):
        index = json.dumps({"weight_map": json.loads((folder / INDEX).read_text())["weight_map"] | index})
    (folder / INDEX).write_text(index)
    with pytest.raises(InputError, match=message) as caught:
        load_hf(folder, tiny)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_written_folder_reads_back_bit_for_bit(shard_bytes, dtype, biased, draw_params, tmp_path):
    params = draw_params(biased, dtype)
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    (source / "secret.txt").write_text("no tokenizer")
    folder = tmp_path / "out" / "merged"
    save_hf(folder, params, biased, tokenizer_from=source, shard_bytes=shard_bytes)
    assert read_config(folder) == biased
    assert equal(load_hf(folder, biased, dtype), params)
    files = {path.name for path in folder.iterdir()}
    weights = {name for name in files if name.endswith(".safetensors")}
    if shard_bytes == 10**9:
        assert files == {"config.json", SINGLE, "tokenizer.json"}
    else:
        assert files == {"config.json", INDEX, "tokenizer.json", *weights}
        assert len(weights) > 2
        total = sum(a.nbytes for name in weights for a in load_file(folder / name).values())
        index = json.loads((folder / INDEX).read_text())
        assert index["metadata"]["total_size"] == total == sum(a.nbytes for a in jax.tree.leaves(params))
        assert max(sum(a.nbytes for a in load_file(folder / name).values()) for name in weights) <= shard_bytes
    assert json.loads((folder / "config.json").read_text())["dtype"] == jnp.dtype(dtype).name
    assert not [path for path in folder.parent.iterdir() if path != folder]


def test_overwriting_a_folder_is_refused(tiny, draw_params, tmp_path):
    params = draw_params(tiny)
    (tmp_path / "kept").touch()
    with pytest.raises(InputError, match="new or empty"):
        save_hf(tmp_path, params, tiny)
    for change in ({"hidden_size": 36}, {"attention_bias": True}):
        with pytest.raises(InputError, match="not those of a model"):
            save_hf(tmp_path / "new", params, dataclasses.replace(tiny, **change))
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    empty = tmp_path / "empty"
    empty.mkdir()
    save_hf(empty, params, tiny)
    assert (empty / SINGLE).is_file()


def test_no_symbolic_link_is_followed(tiny, draw_params, tmp_path, monkeypatch):
    victim, folder = tmp_path / "victim", tmp_path / "out" / "model"
    victim.mkdir()
    folder.parent.mkdir()
    monkeypatch.setattr("secrets.token_hex", lambda size: "0" * 2 * size)
    (folder.parent / f".{'0' * 16}.part").symlink_to(victim, target_is_directory=True)
    with pytest.raises(InputError, match=r"model: .*File exists"):
        save_hf(folder, draw_params(tiny), tiny)
    monkeypatch.undo()
    save_hf(folder, draw_params(tiny), tiny)
    assert read_config(folder) == tiny
    assert not list(victim.iterdir())


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_permissions_are_the_umask_s(mask, mode, tiny, draw_params, tmp_path):
    before = os.umask(mask)
    try:
        save_hf(tmp_path / "model", draw_params(tiny), tiny, shard_bytes=20_000)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()} == {mode}


def test_a_failed_write_leaves_no_files(tiny, draw_params, tmp_path):
    """The kernel ends every file at 20 kB, as a full disk would: further writes fail."""
    params = jax.tree.map(np.asarray, draw_params(tiny))  # so that saving compiles nothing
    soft_limit, hard_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard_limit))
    try:
        with pytest.raises(InputError, match=f"^{tmp_path / 'model'}: cannot be written") as caught:
            save_hf(tmp_path / "model", params, tiny)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft_limit, hard_limit))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


MEMORY = """
import re, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from rora_theory.lab.llama.weights import load_hf, read_config
import safetensors
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
jax.block_until_ready(jax.device_put(np.zeros(1000)))
folder = Path(sys.argv[1])
config = read_config(folder)
before = peak()
params = load_hf(folder, config, jnp.dtype(sys.argv[2]))
size = sum(a.nbytes for a in jax.tree.leaves(params))
print((peak() - before) / size, size)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from Linux's /proc")
@pytest.mark.parametrize(("dtype", "shards"), [("float32", 1), ("bfloat16", 2)])
def test_loading_needs_less_than_twice_the_model(dtype, shards, write):
    """The peak resident memory of a fresh process, above that before loading, is divided by the size of the weights."""
    config = LlamaConfig(8192, 512, 1536, 8, 8, 4, 64)  # 36 million weights, most of them in the layers
    folder = write(config, shards, dtype=np.dtype(jnp.dtype(dtype)))
    out = subprocess.run(
        [sys.executable, "-c", MEMORY, str(folder), dtype],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        check=True,
    )
    ratio, size = (float(word) for word in out.stdout.split())
    assert size > 5e7
    assert 0.9 < ratio < 2, ratio


def test_weights_are_placed_by_their_shardings(write, tiny, draw_params):
    mesh = jax.make_mesh((4,), ("x",), devices=jax.devices()[:4])
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    expected = draw_params(tiny)
    shardings = jax.tree.map(lambda a: split if a.ndim > 2 else place, expected)
    params = load_hf(write(tiny), tiny, jnp.float32, shardings)
    assert equal(params, expected)
    assert params["layers"]["mlp.up_proj"]["weight"].sharding == split
    assert params["norm"].sharding == place
