"""Portable form: the same function from one rank, one alpha and no flag, whatever a reader knows beyond these."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from rora_theory.adapters import PrefixConfig, init, load_peft, rewrite_portable, save_peft
from rora_theory.errors import InputError
from sims import portable as command
from sims.common import cli

KEYS = {
    "base_model_name_or_path",
    "bias",
    "fan_in_fan_out",
    "inference_mode",
    "lora_alpha",
    "lora_dropout",
    "peft_type",
    "r",
    "target_modules",
    "task_type",
    "use_dora",
    "use_rslora",
}
CASES = {
    "rora": {"rule": "rora"},
    "quarter": {"rule": 0.25, "rank_pattern": {"down_proj": 3, ".*v_proj": 7}},
    "gammas": {"rule": "rora", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.*": 3.0, "down_proj": 5.0}},
    "layers": {"rule": "lora", "layers": (0, 2)},
    "small": {"rule": "lora", "alpha": 0.25},
    "regex": {"rule": "rora", "target_modules": r"model\.layers\.[01]\..*(q|down)_proj"},
}


def served(folder: Path) -> dict[str, np.ndarray]:
    """What a reader that knows r and lora_alpha alone adds to each module's weight."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = safetensors.numpy.load((folder / "adapter_model.safetensors").read_bytes())
    found = {}
    for key in tensors:
        if key.endswith("lora_A.weight"):
            b = tensors[key.replace("lora_A", "lora_B")].astype(np.float64)
            assert tensors[key].shape[0] == b.shape[1] == config["r"]
            found[key] = config["lora_alpha"] / config["r"] * b @ tensors[key].astype(np.float64)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_reader_of_rank_and_alpha_alone_computes_the_same(
    name, config, params, perturbed, tokens, run, tmp_path
) -> None:
    adapter = perturbed(**{"rank": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], **CASES[name]})
    save_peft(tmp_path / "peft", adapter, base_model="tiny")
    save_peft(tmp_path / "own", adapter, base_model="tiny", portable=True)
    rewrite_portable(tmp_path / "peft", tmp_path / "again")
    written = json.loads((tmp_path / "own" / "adapter_config.json").read_text())
    assert set(written) == KEYS
    assert isinstance(written["lora_alpha"], int)
    assert written["lora_alpha"] >= 1
    assert (written["use_rslora"], written["use_dora"], written["base_model_name_or_path"]) == (False, False, "tiny")
    modules = {
        target.module: (
            np.asarray(adapter.params[target.module]["lora_A"]),
            np.asarray(adapter.params[target.module]["lora_B"]),
        )
        for target in adapter.targets
    }
    for folder in ("own", "again"):
        found = served(tmp_path / folder)
        assert len(found) == sum(map(bool, (rank for target in adapter.targets for rank in target.ranks)))
        for key, delta in found.items():
            layer, module = int(key.split(".")[4]), ".".join(key.split(".")[5:7])
            a, b = (stack[layer].astype(np.float64) for stack in modules[module])
            expected = float(adapter.scaling[module][layer]) * b @ a
            # Twice float32's rounding: of gamma in the adapter, and of B where its gamma is not the common one.
            np.testing.assert_allclose(delta, expected, rtol=0, atol=2.4e-7 * np.abs(expected).max())
    logits = np.asarray(run(params, tokens, adapter))
    found = run(params, tokens, load_peft(tmp_path / "again", config))
    # Float32 sums of other terms through three layers: some tens of roundings.
    np.testing.assert_allclose(found, logits, rtol=0, atol=1e-5 * np.abs(logits).max())


