"""PEFT's files: written as peft writes them, read as peft reads them, all else refused with one line."""

import json
import os
import shutil
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from rora_theory.adapters import LoraConfig, init, load_peft, save_peft
from rora_theory.adapters import peft as files
from rora_theory.adapters.lora import assemble
from rora_theory.errors import InputError
from rora_theory.scaling import scaling_factor

CASES = ("lora", "rora", "dora", "lora_patterns", "dora_rora_patterns", "regex")
WRITTEN = {
    "alpha_pattern",
    "base_model_name_or_path",
    "bias",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "task_type",
    "use_dora",
    "use_rslora",
}


def read(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.fixture
def folder(golden, tmp_path) -> Path:
    """A copy of a folder that peft wrote, to damage."""
    return Path(shutil.copytree(golden.FOLDER / "dora_rora_patterns", tmp_path / "adapter"))


def change(folder: Path, **entries) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(read(folder) | entries))


def rewrite(folder: Path, change_tensors) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.numpy.load(path.read_bytes())
    change_tensors(tensors)
    path.write_bytes(safetensors.numpy.save(tensors, metadata={"format": "pt"}))


@pytest.mark.parametrize("name", CASES)
def test_writes_what_peft_wrote(name: str, golden, config, tmp_path) -> None:
    """Names, shapes and bits of the tensors, the file's metadata, and every entry of the configuration."""
    source = golden.FOLDER / name
    save_peft(tmp_path, load_peft(source, config), base_model="tiny")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    ours = (tmp_path / "adapter_model.safetensors").read_bytes()
    theirs = (source / "adapter_model.safetensors").read_bytes()
    found, expected = safetensors.numpy.load(ours), safetensors.numpy.load(theirs)
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        np.testing.assert_array_equal(found[key], value, strict=True)
    for data in (ours, theirs):
        header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
        assert header["__metadata__"] == {"format": "pt"}
    written, original = read(tmp_path), read(source)
    assert set(written) == WRITTEN
    assert written.pop("base_model_name_or_path") == "tiny"
    assert {key: original[key] for key in written} == written


@pytest.mark.parametrize("rule", ["lora", "rora", "rslora"])
def test_use_rslora_is_written_for_every_rule(rule, config, params, tmp_path) -> None:
    adapter = init(jax.random.key(0), LoraConfig(rank=4, alpha=3.5, rule=rule, dropout=0.05), config, params)
    save_peft(tmp_path, adapter)
    written = read(tmp_path)
    assert written["use_rslora"] is (rule != "lora")
    assert (written["lora_alpha"], written["lora_dropout"], written["init_lora_weights"]) == (3.5, 0.05, True)
    again = load_peft(tmp_path, config, params)
    assert again.config == adapter.config or rule == "rslora"
    assert jax.tree.all(jax.tree.map(jnp.array_equal, again.scaling, adapter.scaling))


@pytest.mark.parametrize("alpha_pattern", [{}, {"v_proj": 1.3}])
def test_another_exponent_is_written_as_lora_with_the_same_scaling(alpha_pattern, config, params, tmp_path) -> None:
    settings = LoraConfig(
        rank=4,
        alpha=3.0,
        rule=0.25,
        target_modules="all-linear",
        rank_pattern={"layers.1.self_attn.q_proj": 2, "down_proj": 7},
        alpha_pattern=alpha_pattern,
        init="gaussian",
    )
    adapter = init(jax.random.key(0), settings, config, params)
    save_peft(tmp_path, adapter)
    written = read(tmp_path)
    assert (written["use_rslora"], written["init_lora_weights"]) == (False, "gaussian")
    assert written["lora_alpha"] / 4 == pytest.approx(scaling_factor(0.25, alpha=3.0, rank=4), rel=1e-15)
    again = load_peft(tmp_path, config, params)
    assert again.config.rule == "lora"
    assert set(again.scaling) == set(adapter.scaling)
    for name, scaling in adapter.scaling.items():
        # alpha / r^kappa against (alpha r / r^kappa) / r: a few float64 roundings, then one to float32.
        np.testing.assert_allclose(again.scaling[name], scaling, rtol=1.2e-7)
    assert again.targets[0].ranks == (4, 2, 4)


