"""A model is identified by its files: every byte of its weights, its configuration and its tokenizer."""

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from support import gguf_files

from rora_theory import InputError
from rora_theory.lab import llama
from rora_theory.lab.llama.hub import ModelSource
from rora_theory.lab.llama.weights import save_hf
from rora_theory.runs import digests


def digest_or_none(source):
    """Return the digest, or None if an index is too damaged to be read."""
    try:
        return llama.model_digest(source)
    except InputError:
        return None


@pytest.mark.parametrize("shard_bytes", [10**9, 4000])
def test_the_digest_covers_every_byte_that_is_read_and_no_other(shard_bytes, model_folder, tmp_path):
    model, source = llama.load(model_folder), tmp_path / "model"
    save_hf(source, model.params, model.config, tokenizer_from=model_folder, shard_bytes=shard_bytes)
    assert (len(list(source.glob("*.safetensors"))) > 3) == (shard_bytes == 4000)
    digest, files = llama.model_digest(source), sorted(source.iterdir())
    assert digest == digests.of_files(files)
    for file in files:
        content = file.read_bytes()
        for at in (0, len(content) // 2, len(content) - 1):
            file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            assert digest_or_none(source) != digest, (file, at)
        file.write_bytes(content)
    for name in ("README.md", "training_args.json", "pytorch_model.bin", "consolidated.safetensors"):
        (source / name).write_bytes(b"text")
    assert llama.model_digest(source) == digest


def test_a_model_states_the_storage_of_its_weights(model_folder, tmp_path):
    """A built-in name may be the hub's weights or 4-bit blocks made from them; a sentence states which."""
    original = ModelSource("org/hf", model_folder, "org/hf", "c0ffee00")
    kind = gguf.GGMLQuantizationType.Q4_1
    blocks = gguf.quantize(np.ones((3, 64), np.float32), kind)
    tensors = {"token_embd.weight": (blocks, kind), "output_norm.weight": (np.ones(64, np.float32), None)}
    converted = ModelSource("org", gguf_files.write(tmp_path / "m.gguf", {"general.license": "mit"}, tensors), "org/hf")
    digests_of = {original: llama.model_digest(model_folder), converted: llama.model_digest(converted.path)}
    assert original.summary == (
        f"model org/hf: safetensors, not quantised (F32 100%), org/hf at c0ffee0; sha256 {digests_of[original][:12]}"
    )
    assert converted.summary == (
        f"model org: GGUF, quantised (Q4_1 75%, F32 25%), made from org/hf; sha256 {digests_of[converted][:12]}"
    )
    assert converted.manifest_entries() == {
        "model": "org", "repository": "org/hf", "commit": None, "sha256": digests_of[converted], "license": "mit",
        "storage": "GGUF, quantised (Q4_1 75%, F32 25%)",
    }  # fmt: skip
    assert ModelSource(str(model_folder), model_folder).summary.startswith(
        "model hf: safetensors, not quantised (F32 100%); sha256 "
    )


def test_the_digest_of_a_gguf_file_is_that_of_its_bytes(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"weights")
    assert llama.model_digest(path) == digests.of_file(path)


def test_a_model_is_identified_by_name_commit_and_content(model_folder, monkeypatch):
    content = llama.model_digest(model_folder)
    assert llama.locate(model_folder).identity() == {"model": "hf", "commit": None, "model_sha256": content}
    monkeypatch.chdir(model_folder)
    assert llama.locate(".").identity()["model"] == "hf"
    on_hub = ModelSource("org/hf", model_folder, "org/hf", "c0ffee")
    assert on_hub.identity() == {"model": "org/hf", "commit": "c0ffee", "model_sha256": content}
    assert llama.load(on_hub, jnp.float32).origin == on_hub
