"""PEFT's files: written as peft writes them, read as peft reads them, all else refused with one line."""

import json
import os
import re
import shutil
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from rora_theory.adapters import (
    BottleneckConfig,
    LoraConfig,
    PrefixConfig,
    adapter_digest,
    expressions,
    init,
    load_peft,
    peft_config,
    rewrite_portable,
    save_peft,
)
from rora_theory.adapters import peft as files
from rora_theory.adapters.lora import assemble_lora
from rora_theory.adapters.targets import first_matches, full_name
from rora_theory.errors import InputError
from rora_theory.finetune import FinetuneConfig
from rora_theory.llama.hub import ModelSource
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


def peft_value(pattern: dict, name: str):
    """The value that PEFT's rule finds for a module, None where none: the first entry that matches."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), None)


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
    """Names, shapes and bits of the tensors, the file's metadata, and every entry of the configuration.

    Patterns are written resolved, so that of them it is what they say of each tensor that is compared.
    """
    source = golden.FOLDER / name
    save_peft(tmp_path, load_peft(source, config), base_model="tiny")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
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
    modules = {key.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for key in found}
    for pattern in ("rank_pattern", "alpha_pattern"):
        ours, theirs = written.pop(pattern), original[pattern]
        assert {name: peft_value(ours, name) for name in modules} == {
            name: peft_value(theirs, name) for name in modules
        }
        assert len(ours) == 0 or all(sum(peft_value({key: 1}, name) == 1 for key in ours) < 2 for name in modules)
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
    with pytest.raises(InputError, match=r"adapter_config.json: no such file"):
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
    with pytest.raises(InputError, match="cannot write the adapter: No space left"):
        save_peft(folder, init(jax.random.key(0), LoraConfig(rank=2, alpha=1.0), config, params))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_no_planted_link_is_followed(golden, config, folder, tmp_path, monkeypatch) -> None:
    """Neither at the name of a file beside, should that be foreseen, nor at the file's own."""
    victim, adapter = tmp_path / "victim", load_peft(golden.FOLDER / "rora", config)
    victim.write_text("mine")
    monkeypatch.setattr("secrets.token_hex", lambda size: "0" * 2 * size)
    (folder / f".{'0' * 16}.part").symlink_to(victim)
    with pytest.raises(InputError, match="cannot write the adapter: File exists"):
        save_peft(folder, adapter)
    monkeypatch.undo()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).unlink()
        (folder / name).symlink_to(victim)
    save_peft(folder, adapter)
    assert not [path for path in folder.iterdir() if path.is_symlink()]
    assert victim.read_text() == "mine"
    assert load_peft(folder, config).config == adapter.config


def test_weights_that_are_a_pipe_or_a_device_are_refused(config, folder) -> None:
    weights = folder / "adapter_model.safetensors"
    for plant in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        weights.unlink()
        plant(weights)
        for read in (lambda: load_peft(folder, config), lambda: adapter_digest(folder)):
            with pytest.raises(InputError, match=r"adapter_model\.safetensors: is not a regular file"):
                read()


def test_equal_adapters_are_equal_in_bytes(golden, config, tmp_path) -> None:
    """Of 12 files with the two entries in an order drawn for each, all would be equal once in 2,048."""
    adapter, written = load_peft(golden.FOLDER / "rora", config), set()
    (tmp_path / "model.gguf").write_text("weights")
    base = ModelSource("model.gguf", tmp_path / "model.gguf")
    for number in range(6):
        save_peft(tmp_path / f"{number}", adapter, base_model=base)
        rewrite_portable(tmp_path / f"{number}", tmp_path / f"{number} portable")
        for name in (f"{number}", f"{number} portable"):
            path = tmp_path / name / "adapter_model.safetensors"
            with safetensors.safe_open(path, framework="numpy") as file:
                assert set(file.metadata()) == {"base_model_sha256", "format"}
            written.add(path.read_bytes())
    assert len(written) == 1
    again = load_peft(tmp_path / "0", config).params
    assert jax.tree.all(jax.tree.map(jnp.array_equal, again, adapter.params))


