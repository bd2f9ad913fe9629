"""A model is what its files hold: every byte of its weights, its configuration and its tokenizer."""

import shutil

import jax.numpy as jnp
import pytest
from support import checkpoint

from rora_theory import digests, llama
from rora_theory.llama.hub import Located
from rora_theory.llama.weights import save_hf


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint.model(tmp_path_factory.mktemp("model"))


def test_every_byte_of_every_file_that_is_read_counts(folder, tmp_path):
    model = llama.load(folder)
    save_hf(tmp_path / "sharded", model.params, model.config, tokenizer_from=folder, shard_bytes=4000)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    for source in (folder, tmp_path / "sharded"):
        found = llama.digest(source)
        files = sorted(source.iterdir())
        assert found == digests.of_files(files)
        for file in files:
            whole = file.read_bytes()
            for at in (0, len(whole) // 2, len(whole) - 1):
                file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
                assert llama.digest(source) != found, (file, at)
            file.write_bytes(whole)
        assert llama.digest(source) == found


def test_what_is_not_read_does_not_count(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for name in ("README.md", "training_args.json", "pytorch_model.bin", "extra.safetensors"):
        (copy / name).write_bytes(b"text")
    assert llama.digest(copy) == llama.digest(folder)


def test_a_gguf_file_is_its_own_bytes(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"weights")
    assert llama.digest(path) == digests.of_file(path)


def test_a_model_is_known_by_its_name_its_commit_and_its_content(folder, monkeypatch):
    content = llama.digest(folder)
    assert llama.locate(folder).identity() == {"model": "hf", "commit": None, "model_sha256": content}
    monkeypatch.chdir(folder)
    assert llama.locate(".").identity()["model"] == "hf"
    on_hub = Located("org/hf", folder, "org/hf", "c0ffee")
    assert on_hub.identity() == {"model": "org/hf", "commit": "c0ffee", "model_sha256": content}
    assert llama.load(on_hub, jnp.float32).origin == on_hub