def test_tensors_of_one_rank_and_gamma_stay_bit_for_bit(perturbed, tmp_path) -> None:
    adapter = perturbed(rank=4, alpha=6, rule="rora", target_modules=["q_proj"])
    save_peft(tmp_path / "peft", adapter)
    save_peft(tmp_path / "portable", adapter, portable=True)
    one, other = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("peft", "portable"))
    assert one == other
    written = json.loads((tmp_path / "portable" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["target_modules"]) == (4, 12, ["q_proj"])


def test_an_adapter_of_another_architecture_is_rewritten(golden, tmp_path) -> None:
    """Names are the file's own: no model is asked."""
    (tmp_path / "peft").mkdir()
    rng = np.random.default_rng(0)
    names = [
        f"base_model.model.transformer.h.{layer}.attn.c_attn.lora_{kind}.weight" for layer in (0, 1) for kind in "AB"
    ]
    tensors = {name: rng.normal(size=(2, 6) if "A" in name[-9:] else (18, 2)).astype(np.float16) for name in names}
    (tmp_path / "peft" / "adapter_model.safetensors").write_bytes(safetensors.numpy.save(tensors))
    entries = json.loads((golden.FOLDER / "rora" / "adapter_config.json").read_text())
    entries |= {"r": 2, "lora_alpha": 3, "target_modules": ["c_attn"], "layers_to_transform": None}
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(entries))
    rewrite_portable(tmp_path / "peft", tmp_path / "portable")
    for name, delta in served(tmp_path / "portable").items():
        a, b = (tensors[key].astype(np.float64) for key in (name, name.replace("lora_A", "lora_B")))
        expected = 3 / 2**0.5 * b @ a  # alpha 4.24 becomes 4, and B takes the rest: twice float32's rounding
        np.testing.assert_allclose(delta, expected, rtol=0, atol=2.4e-7 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("dora", {}, "use_dora true .*Merge the adapter into the model"),
        ("lora", {"modules_to_save": ["lm_head"]}, "modules_to_save is .*not supported"),
        ("lora", {"r": 5}, r"r must be 4 at model.layers.\d.*got 5"),
        ("lora", {"peft_type": "PREFIX_TUNING"}, "peft_type 'PREFIX_TUNING' has no portable form"),
    ],
)
def test_what_has_no_portable_form_is_refused_by_name(name, change, message, golden, tmp_path) -> None:
    source = golden.FOLDER / name
    (tmp_path / "peft").mkdir()
    entries = json.loads((source / "adapter_config.json").read_text()) | change
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(entries))
    (tmp_path / "peft" / "adapter_model.safetensors").write_bytes((source / "adapter_model.safetensors").read_bytes())
    with pytest.raises(InputError, match=message):
        rewrite_portable(tmp_path / "peft", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_prefix_is_refused(config, params, tmp_path) -> None:
    prefix = init(jax.random.key(0), PrefixConfig(2), config, params)
    with pytest.raises(InputError, match="peft_type 'PREFIX_TUNING' has no portable form"):
        save_peft(tmp_path / "out", prefix, portable=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda t: t.pop(next(key for key in t if "lora_B" in key)),
            r"must have A \[r, p_in\].*got \{'A': \[4, \d+\]\}",
        ),
        (lambda t: t.update({"lm_head.weight": np.ones((2, 2), np.float32)}), "unsupported tensor 'lm_head.weight'"),
        (lambda t: t.clear(), "has no tensors"),
    ],
)
def test_damaged_tensors_are_refused(damage, message, golden, tmp_path) -> None:
    tensors = safetensors.numpy.load((golden.FOLDER / "lora" / "adapter_model.safetensors").read_bytes())
    damage(tensors)
    (tmp_path / "adapter_config.json").write_bytes((golden.FOLDER / "lora" / "adapter_config.json").read_bytes())
    (tmp_path / "adapter_model.safetensors").write_bytes(safetensors.numpy.save(tensors))
    with pytest.raises(InputError, match=message):
        rewrite_portable(tmp_path, tmp_path / "out")


def test_the_command(golden, tmp_path, monkeypatch, capsys) -> None:
    source, out = golden.FOLDER / "rora", tmp_path / "served"
    monkeypatch.setattr("sys.argv", ["portable", str(source), "--out", str(out)])
    command.main()
    assert json.loads((out / "adapter_config.json").read_text())["lora_alpha"] == 2.5 * 4**0.5
    assert str(out) in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        cli.run(command.main)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "--out" in error
    assert str(out) in error
