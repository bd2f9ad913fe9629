"""A model is what its files hold: every byte of its weights, its configuration and its tokenizer."""

import shutil

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import checkpoint

from rora_theory import InputError, llama
from rora_theory.io import digests
from rora_theory.llama.hub import ModelSource
from rora_theory.llama.weights import save_hf


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint.model(tmp_path_factory.mktemp("model"))


def told(source):
    """None where an index is no index any more."""
    try:
        return llama.model_digest(source)
    except InputError:
        return None


def test_every_byte_of_every_file_that_is_read_counts(folder, tmp_path):
    model = llama.load(folder)
    save_hf(tmp_path / "sharded", model.params, model.config, tokenizer_from=folder, shard_bytes=4000)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    for source in (folder, tmp_path / "sharded"):
        found = llama.model_digest(source)
        files = sorted(source.iterdir())
        assert found == digests.of_files(files)
        for file in files:
            whole = file.read_bytes()
            for at in (0, len(whole) // 2, len(whole) - 1):
                file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
                assert told(source) != found, (file, at)
            file.write_bytes(whole)
        assert llama.model_digest(source) == found


def test_what_is_not_read_does_not_count(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    save_hf(tmp_path / "sharded", *unpacked(folder), tokenizer_from=folder, shard_bytes=4000)
    for own in (copy, tmp_path / "sharded"):
        before = llama.model_digest(own)
        for name in ("README.md", "training_args.json", "pytorch_model.bin", "consolidated.safetensors"):
            (own / name).write_bytes(b"text")
        assert llama.model_digest(own) == before


def unpacked(folder):
    model = llama.load(folder)
    return model.params, model.config


def quantised(path):
    """A GGUF file of two tensors, a matrix of 4-bit blocks and a vector of floats."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_license("mit")
    kind = gguf.GGMLQuantizationType.Q4_1
    writer.add_tensor("token_embd.weight", gguf.quantize(np.ones((3, 64), np.float32), kind), raw_dtype=kind)
    writer.add_tensor("output_norm.weight", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_model_says_how_its_weights_are_stored(folder, tmp_path):
    """A built-in name may be the hub's weights or 4-bit blocks made from them: which, in a sentence and in numbers."""
    whole = ModelSource("org/hf", folder, "org/hf", "c0ffee00")
    made = ModelSource("org", quantised(tmp_path / "m.gguf"), "org/hf")
    digests_of = {whole: llama.model_digest(folder), made: llama.model_digest(made.path)}
    assert whole.summary == (
        f"model org/hf: safetensors, not quantised (F32), org/hf at c0ffee0; sha256 {digests_of[whole][:12]}"
    )
    assert made.summary == (
        f"model org: GGUF, quantised (Q4_1 75%, F32 25%), made from org/hf; sha256 {digests_of[made][:12]}"
    )
    assert made.describe() == {
        "model": "org", "repository": "org/hf", "commit": None, "sha256": digests_of[made], "license": "mit",
        "container": "GGUF", "quantised": True, "types": {"Q4_1": 192, "F32": 64},
    }  # fmt: skip
    assert whole.describe()["types"] == {"F32": sum(leaf.size for leaf in jax.tree.leaves(unpacked(folder)[0]))}
    assert ModelSource(str(folder), folder).summary.startswith("model hf: safetensors, not quantised (F32); sha256 ")


def test_a_gguf_file_is_its_own_bytes(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"weights")
    assert llama.model_digest(path) == digests.of_file(path)


def test_a_model_is_known_by_its_name_its_commit_and_its_content(folder, monkeypatch):
    content = llama.model_digest(folder)
    assert llama.locate(folder).identity() == {"model": "hf", "commit": None, "model_sha256": content}
    monkeypatch.chdir(folder)
    assert llama.locate(".").identity()["model"] == "hf"
    on_hub = ModelSource("org/hf", folder, "org/hf", "c0ffee")
    assert on_hub.identity() == {"model": "org/hf", "commit": "c0ffee", "model_sha256": content}
    assert llama.load(on_hub, jnp.float32).origin == on_hub
