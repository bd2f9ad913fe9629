"""The model card in the folder of an adapter or a merged model has the entries by which the hub lists it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest
from huggingface_hub import ModelCard
from support import tiny

from rora_theory.lab import llama
from rora_theory.lab.adapters import (
    BottleneckConfig,
    FullConfig,
    LoraConfig,
    PrefixConfig,
    rewrite_portable,
    save_merged,
    save_peft,
)
from rora_theory.lab.llama.hub import ModelSource

BUILT = "HuggingFaceTB/SmolLM2-135M-Instruct"
RORA = LoraConfig(rank=4, alpha=8.0, rule="rora", target_modules=("q_proj",))


def write_card(folder: Path, base: Any, config: Any = RORA) -> dict[str, Any]:
    """Return the entries of the card of a fresh adapter of the tiny model."""
    save_peft(folder, config.build(jax.random.key(0), tiny.CONFIG, tiny.params()), base_model=base)
    return ModelCard.load(folder / "README.md").data.to_dict()


def test_the_entries_of_an_adapter(model_folder, tmp_path) -> None:
    assert write_card(tmp_path / "a", ModelSource(BUILT, model_folder, BUILT, "c0ffee00")) == {
        "base_model": BUILT, "library_name": "peft", "pipeline_tag": "text-generation",
        "tags": [f"base_model:adapter:{BUILT}", "lora", "rslora", "rora-theory"],
    }  # fmt: skip
    rewrite_portable(tmp_path / "a", tmp_path / "b")
    portable = ModelCard.load(tmp_path / "b" / "README.md").data
    assert (portable.base_model, portable.tags) == (BUILT, [f"base_model:adapter:{BUILT}", "lora", "rora-theory"])


@pytest.mark.parametrize(
    ("config", "tag", "library"),
    [
        (PrefixConfig(3), "prefix-tuning", "peft"),
        (BottleneckConfig("series", width=3, target_modules=("up_proj",)), "series_adapter", None),
        (replace(RORA, use_dora=True), "dora", "peft"),
    ],
)
def test_the_tag_of_a_method(config, tag, library, tmp_path) -> None:
    """A base outside the hub has no entry, and its name cannot add lines to the header."""
    card = write_card(tmp_path, "a\n# b", config)
    assert tag in card["tags"]
    assert (card.get("base_model"), card.get("library_name")) == (None, library)


def test_the_entries_of_a_merged_model(model_folder, tmp_path) -> None:
    model = llama.load(model_folder)
    model = replace(model, origin=ModelSource(BUILT, model_folder, BUILT, "c0ffee00"))
    for name, config in (("lora", RORA), ("full", FullConfig(("q_proj",)))):
        save_merged(tmp_path / name, config.build(jax.random.key(0), model.config, model.params), model)
        card = ModelCard.load(tmp_path / name / "README.md").data
        assert card.tags[:2] == [f"base_model:finetune:{BUILT}", name]
        assert card.library_name == "transformers"
        assert llama.load(tmp_path / name).config == model.config
