"""The command: the prior's rate for the planned run, from the model's configuration alone, as text and as JSON."""

import json
import re
import shutil
from typing import Any

import numpy as np
import pytest
from support import checkpoint, commands, gguf_files

from rora_theory.advice.best_rate import Run
from rora_theory.evidence import starting_rates
from rora_theory.evidence.rate_prior import rate_prior
from rora_theory.lab import llama
from rora_theory.lab.llama.weights import expected_shapes
from sims import tune as sim

SETTINGS = "--rank 16 --alpha 8 --steps 256 --batch-size 4"
BILLIONS = llama.count_parameters(checkpoint.CONFIG) / 1e9


def answer(*words: object) -> dict[str, Any]:
    return json.loads(commands.output(commands.run_command(sim.main, *words, "--json")))


def test_the_help_names_all_families() -> None:
    """A name that is not one of them is refused."""
    text = " ".join(commands.run_command(sim.main, "--help").out.split())
    assert all(family in text for family in starting_rates.families())


@pytest.mark.parametrize(("rule", "gain"), [("lora", 8.0), ("rora", 32.0)])
def test_the_json_answer_is_the_prior_of_the_planned_run(rule, gain, model) -> None:
    result = answer("--model", model, SETTINGS, "--rule", rule)
    tuning, prior = result["tuning"], rate_prior(Run(16, gain, 256, "cosine", 4), parameters=BILLIONS)
    assert (tuning["low"], tuning["learning_rate"], tuning["high"]) == pytest.approx(prior.rates)
    assert tuning["three_rates"] == pytest.approx(prior.three_rates)
    assert tuning["expected_regret"] == pytest.approx(prior.expected_regret)
    assert tuning["expected_regret_of_three"] == pytest.approx(prior.expected_regret_of_three)
    assert (tuning["config"]["r"], tuning["config"]["lora_alpha"]) == (16, gain)
    assert tuning["config"]["use_rslora"] is False
    assert f"{prior.rates.best:.3g}" in result["answer"]
    assert any("extrapolated" in sentence for sentence in tuning["assumptions"])


def test_the_text_has_the_answer_peft_s_entries_and_the_assumptions(model) -> None:
    printed = commands.output(commands.run_command(sim.main, "--model", model, SETTINGS, "--targets q_proj"))
    result = answer("--model", model, SETTINGS, "--targets q_proj")
    entries = "PEFT: LoraConfig(r=16, lora_alpha=8.0, use_rslora=False, target_modules=['q_proj'])"
    assumptions = [f"- {sentence}" for sentence in result["tuning"]["assumptions"]]
    assert " ".join(printed.split()) == " ".join([result["answer"], entries, *assumptions])


def test_the_configuration_alone_is_read(model, tmp_path, monkeypatch) -> None:
    """Of a folder, of a GGUF file, and of a hub id with a revision, whose weights are not downloaded."""
    import huggingface_hub

    usual = answer("--model", model, SETTINGS)["tuning"]
    # A folder without weights, and the same one as the hub's cache has it.
    for folder in (tmp_path / "folder", tmp_path / "snapshots" / "aaaa"):
        folder.mkdir(parents=True)
        shutil.copy(model / "config.json", folder)
    assert answer("--model", tmp_path / "folder", SETTINGS)["tuning"] == usual
    weights = {name: np.zeros(shape, np.float32) for name, shape in expected_shapes(checkpoint.CONFIG).items()}
    file = gguf_files.write_model(tmp_path / "model.gguf", checkpoint.CONFIG, weights, {})
    assert answer("--model", file, SETTINGS)["tuning"] == usual
    asked = []

    def download(repository: str, name: str, *, revision: str | None, **_: Any) -> str:
        asked.append((repository, name, revision))
        return str(tmp_path / "snapshots" / "aaaa" / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("weights are downloaded"))
    assert answer("--model org/tiny --revision v1", SETTINGS)["tuning"] == usual
    assert asked == [("org/tiny", "config.json", "v1")]


def test_a_number_of_parameters_stands_for_a_model(model) -> None:
    assert answer("--parameters", repr(BILLIONS), SETTINGS)["tuning"] == answer("--model", model, SETTINGS)["tuning"]
    assert answer("--parameters 8 --targets z_proj", SETTINGS)["tuning"]["learning_rate"] == (
        pytest.approx(rate_prior(Run(16, 8.0, 256, "cosine", 4), parameters=8.0).rates.best)
    )


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--targets z_proj", "'z_proj', which matches no linear module"),
        ("--family none", "--family .*'none'"),
        ("--model nowhere", "nowhere: no such path"),
        ("--rank 0", "--rank .* 0"),
        ("--parameters 0", "--parameters .* 0"),
        ("--parameters 8 --model nowhere", "--model nowhere .*--parameters"),
        ("--parameters 8 --model smollm2-135m", "--model smollm2-135m .*--parameters"),
        ("", "--model .*--parameters"),
    ],
)
def test_bad_input_is_one_line(words, named, model) -> None:
    words = words if not words or "--model" in words or "--parameters" in words else f"--model {model} {words}"
    assert re.search(named, commands.refusal(commands.run_command(sim.main, words)))
