"""The model card in an adapter's folder: the hub's entries, base model, scaling, and how to load the adapter."""

import json
import re
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
from rora_theory.lab.adapters.card import FOLDER_PLACEHOLDER, TrainingDescription
from rora_theory.lab.llama.hub import ModelSource

BUILT = "HuggingFaceTB/SmolLM2-135M-Instruct"


RORA = LoraConfig(rank=4, alpha=8.0, rule="rora", target_modules=("q_proj",))


def written(folder: Path, base: Any, config: Any = RORA, **more: Any) -> ModelCard:
    """Return the card of a fresh adapter of the tiny model."""
    save_peft(folder, config.build(jax.random.key(0), tiny.CONFIG, tiny.params()), base_model=base, **more)
    return ModelCard.load(folder / "README.md")


def rows(card: ModelCard) -> dict[str, str]:
    return dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", card.text, re.MULTILINE))


def test_metadata_of_the_hub(model_folder, tmp_path) -> None:
    origin = ModelSource(BUILT, model_folder, BUILT, "c0ffee00")
    card = written(tmp_path / "a", origin, trained=TrainingDescription([("horizon", "9 steps")], ["me/chats"]))
    link = f"https://huggingface.co/{BUILT}"
    assert card.data.to_dict() == {
        "base_model": BUILT, "library_name": "peft", "pipeline_tag": "text-generation", "datasets": ["me/chats"],
        "license": "other", "license_name": "that-of-the-base-model", "license_link": link,
        "tags": [f"base_model:adapter:{BUILT}", "lora", "rslora", "rora-theory"],
    }  # fmt: skip
    assert rows(card)["horizon"] == "9 steps"
    assert (
        written(tmp_path / "b", origin, trained=TrainingDescription(license="mit")).data.to_dict()["license"] == "mit"
    )


def test_the_card_states_the_base_model_and_the_scaling(model_folder, tmp_path) -> None:
    card = written(tmp_path / "a", ModelSource(BUILT, model_folder, BUILT, "c0ffee00"))
    assert rows(card) == {
        "base model": f"`{BUILT}`", "base model commit": "`c0ffee00`",
        "base model weights": "safetensors, not quantised (F32)",
        "base model SHA-256": f"`{llama.model_digest(model_folder)}`", "rank r": "4", "alpha": "8",
        "scaling gamma": "alpha / sqrt(r) = 4 (`use_rslora` is true)", "modules": "`q_proj`",
    }  # fmt: skip
    assert 'from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct", revision="c0ffee00")' in card.text
    patterned = replace(RORA, rule="lora", target_modules=("q_proj", "v_proj"), rank_pattern={"v_proj": 2})
    card = written(tmp_path / "b", "somewhere/else", patterned)
    assert rows(card)["scaling gamma"] == "alpha / r = 2 (`use_rslora` is false)"
    assert rows(card)["rank r"] == "4; some modules differ, see `rank_pattern` and `alpha_pattern`"
    assert card.data.base_model == "somewhere/else"
    assert "rslora" not in card.data.tags


def test_a_quantised_base_is_marked_as_quantised(tmp_path, monkeypatch) -> None:
    """The licence is that of the file, which the hub's folders do not state."""
    path = tmp_path / "m.gguf"
    path.write_bytes(b"weights")
    monkeypatch.setattr(ModelSource, "storage", llama.identity.Storage("GGUF", {"Q4_1": 3, "F32": 1}))
    monkeypatch.setattr(ModelSource, "license", "apache-2.0")
    card = written(tmp_path / "a", ModelSource("smollm2-135m", path, BUILT))
    assert rows(card)["base model weights"] == f"GGUF, quantised (Q4_1 75%, F32 25%) made from `{BUILT}`"
    assert card.data.license == "apache-2.0"
    assert "trained on quantised weights" in card.text


