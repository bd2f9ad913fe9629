"""Commands that measure a model of transformers whose architecture the JAX path lacks: a tiny GPT-NeoX."""

import importlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from support import checkpoint, commands, torch_models

from rora_theory.errors import InputError
from rora_theory.lab import llama
from rora_theory.runs import frames
from sims import tune
from sims.common import inputs

KINDS = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
TARGETS = f"--targets {' '.join(kind.rpartition('.')[2] for kind in KINDS)}"
MODULES = {f"gpt_neox.layers.{layer}.{kind}" for layer in (0, 1) for kind in KINDS}
PLANNED = "--rank 16 --alpha 8 --steps 256 --batch-size 4 --json"
RUNS = {
    "regime": "--model NEOX --data TRAIN --batch-size 4 --held-out 4 --tokens 16 --ranks 1 4 --rows 0",
    "coordinate_check": "--model NEOX --data TRAIN --ranks 2 4 8 --rules lora --optimizers adamw --steps 1 --seeds 0 1 "
    "--batch-size 2 --held-out 6",
    "transfer": "--check NEOX TRAIN --from-rank 2 --to-rank 4 --lr 1e-4 --check-batch-size 4 --seeds 0 1",
}
"""Words of the commands that read weights and records."""


def configuration(**changes: Any) -> Any:
    sizes = {
        "vocab_size": checkpoint.CONFIG.vocab_size, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    return torch_models.transformers.GPTNeoXConfig(**sizes | changes)


@pytest.fixture(scope="module")
def neox(model, tmp_path_factory) -> Path:
    """Return the folder of a random GPT-NeoX with the tokenizer of the tiny checkpoint."""
    folder = tmp_path_factory.mktemp("neox") / "neox"
    torch_models.torch.manual_seed(0)
    create = torch_models.transformers.AutoModelForCausalLM.from_config
    torch_models.initialised(create(configuration())).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, folder)
    return folder


@pytest.fixture
def run(neox, data, tmp_path):
    """Return a function that runs a command of `RUNS` in the folder ``run``."""

    def run(name: str, words: str = TARGETS, model: Path = neox) -> commands.Ended:
        places = {"NEOX": str(model), "TRAIN": str(data / "train.json")}
        arguments = [places.get(word, word) for word in f"{RUNS[name]} {words}".split()]
        return commands.run_command(importlib.import_module(f"sims.{name}").main, *arguments, "--out", tmp_path / "run")

    return run


@pytest.mark.slow
def test_regime_measures_every_module(run, tmp_path) -> None:
    assert "Crossing rank r*" in commands.output(run("regime"))
    rows = commands.rows(tmp_path / "run" / "crossing_ranks.csv")
    assert {row["module"] for row in rows} == MODULES
    assert all(float(row["crossing_rank"]) >= 1 for row in rows)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert (manifest["config"]["model"], manifest["model_layers"]) == ("neox", 2)


@pytest.mark.slow
def test_regime_measures_all_linear_but_the_head(run, tmp_path) -> None:
    commands.output(run("regime", "--targets all-linear --layers 1"))
    rows = commands.rows(tmp_path / "run" / "crossing_ranks.csv")
    assert {row["module"] for row in rows} == {name for name in MODULES if ".1." in name}


@pytest.mark.slow
def test_coordinate_check_adapts_every_module(run, tmp_path) -> None:
    commands.output(run("coordinate_check"))
    sizes = frames.read_csv(tmp_path / "run" / "results.csv")
    outputs = sizes[(sizes["quantity"] == "output") & (sizes["module"] != "model")]
    assert set(outputs["module"]) == set(KINDS)
    assert (outputs["value"] > 0).all()


@pytest.mark.slow
def test_a_transfer_is_checked(run, tmp_path) -> None:
    commands.output(run("transfer"))
    steps = frames.read_csv(tmp_path / "run" / "results.csv")
    assert set(steps["module"].dropna()) == MODULES
    assert (steps["rms"] > 0).all()