def test_a_file_is_no_folder(config, params, tmp_path) -> None:
    (tmp_path / "here").write_text("")
    adapter = init(jax.random.key(0), LoraConfig(rank=2, alpha=1.0), config, params)
    with pytest.raises(InputError, match="here is a file"):
        save_peft(tmp_path / "here", adapter)
    with pytest.raises(InputError, match="inside: cannot write the adapter: Not a directory"):
        save_peft(tmp_path / "here" / "inside", adapter)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"peft_type": "IA3"}, r"peft_type .*'IA3'"),
        ({"task_type": "SEQ_CLS"}, r"task_type .*got 'SEQ_CLS'"),
        ({"bias": "all"}, r"bias is not supported.*'all'"),
        ({"lora_bias": True}, r"lora_bias is not supported.*True"),
        ({"fan_in_fan_out": True}, r"fan_in_fan_out .*got True"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save .*got \['lm_head'\]"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"use_qalora": True}, r"use_qalora .*got True"),
        ({"from_a_later_version": 0}, r"from_a_later_version is not supported.*0"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights .*got 'pissa'"),
        ({"init_lora_weights": "loftq", "loftq_config": {"bits": 4}}, r"init_lora_weights .*got 'loftq'"),
        ({"r": 0}, r" r must be .*got 0"),
        ({"r": "8"}, r"r .*got '8'"),
        ({"r": 10**400}, r"r .*got 1000"),
        ({"lora_alpha": 10**400}, r"lora_alpha .*got 1000"),
        ({"lora_alpha": float("nan")}, r"lora_alpha .*got nan"),
        ({"r": 9}, r"another model: .*_proj.lora_A.weight .*\[4, 16\]"),
        ({"lora_alpha": None}, r"lora_alpha .*got None"),
        (
            {"lora_alpha": -1},
            r"lora_alpha .*got -1",
        ),
        ({"alpha_pattern": {"q_proj": 0}}, "alpha_pattern .*disables the adapter.*got {'q_proj': 0}"),
        ({"init_lora_weights": [[True]]}, r"init_lora_weights .*got \[\[True\]\]"),
        ({"peft_type": ["LORA"]}, r"peft_type .*got \['LORA'\]"),
        ({"peft_type": None}, r"peft_type .*got None"),
        ({"layers_to_transform": [10**29, -1]}, r"layers_to_transform .*got \[-?1.*"),
        ({"a\nkey": [1]}, r"'a\\nkey' is not supported.*\[1\]"),
        ({"target_modules": "(.?){60}" * 60 + "!"}, "target_modules takes too long to match"),
        ({"exclude_modules": "(.?){60}" * 60 + "!"}, "exclude_modules takes too long to match"),
        ({"rank_pattern": {"(.?){60}" * 60 + "!": 2}}, "rank_pattern takes too long to match"),
        ({"alpha_pattern": {"(.?){60}" * 60 + "!": 2}}, "alpha_pattern takes too long to match"),
        ({"target_modules": ["q_proj"] * 50_000 + ["k_proj"] * 50_000}, "'target_modules' .*got 100,000"),
        ({"rank_pattern": {f"m{i}": 2 for i in range(100_000)}}, "'rank_pattern' .*got 100,000"),
        ({"lora_dropout": 1.0}, r"lora_dropout .*got 1.0"),
        ({"rank_pattern": {"q_proj": 2.5}}, r"rank_pattern .*got {'q_proj': 2.5}"),
        ({"alpha_pattern": {"q_proj(": 2}}, "alpha_pattern 'q_proj\\(' is not a regular expression"),
        ({"exclude_modules": "q_proj("}, "exclude_modules 'q_proj\\(' is not a regular expression"),
        ({"target_modules": None}, r"target_modules .*got None"),
        ({"target_modules": ["c_attn"]}, "'c_attn', which matches no module"),
        ({"target_modules": ["embed_tokens"]}, "matches model.embed_tokens, which cannot be adapted"),
        ({"layers_to_transform": [7]}, r"layers_to_transform .*got \[7\]"),
        ({"layers_pattern": ["blocks"]}, "layers_pattern"),
        ({"use_dora": 1}, r"use_dora .*got 1"),
        ({"use_dora": False}, "unexpected tensor '.*lora_magnitude_vector'.*adapter_config.json"),
        (
            {"target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "o_proj"], "rank_pattern": {}},
            "unexpected tensor ",
        ),
        (
            {"rank_pattern": {}},
            r"another model: .*layers.1.self_attn.q_proj.lora_A.weight .*\[6, 16\]",
        ),
    ],
)
def test_refuses_configurations(entries, message, config, folder, monkeypatch, time_limit) -> None:
    monkeypatch.setattr(expressions, "LIMIT", 3000)
    change(folder, **entries)
    with time_limit(10), pytest.raises(InputError, match=message) as error:
        load_peft(folder, config)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < len(str(folder)) + 300


NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop(NAME), f"missing tensor {NAME}"),
        (
            lambda t: t.update({NAME: t[NAME].T.copy()}),
            rf"another model: {NAME} .*\[16, 4\]",
        ),
        (lambda t: t.update({NAME.replace("0", "40"): t[NAME]}), "layers.40.*; the model has 3 layers"),
        *(
            (lambda t, index=index: t.update({NAME.replace("0", index): t[NAME]}), "unexpected tensor ")
            for index in ("00", "٣", "9" * 5000)
        ),
        (
            lambda t: t.update({"base_model.model.lm_head.lora_A.weight": t[NAME]}),
            "unexpected tensor 'base_model.model.lm_head",
        ),
        (lambda t: t.update({NAME: t[NAME] * np.inf}), f"{NAME} has a value that is not finite"),
        (lambda t: t.update({NAME: t[NAME].astype(np.int32)}), rf"{NAME} .*I32"),
    ],
)
def test_refuses_tensors(damage, message, config, folder) -> None:
    rewrite(folder, damage)
    with pytest.raises(InputError, match=message):
        load_peft(folder, config)