def test_half_precision_files_are_read_as_float32(config, folder) -> None:
    exact = load_peft(folder, config)
    for dtype in (np.float16, jnp.bfloat16):
        rounded = jax.tree.map(lambda leaf, dtype=dtype: np.asarray(leaf).astype(dtype), exact.params)
        tensors = files._tensors(exact.replace(rounded))
        header, data, at = {}, b"", 0
        for name, value in tensors.items():
            kind = "F16" if dtype == np.float16 else "BF16"
            header[name] = {
                "dtype": kind,
                "shape": list(value.shape),
                "data_offsets": [at, at + value.nbytes],
            }
            data, at = data + value.tobytes(), at + value.nbytes
        text = json.dumps(header).encode()
        (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
        found = load_peft(folder, config)
        for ours, theirs in zip(jax.tree.leaves(found.params), jax.tree.leaves(rounded), strict=True):
            assert ours.dtype == jnp.float32
            np.testing.assert_array_equal(ours, theirs.astype(np.float32))


def test_entries_peft_reads_otherwise_are_understood(config, golden, folder) -> None:
    """An exclusion, a layer as a number, inert patterns, neutral unknown entries: all open in peft."""
    change(
        folder,
        exclude_modules=["v_proj"],
        rank_pattern=read(folder)["rank_pattern"] | {"nothing": 3},
        a_later_flag=False,
    )
    rewrite(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "v_proj" in name])
    adapter = load_peft(folder, config)
    assert "self_attn.v_proj" not in adapter.params
    assert adapter.targets[0] == load_peft(golden.FOLDER / "dora_rora_patterns", config).targets[0]
    change(folder, exclude_modules=r".*\.[02]\..*|.*v_proj")
    rewrite(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.1." not in name])
    assert {target.ranks[0::2] for target in load_peft(folder, config).targets} == {(0, 0)}
    change(folder, exclude_modules=["v_proj"], layers_to_transform=1, layers_pattern="layers")
    assert {target.ranks[0::2] for target in load_peft(folder, config).targets} == {(0, 0)}


def test_an_older_adapter_is_replaced_whole(config, params, folder, monkeypatch) -> None:
    """Stopped between the two renames, the folder is refused; finished, it is the new adapter."""
    new = init(jax.random.key(0), LoraConfig(rank=2, alpha=1.0), config, params)
    replaced = os.replace

    def stop(source, target):
        if str(target).endswith("adapter_config.json"):
            raise KeyboardInterrupt
        replaced(source, target)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        save_peft(folder, new)
    with pytest.raises(InputError, match=r"has no adapter_config.json"):
        load_peft(folder, config)
    monkeypatch.undo()
    save_peft(folder, new)
    assert load_peft(folder, config).config == new.config
    assert not [path for path in folder.iterdir() if path.suffix == ".part"]


def test_a_full_disk_leaves_the_older_adapter(config, params, folder, monkeypatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="adapter not written: No space left"):
        save_peft(folder, init(jax.random.key(0), LoraConfig(rank=2, alpha=1.0), config, params))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_file_is_no_folder(config, params, tmp_path) -> None:
    (tmp_path / "here").write_text("")
    adapter = init(jax.random.key(0), LoraConfig(rank=2, alpha=1.0), config, params)
    with pytest.raises(InputError, match="here: is a file"):
        save_peft(tmp_path / "here", adapter)
    with pytest.raises(InputError, match="inside: adapter not written: Not a directory"):
        save_peft(tmp_path / "here" / "inside", adapter)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; accepted is 'LORA'"),
        ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'"),
        ({"bias": "all"}, "bias is 'all', which is not supported"),
        ({"lora_bias": True}, "lora_bias is True, which is not supported"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"use_qalora": True}, "use_qalora is True"),
        ({"from_a_later_version": 0}, "from_a_later_version is 0, which is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'; accepted is true, false, gaussian"),
        ({"init_lora_weights": "loftq", "loftq_config": {"bits": 4}}, "init_lora_weights is 'loftq'"),
        ({"r": 0}, "r is 0; accepted is an integer of 1 or more"),
        ({"r": "8"}, "r is '8'"),
        ({"r": 10**400}, "r is 1000"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"r": 9}, r"rank is 9 at .*k_proj, whose weight is \[8, 16\]"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"lora_alpha": -1}, "lora_alpha is -1"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
        ({"rank_pattern": {"q_proj": 2.5}}, "rank_pattern is"),
        ({"alpha_pattern": {"q_proj(": 2}}, "alpha_pattern 'q_proj\\(' is not a regular expression"),
        ({"exclude_modules": "q_proj("}, "exclude_modules 'q_proj\\(' is not a regular expression"),
        ({"target_modules": None}, "target_modules is None"),
        ({"target_modules": ["c_attn"]}, "'c_attn', which matches no module"),
        ({"target_modules": ["embed_tokens"]}, "matches model.embed_tokens, which can't be adapted"),
        ({"layers_to_transform": [7]}, "layers has 7; accepted are 0 to 2"),
        ({"layers_pattern": ["blocks"]}, "layers_pattern"),
        ({"use_dora": 1}, "use_dora is 1; accepted is true or false"),
        ({"use_dora": False}, "has .*lora_magnitude_vector; accepted is what adapter_config.json promises"),
        ({"target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "o_proj"], "rank_pattern": {}}, "has "),
        (
            {"rank_pattern": {}},
            r"another model: .*layers.1.self_attn.q_proj.lora_A.weight is \[6, 16\]; accepted is \[4, 16\]",
        ),
    ],
)
def test_refuses_configurations(entries, message, config, folder) -> None:
    change(folder, **entries)
    with pytest.raises(InputError, match=message) as error:
        load_peft(folder, config)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop(NAME), f"has no {NAME}"),
        (
            lambda t: t.update({NAME: t[NAME].T.copy()}),
            rf"another model: {NAME} is \[16, 4\]; accepted is \[4, 16\]",
        ),
        (lambda t: t.update({NAME.replace("0", "40"): t[NAME]}), "layers.40.*; the model has 3 layers"),
        (
            lambda t: t.update({"base_model.model.lm_head.lora_A.weight": t[NAME]}),
            "has base_model.model.lm_head",
        ),
        (lambda t: t.update({NAME: t[NAME] * np.inf}), f"{NAME} has a value that is not finite"),
        (lambda t: t.update({NAME: t[NAME].astype(np.int32)}), f"{NAME} is I32; accepted are F32, F16, BF16"),
    ],
)
def test_refuses_tensors(damage, message, config, folder) -> None:
    rewrite(folder, damage)
    with pytest.raises(InputError, match=message):
        load_peft(folder, config)


