"""An adapter records the model it was trained on: its name, its commit, and the digest of its weights."""

import json

import jax
import pytest
from safetensors import safe_open

from rora_theory.lab import adapters
from rora_theory.lab.llama import ModelSource, load
from rora_theory.runs import digests

SHA = "e8d4a51000" * 6 + "abcd"


@pytest.fixture(scope="module")
def model(model_folder):
    return load(model_folder)


def written(folder) -> tuple[dict, dict]:
    """Return the entries of the configuration and the metadata of the weights."""
    with safe_open(folder / adapters.peft.WEIGHTS, "numpy") as file:
        return json.loads((folder / adapters.peft.CONFIG).read_text()), file.metadata()


@pytest.mark.parametrize(
    "settings",
    [
        adapters.LoraConfig(rank=2, alpha=4.0, target_modules=("q_proj",)),
        adapters.PrefixConfig(2),
        adapters.BottleneckConfig("series", width=2),
    ],
)
def test_a_model_of_the_hub_is_named_by_its_id_and_commit(model, settings, tmp_path):
    adapter = settings.build(jax.random.key(0), model.config, model.params)
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"four bits")
    for origin, name, commit, used in (
        (ModelSource("org/tiny", model.source, "org/tiny", SHA[:40]), "org/tiny", SHA[:40], model.origin.sha256),
        # A built-in name says nothing to others; the commit that its GGUF file was made from is not known.
        (ModelSource("smollm2-135m", gguf, "Org/SmolLM2", None), "Org/SmolLM2", None, digests.of_file(gguf)),
        (model.origin, str(model.source), None, model.origin.sha256),
    ):
        adapters.save_peft(tmp_path / "adapter", adapter, base_model=origin)
        entries, metadata = written(tmp_path / "adapter")
        assert (entries["base_model_name_or_path"], entries["revision"]) == (name, commit)
        assert metadata == {"format": "pt", "base_model_sha256": used}
        again = adapters.load_peft(tmp_path / "adapter", model.config)
        assert again.config == adapter.config


def test_an_adapter_of_another_base_model_is_reported(model, tmp_path, caplog) -> None:
    """Not one of the same model, and not one that another program saved without a digest."""
    adapter = adapters.PrefixConfig(2).build(jax.random.key(0), model.config, model.params)
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"four bits")
    other = ModelSource("smollm2-135m", gguf)
    for origin in (model.origin, None, other):
        adapters.save_peft(tmp_path / "adapter", adapter, base_model=origin)
        adapters.load_adapter(tmp_path / "adapter", model)
        assert bool(caplog.messages) is (origin is other)
    (message,) = caplog.messages
    for expected in (tmp_path / "adapter", other.sha256[:12], model.origin.label, model.origin.sha256[:12]):
        assert str(expected) in message


def test_peft_reads_the_name_and_the_commit(model, tmp_path):
    peft = pytest.importorskip("peft")
    settings = adapters.LoraConfig(rank=2, alpha=4.0, target_modules=("q_proj",))
    adapter = settings.build(jax.random.key(0), model.config, model.params)
    origin = ModelSource("org/tiny", model.source, "org/tiny", SHA[:40])
    adapters.save_peft(tmp_path / "adapter", adapter, base_model=origin)
    config = peft.PeftConfig.from_pretrained(str(tmp_path / "adapter"))
    assert (config.base_model_name_or_path, config.revision) == ("org/tiny", SHA[:40])
    from peft.utils.save_and_load import load_peft_weights

    assert len(load_peft_weights(str(tmp_path / "adapter"), device="cpu")) == 4