def test_tune_counts_the_parameters(neox) -> None:
    """From the configuration alone; the weights may be missing."""
    billions = torch_models.transformers.AutoModelForCausalLM.from_pretrained(neox).num_parameters() / 1e9
    folder = neox.parent / "configuration"
    folder.mkdir()
    shutil.copy(neox / "config.json", folder)
    answers = [
        json.loads(commands.output(commands.run_command(tune.main, *words, PLANNED, TARGETS)))
        for words in (["--model", folder], ["--parameters", repr(billions)])
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("name", RUNS)
def test_targets_are_checked_before_weights_are_read(name, run, tmp_path, monkeypatch) -> None:
    """The default targets are modules of LLaMA; the message lists those of the model."""
    monkeypatch.setattr(inputs, "load_model", lambda *_: pytest.fail("weights are read"))
    message = commands.refusal(run(name, ""))
    assert re.search(r"'q_proj', which matches no linear module; supported: query_key_value, dense, ", message)
    assert not (tmp_path / "run").exists()


def test_a_token_without_an_embedding_is_refused(run, neox, tmp_path) -> None:
    shutil.copytree(neox, tmp_path / "small")
    configuration(vocab_size=200).save_pretrained(tmp_path / "small")
    assert "the model has 200 embeddings" in commands.refusal(run("regime", model=tmp_path / "small"))


REMOTE = {"model_type": "mine", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (REMOTE, "custom code"),
        ({"model_type": "no_such_family"}, "no_such_family"),
        ({"model_type": "vit"}, "ViTConfig"),
        ({"model_type": "gpt_neox", "hidden_size": "wide"}, "hidden_size"),
        ({"model_type": "gpt_neox", "num_attention_heads": 0}, "zero"),
    ],
    ids=["code", "unknown", "images", "type", "value"],
)
def test_a_configuration_that_transformers_refuses_is_one_line(entries, message, tmp_path, monkeypatch) -> None:
    """Code in the folder is not run, nor is there a question whether to run it."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks a question"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(entries))
    (folder / "code.py").write_text("raise SystemExit('the code of the folder was run')")
    refusal = commands.refusal(commands.run_command(tune.main, "--model", folder, PLANNED))
    assert f"{folder}: transformers cannot load the model: " in refusal
    assert message in refusal


def test_lack_of_memory_is_reported_as_such(run, monkeypatch) -> None:
    def load(*_, **__):
        torch_models.torch.empty(1 << 55)

    monkeypatch.setattr(torch_models.transformers.AutoModelForCausalLM, "from_pretrained", load)
    assert commands.refusal(run("regime")).startswith("error: out of memory (")


@pytest.mark.parametrize(
    ("name", "words"), [("finetune", "--data TRAIN --rank 2"), ("evaluate", "--data-dir DATA --tasks piqa")]
)
def test_commands_of_the_jax_path_refuse_the_model(name, words, neox, data, tmp_path) -> None:
    places = {"TRAIN": str(data / "train.json"), "DATA": str(data)}
    arguments = [places.get(word, word) for word in words.split()]
    main = importlib.import_module(f"sims.{name}").main
    refusal = commands.refusal(commands.run_command(main, "--model", neox, *arguments, "--out", tmp_path / "run"))
    assert re.search(r"config\.json: .*model_type.*'gpt_neox'", refusal)


def test_a_hub_id_is_checked_before_its_weights_are_downloaded(neox, tmp_path, monkeypatch) -> None:
    """By transformers for a measurement, and by default for the JAX path."""
    import huggingface_hub

    folder = tmp_path / "snapshots" / "aaaa"
    shutil.copytree(neox, folder)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(folder / "config.json"))
    downloads = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: downloads.append(1) or str(folder))
    with pytest.raises(InputError, match=r"org/neox: .*gpt_neox"):
        llama.locate("org/neox")
    assert not downloads
    origin, _ = inputs.open_model("org/neox")
    assert (origin.path, downloads) == (folder, [1])
    # A model that transformers refuses is not downloaded either.
    (folder / "config.json").write_text(json.dumps(REMOTE))
    with pytest.raises(InputError, match=r"org/neox: .*custom code"):
        inputs.open_model("org/neox")
    assert downloads == [1]


def test_a_hub_id_has_its_configuration_read_once(neox, monkeypatch) -> None:
    """The check before the download and the command share one model without weights."""
    built: list[Path] = []
    build = inputs.build_skeleton

    def counted(path: Path) -> Any:
        built.append(path)
        return build(path)

    def locate(name: str, revision: str | None, *, config_only: bool, check: Any) -> llama.ModelSource:
        assert (revision, config_only) == (None, True)
        check(neox)
        return llama.ModelSource(name, neox, name, "0" * 40)

    monkeypatch.setattr(inputs, "build_skeleton", counted)
    monkeypatch.setattr(llama, "locate", locate)
    _, skeleton = inputs.open_model("some/neox", config_only=True)
    assert skeleton.config.model_type == "gpt_neox"
    assert built == [neox]