def test_an_adapter_for_a_wider_model_is_refused(config, params, folder) -> None:
    wider = {**params, "layers": {**params["layers"]}}
    wider["layers"]["self_attn.q_proj"] = {"weight": jnp.zeros((3, 16, 20))}
    with pytest.raises(InputError, match=r"another model: .*q_proj.lora_A.weight .*\[4, 16\]"):
        load_peft(folder, config, wider)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_file_cut_off_is_refused(kept, config, folder) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"adapter_model.safetensors is damaged or truncated"):
        load_peft(folder, config)


@pytest.mark.parametrize(
    ("text", "reason"),
    [(b"", "JSON"), (b"{", "JSON"), (b"[]", "list"), (b"\xff", "UTF-8"), (b"[" * 100_000, r"JSON .*\b64\b")],
    ids=["empty", "open", "list", "bytes", "deep"],
)
def test_a_damaged_configuration_is_refused(text, reason, config, folder) -> None:
    (folder / "adapter_config.json").write_bytes(text)
    with pytest.raises(InputError, match=rf"adapter_config\.json: .*{reason}"):
        load_peft(folder, config)


def test_pickles_and_missing_files_are_refused(config, folder) -> None:
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"has no adapter_model.safetensors"):
        load_peft(folder, config)
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(InputError, match=r"adapter_model.bin: pickle files are not read"):
        load_peft(folder, config)
    with pytest.raises(InputError, match="nowhere is not a folder"):
        load_peft(folder / "nowhere", config)


def test_the_rule_is_carried_not_typed_twice(config, golden) -> None:
    """Assembled with another rule, the same tensors get another scaling; nothing else holds one."""
    read_back = load_peft(golden.FOLDER / "lora", config)
    other = assemble_lora(LoraConfig(rank=4, alpha=8.0, rule="rora"), read_back.targets, read_back.params)
    for name, scaling in read_back.scaling.items():
        np.testing.assert_allclose(other.scaling[name], 2 * scaling, rtol=1e-7)  # 8/sqrt(4) against 8/4


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | st.text(max_size=4)
    | st.sampled_from(["LORA", "PREFIX_TUNING", "SERIES_ADAPTER", "q_proj", "none", 10**400, 2**31]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dora_rora_patterns", "prefix", "series"])
@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_entries_are_read_or_refused_in_one_line(name, data, golden, config, params, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    if name == "dora_rora_patterns":
        shutil.copytree(golden.FOLDER / name, folder, dirs_exist_ok=True)
    else:
        settings = PrefixConfig(2) if name == "prefix" else BottleneckConfig("series", 2)
        save_peft(folder, init(jax.random.key(0), settings, config, params))
    keys = st.sampled_from(sorted(read(folder)))
    change(folder, **data.draw(st.dictionaries(keys, values, min_size=1, max_size=2)))
    try:
        load_peft(folder, config)
    except InputError as error:
        message = str(error)
    else:
        message = ""  # not everything drawn is wrong
    assert "\n" not in message
    assert len(message) < 500


patterns = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "q_proj", ".*_proj", "(q|v)_proj", r"layers\.[01]\..*", "self_attn.v_proj", "layers.2.self_attn.q_proj",
                r"model\.layers\.1\.self_attn\.q_proj", "down_proj", ".*", "mlp.down_proj", "nothing",
            ]
        ),
        st.integers(1, 7),
    ),
    max_size=5,
    unique_by=lambda entry: entry[0],
).map(dict)  # fmt: skip