@pytest.mark.parametrize(("name", "title"), [(None, "an unnamed model"), ("a\n# b|`c", "a # b|`c")])
def test_a_base_outside_the_hub_is_omitted(name, title, tmp_path) -> None:
    """The card has no entry for such a base, and a name cannot add lines to the header."""
    card = written(tmp_path / "a", name)
    assert card.data.base_model is None
    assert (card.data.license, card.data.library_name) == ("unknown", "peft")
    assert f"# LoRA adapter of rank 4 for {title}\n" in card.text
    assert "\n# b" not in card.text


def test_methods_that_peft_does_not_support(tmp_path) -> None:
    card = written(tmp_path / "a", None, PrefixConfig(3))
    assert (rows(card)["virtual tokens"], card.data.library_name) == ("3", "peft")
    card = written(tmp_path / "b", None, BottleneckConfig("series", width=3, target_modules=("up_proj",)))
    assert (rows(card)["bottleneck"], card.data.library_name) == ("3", None)
    assert "rora_theory.lab.adapters.load_peft" in card.text
    card = written(tmp_path / "c", None, replace(RORA, rank=2, use_dora=True))
    assert "dora" in card.data.tags
    assert "# DoRA adapter of rank 2" in card.text


def test_the_portable_form_has_its_own_card(tmp_path) -> None:
    """The scaling 8 / sqrt(4) is written as alpha / r with alpha 16."""
    written(tmp_path / "a", BUILT)
    rewrite_portable(tmp_path / "a", tmp_path / "b")
    card = ModelCard.load(tmp_path / "b" / "README.md")
    assert rows(card)["scaling gamma"] == "alpha / r = 4 (`use_rslora` is false)"
    assert card.data.base_model == BUILT


def test_the_card_of_a_merged_model_names_adapter_and_base(model_folder, tmp_path) -> None:
    """The card names the adapter and its base; fully trained weights have no rank to name."""
    model = llama.load(model_folder)
    model = replace(model, origin=ModelSource(BUILT, model_folder, BUILT, "c0ffee00"))
    known = TrainingDescription([("training loss", "2.5 nats a token")], ["me/chats"], "mit")
    cards = {}
    for name, config in (("lora", RORA), ("full", FullConfig(("q_proj",)))):
        adapter = config.build(jax.random.key(0), model.config, model.params)
        save_merged(tmp_path / name, adapter, model, trained=known)
        cards[name] = ModelCard.load(tmp_path / name / "README.md")
        assert llama.load(tmp_path / name).config == model.config
    assert cards["lora"].data.to_dict() == {
        "base_model": BUILT, "library_name": "transformers", "pipeline_tag": "text-generation", "license": "mit",
        "datasets": ["me/chats"], "tags": [f"base_model:finetune:{BUILT}", "lora", "rslora", "rora-theory"],
    }  # fmt: skip
    assert f"# {BUILT} with a LoRA adapter of rank 4 merged in\n" in cards["lora"].text
    alone = written(tmp_path / "a", model.origin, trained=known)
    assert rows(cards["lora"]) == rows(alone), "base, rank, alpha, gamma, modules and losses"
    assert f"# {BUILT}, fully fine-tuned\n" in cards["full"].text
    unranked = {name: text for name, text in rows(alone).items() if name not in ("rank r", "alpha", "scaling gamma")}
    assert rows(cards["full"]) == unranked
    assert "PeftModel" not in cards["lora"].text + cards["full"].text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_code_on_the_card_loads_the_adapter(model_folder, tmp_path) -> None:
    pytest.importorskip("peft", reason="the extra torch")
    model = llama.load(model_folder)
    save_peft(tmp_path / "a", RORA.build(jax.random.key(0), model.config, model.params), base_model=model.origin)
    card = ModelCard.load(tmp_path / "a" / "README.md")
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert code.count("\n") == 4
    names: dict[str, Any] = {}
    exec(code.replace(json.dumps(FOLDER_PLACEHOLDER), json.dumps(str(tmp_path / "a"))), names)
    assert names["model"].peft_config["default"].r == 4
