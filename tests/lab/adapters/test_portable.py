"""Portable form: the same function from one rank, one alpha and no flag."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from support.peft_files import change_config, change_tensors, read_config, read_tensors

from rora_theory.errors import InputError
from rora_theory.lab.adapters import PrefixConfig, load_peft, rewrite_portable, save_peft
from sims import portable as command
from sims.common import cli

KEYS = {
    "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "lora_alpha", "lora_dropout", "peft_type",
    "r", "target_modules", "task_type", "use_dora", "use_rslora",
}  # fmt: skip
CASES = {
    "rora": {"rule": "rora"},
    "quarter": {"rule": 0.25, "rank_pattern": {"down_proj": 3, ".*v_proj": 7}},
    "gammas": {"rule": "rora", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.*": 3.0, "down_proj": 5.0}},
    "layers": {"rule": "lora", "layers": (0, 2)},
    "small": {"rule": "lora", "alpha": 0.25},
    "regex": {"rule": "rora", "target_modules": r"model\.layers\.[01]\..*(q|down)_proj"},
}


@pytest.fixture
def source(golden, tmp_path):
    """Return a function that copies a golden folder with other entries, other tensors and no metadata."""

    def make(name: str, entries=(), damage=lambda _: None) -> Path:
        folder = Path(shutil.copytree(golden.FOLDER / name, tmp_path / "peft"))
        change_config(folder, **dict(entries))
        change_tensors(folder, damage, metadata=False)
        return folder

    return make


def product(gamma: float, lora_A, lora_B) -> np.ndarray:
    return gamma * np.asarray(lora_B, np.float64) @ np.asarray(lora_A, np.float64)


def served(folder: Path) -> dict[str, np.ndarray]:
    """Return what a reader that knows only r and lora_alpha adds to each module's weight."""
    config, tensors = read_config(folder), read_tensors(folder)
    updates = {}
    for key in tensors:
        if key.endswith("lora_A.weight"):
            lora_A, lora_B = tensors[key], tensors[key.replace("lora_A", "lora_B")]
            assert lora_A.shape[0] == lora_B.shape[1] == config["r"]
            updates[key] = product(config["lora_alpha"] / config["r"], lora_A, lora_B)
    return updates


def compare(updates: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Compare updates to twice float32's rounding: of gamma in the adapter, and of B where its gamma differs."""
    assert updates.keys() == expected.keys()
    for key, update in updates.items():
        np.testing.assert_allclose(update, expected[key], rtol=0, atol=2.4e-7 * np.abs(expected[key]).max())


def applied(adapter) -> dict[str, np.ndarray]:
    """Return what the adapter adds to each module's weight, by the name of PEFT's lora_A."""
    updates = {}
    for target in adapter.targets:
        tensors, gammas = adapter.params[target.module], adapter.scaling[target.module]
        for layer in np.flatnonzero(target.ranks):
            name = f"base_model.model.model.layers.{layer}.{target.module}.lora_A.weight"
            updates[name] = product(float(gammas[layer]), tensors["lora_A"][layer], tensors["lora_B"][layer])
    return updates


@pytest.mark.parametrize("name", CASES)
def test_a_client_that_reads_only_rank_and_alpha_computes_the_same(name, config, perturbed, tmp_path) -> None:
    adapter = perturbed(**{"rank": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], **CASES[name]})
    save_peft(tmp_path / "peft", adapter, base_model="tiny")
    save_peft(tmp_path / "own", adapter, base_model="tiny", portable=True)
    rewrite_portable(tmp_path / "peft", tmp_path / "again")
    written = read_config(tmp_path / "own")
    assert set(written) == KEYS
    assert isinstance(written["lora_alpha"], int)
    assert written["lora_alpha"] >= 1
    assert (written["use_rslora"], written["use_dora"], written["base_model_name_or_path"]) == (False, False, "tiny")
    loaded = applied(load_peft(tmp_path / "again", config))
    for updates in (served(tmp_path / "own"), served(tmp_path / "again"), loaded):
        compare(updates, applied(adapter))


def test_tensors_of_one_rank_and_gamma_stay_bit_for_bit(perturbed, tmp_path) -> None:
    adapter = perturbed(rank=4, alpha=6, rule="rora", target_modules=["q_proj"])
    save_peft(tmp_path / "peft", adapter)
    save_peft(tmp_path / "portable", adapter, portable=True)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("peft", "portable")]
    assert files[0] == files[1]
    written = read_config(tmp_path / "portable")
    assert (written["r"], written["lora_alpha"], written["target_modules"]) == (4, 12, ["q_proj"])


def test_an_adapter_of_another_architecture_is_rewritten(source, tmp_path) -> None:
    """The names are those of the file, and no model is needed."""
    rng = np.random.default_rng(0)
    names = [
        f"base_model.model.transformer.h.{layer}.attn.c_attn.lora_{kind}.weight" for layer in (0, 1) for kind in "AB"
    ]
    shapes = {"A": (2, 6), "B": (18, 2)}
    tensors = {name: rng.normal(size=shapes[name[-8]]).astype(np.float16) for name in names}
    entries = {"r": 2, "lora_alpha": 3, "target_modules": ["c_attn"], "layers_to_transform": None}
    folder = source("rora", entries, lambda golden: (golden.clear(), golden.update(tensors)))
    rewrite_portable(folder, tmp_path / "portable")
    # Alpha 4.24 becomes 4, and B takes the rest.
    pairs = {name: (tensors[name], tensors[name.replace("lora_A", "lora_B")]) for name in names if "lora_A" in name}
    compare(served(tmp_path / "portable"), {name: product(3 / 2**0.5, *pair) for name, pair in pairs.items()})


@pytest.mark.parametrize(
    ("name", "entries", "damage", "message"),
    [
        ("dora", {}, lambda _: None, "use_dora true .*Merge the adapter into the model"),
        ("lora", {"modules_to_save": ["lm_head"]}, lambda _: None, "modules_to_save is .*not supported"),
        ("lora", {"r": 5}, lambda _: None, r"r .* 4 at model.layers.\d.*got 5"),
        ("lora", {"peft_type": "PREFIX_TUNING"}, lambda _: None, "peft_type 'PREFIX_TUNING' has no portable form"),
        (
            "lora",
            {},
            lambda t: t.pop(next(key for key in t if "lora_B" in key)),
            r"A \[r, p_in\].*got \{'A': \[4, \d+\]\}",
        ),
        ("lora", {}, lambda t: t.update({"lm_head.weight": np.ones((2, 2), "f4")}), "unsupported tensor 'lm_head"),
        ("lora", {}, lambda t: t.clear(), "has no tensors"),
    ],
)
def test_adapters_without_a_portable_form_are_refused_by_name(name, entries, damage, message, source, tmp_path) -> None:
    with pytest.raises(InputError, match=message):
        rewrite_portable(source(name, entries, damage), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_prefix_is_refused(config, params, tmp_path) -> None:
    prefix = PrefixConfig(2).build(jax.random.key(0), config, params)
    with pytest.raises(InputError, match="peft_type 'PREFIX_TUNING' has no portable form"):
        save_peft(tmp_path / "out", prefix, portable=True)
    assert not (tmp_path / "out").exists()


def test_the_command(golden, tmp_path, monkeypatch, capsys) -> None:
    source, out = golden.FOLDER / "rora", tmp_path / "served"
    monkeypatch.setattr("sys.argv", ["portable", str(source), "--out", str(out)])
    command.main()
    assert read_config(out)["lora_alpha"] == 2.5 * 4**0.5
    assert str(out) in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        cli.run_command(command.main)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "--out" in error
    assert str(out) in error