@pytest.mark.slow
@given(ranks=patterns, alphas=patterns, rule=st.sampled_from(["lora", "rora", 0.25]))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_overlapping_patterns_keep_their_order(ranks, alphas, rule, config) -> None:
    """The first entry that matches decides, when a file is read, and again when what was read is written and read."""
    modules = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    names = [full_name(layer, module) for layer in range(3) for module in modules]
    ranks, alphas = (
        {key: value for key, value in pattern.items() if key in first_matches("", pattern, names).values()}
        for pattern in (ranks, alphas)
    )
    own = LoraConfig(4, 8, rule, modules, rank_pattern=ranks, alpha_pattern=alphas)
    targets = own.targets(config)
    written = json.loads(json.dumps(peft_config.to_peft(own, targets, None), sort_keys=True))
    read_back, again = peft_config.lora_config_of(Path("here"), written, config)
    assert len(targets) == len(modules)
    for target, other in zip(targets, again, strict=True):
        for layer in range(3):
            name = full_name(layer, target.module)
            rank, alpha = peft_value(ranks, name) or 4, peft_value(alphas, name) or 8
            assert (target.ranks[layer], target.alphas[layer]) == (rank, alpha)
            assert (peft_value(written["rank_pattern"], name) or written["r"]) == other.ranks[layer] == rank
            gamma = scaling_factor(rule, alpha=alpha, rank=rank)
            # alpha / r^kappa against (alpha r / r^kappa) / r: a few float64 roundings.
            assert scaling_factor(read_back.rule, alpha=other.alphas[layer], rank=rank) == pytest.approx(
                gamma, rel=1e-15
            )


def test_names_layers_and_ranks_that_peft_passes_over(config, folder) -> None:
    """Names and layers that the model has not, beside ones it has; no initial values; what is targeted but excluded."""
    expected = load_peft(folder, config)
    modules = read(folder)["target_modules"]
    change(folder, target_modules=[*modules, "c_attn"], layers_to_transform=[0, 1, 2, 7, -1], init_lora_weights=None)
    assert load_peft(folder, config).targets == expected.targets
    change(
        folder,
        target_modules=r".*\.(q|k|v|up|down)_proj|lm_head",
        layers_to_transform=None,
        exclude_modules=["lm_head"],
    )
    assert load_peft(folder, config).targets == expected.targets
    change(folder, exclude_modules="lm_.*")
    assert load_peft(folder, config).targets == expected.targets


def test_a_rank_above_a_module_s_width_is_read(config, folder) -> None:
    """B A has rank 8 at most there, and PEFT runs it; as this package's own setting it is refused, with the reason."""
    with pytest.raises(InputError, match=r"at most 8 .*got 12"):
        LoraConfig(rank=12, alpha=1.0, target_modules=["k_proj"]).targets(config)
    change(folder, r=12, rank_pattern={}, target_modules=["k_proj"])

    def widen(tensors: dict) -> None:
        for name in list(tensors):
            if "k_proj" not in name:
                tensors.pop(name)
            elif "lora_A" in name:
                tensors[name] = np.ones((12, 16), np.float32)
            elif "lora_B" in name:
                tensors[name] = np.ones((8, 12), np.float32)

    rewrite(folder, widen)
    assert load_peft(folder, config).targets[0].ranks == (12, 12, 12)


def test_a_module_by_its_full_name_is_adapted_whatever_its_layer(config, params, tmp_path) -> None:
    """As in PEFT, where ``layers_to_transform`` is for names that end a module's."""
    modules = ["v_proj", "model.layers.2.self_attn.q_proj"]
    adapter = init(jax.random.key(0), LoraConfig(rank=2, alpha=1.0, target_modules=modules, layers=[0]), config, params)
    assert {target.module: target.ranks for target in adapter.targets} == {
        "self_attn.q_proj": (0, 0, 2),
        "self_attn.v_proj": (2, 0, 0),
    }
    save_peft(tmp_path, adapter)
    assert load_peft(tmp_path, config).targets == adapter.targets


def test_the_order_of_patterns_is_part_of_a_run() -> None:
    first = {"q_proj": 2, ".*_proj": 4}
    runs = [FinetuneConfig(rank_pattern=pattern) for pattern in (first, dict(reversed(first.items())))]
    assert json.dumps(runs[0].settings(), sort_keys=True) != json.dumps(runs[1].settings(), sort_keys=True)