def test_an_adapter_for_a_wider_model_is_refused(config, params, folder) -> None:
    wider = {**params, "layers": {**params["layers"]}}
    wider["layers"]["self_attn.q_proj"] = {"weight": jnp.zeros((3, 16, 20))}
    with pytest.raises(InputError, match=r"another model: .*q_proj.lora_A.weight is \[4, 16\]; accepted is \[4, 20\]"):
        load_peft(folder, config, wider)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_file_cut_off_is_refused(kept, config, folder) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"adapter_model.safetensors: is damaged or cut off"):
        load_peft(folder, config)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_a_damaged_configuration_is_refused(text, config, folder) -> None:
    (folder / "adapter_config.json").write_bytes(text)
    with pytest.raises(InputError, match=r"adapter_config.json: (is not JSON|holds a list)"):
        load_peft(folder, config)


def test_pickles_and_missing_files_are_refused(config, folder) -> None:
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"has no adapter_model.safetensors"):
        load_peft(folder, config)
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(InputError, match=r"adapter_model.bin: a pickle can run code and is not read"):
        load_peft(folder, config)
    with pytest.raises(InputError, match="nowhere: is not a folder"):
        load_peft(folder / "nowhere", config)


def test_the_rule_is_carried_not_typed_twice(config, golden) -> None:
    """Assembled with another rule, the same tensors get another scaling; nothing else holds one."""
    read_back = load_peft(golden.FOLDER / "lora", config)
    other = assemble(LoraConfig(rank=4, alpha=8.0, rule="rora"), read_back.targets, read_back.params)
    for name, scaling in read_back.scaling.items():
        np.testing.assert_allclose(other.scaling[name], 2 * scaling, rtol=1e-7)  # 8/sqrt(4) against 8/4
