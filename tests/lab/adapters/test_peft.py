"""PEFT's files: they are written and read as in peft, and everything else is refused with one line."""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from make_adapters import CASES, PAPER, PATTERNS
from support.peft_files import change_config, change_tensors, read_config, read_tensors

from rora_theory.errors import InputError
from rora_theory.lab.adapters import (
    BottleneckConfig,
    LoraConfig,
    PrefixConfig,
    adapter_digest,
    load_peft,
    peft_config,
    rewrite_portable,
    save_peft,
)
from rora_theory.lab.adapters import peft as files
from rora_theory.lab.adapters.targets import first_matches, full_name
from rora_theory.lab.llama.hub import ModelSource
from rora_theory.scaling import scaling_factor

WRITTEN = {
    "alpha_pattern", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "init_lora_weights",
    "layers_to_transform", "lora_alpha", "lora_dropout", "peft_type", "r", "rank_pattern", "target_modules",
    "task_type", "use_dora", "use_rslora",
}  # fmt: skip


def peft_value(pattern: dict, name: str):
    """Return the value of the first pattern that matches a module, as PEFT does; None if none matches."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), None)


@pytest.fixture
def folder(golden, tmp_path) -> Path:
    """Return a copy of a folder that peft wrote, which a test may damage."""
    return Path(shutil.copytree(golden.FOLDER / "dora_rora_patterns", tmp_path / "adapter"))


@pytest.mark.parametrize("name", CASES)
def test_writes_what_peft_wrote(name: str, golden, config, tmp_path) -> None:
    """Names, shapes and bits of the tensors agree, and so do the metadata and every entry of the configuration.

    Patterns are written in resolved form, so the values that they give each tensor are compared instead of their text.
    """
    source = golden.FOLDER / name
    save_peft(tmp_path, load_peft(source, config), base_model="tiny")
    files_written = {path.name for path in tmp_path.iterdir()}
    assert files_written == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    tensors, expected = read_tensors(tmp_path), read_tensors(source)
    assert set(tensors) == set(expected)
    for key, value in expected.items():
        np.testing.assert_array_equal(tensors[key], value, strict=True)
    for path in (tmp_path, source):
        with safetensors.safe_open(path / "adapter_model.safetensors", framework="numpy") as file:
            assert file.metadata() == {"format": "pt"}
    written, original = read_config(tmp_path), read_config(source)
    assert set(written) == WRITTEN
    modules = {key.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for key in tensors}
    for pattern in ("rank_pattern", "alpha_pattern"):
        ours, theirs = written.pop(pattern), original[pattern]
        for name in modules:
            assert peft_value(ours, name) == peft_value(theirs, name)
            assert sum(peft_value({key: 1}, name) == 1 for key in ours) < 2
    assert written.pop("base_model_name_or_path") == "tiny"
    assert {key: original[key] for key in written} == written


@pytest.mark.parametrize("rule", ["lora", "rora", "rslora", 0.25])
def test_a_rule_is_written_as_peft_s_flag_or_as_other_alphas(rule, config, params, tmp_path) -> None:
    """Reading gives the same scaling. A rule without a flag in PEFT is written as LoRA with other alphas."""
    adapter = LoraConfig(
            rank=4, alpha=3.5, rule=rule, dropout=0.05, init="gaussian", target_modules="all-linear",
            rank_pattern={"layers.1.self_attn.q_proj": 2, "down_proj": 7}, alpha_pattern={"v_proj": 1.3},
        ).build(jax.random.key(0), config, params)  # fmt: skip
    save_peft(tmp_path, adapter)
    written, again = read_config(tmp_path), load_peft(tmp_path, config)
    assert written["use_rslora"] is (rule in ("rora", "rslora"))
    assert (written["lora_dropout"], written["init_lora_weights"]) == (0.05, "gaussian")
    alpha = 3.5 if isinstance(rule, str) else 4 * scaling_factor(rule, alpha=3.5, rank=4)
    assert written["lora_alpha"] == pytest.approx(alpha, rel=1e-15)
    assert [target.ranks for target in again.targets] == [target.ranks for target in adapter.targets]
    assert again.config.dropout == adapter.config.dropout
    assert again.config.init == adapter.config.init
    for name, scaling in adapter.scaling.items():
        # alpha / r^kappa against (alpha r / r^kappa) / r: a few float64 roundings, then one to float32.
        np.testing.assert_allclose(again.scaling[name], scaling, rtol=1.2e-7)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_files_are_read_as_float32(dtype, config, folder) -> None:
    exact = load_peft(folder, config)
    rounded = jax.tree.map(lambda leaf: leaf.astype(dtype), exact.params)
    tensors = {name: jnp.asarray(value) for name, value in files._peft_tensors(exact.replace(rounded)).items()}
    (folder / "adapter_model.safetensors").write_bytes(safetensors.flax.save(tensors))
    for ours, theirs in zip(jax.tree.leaves(load_peft(folder, config).params), jax.tree.leaves(rounded), strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_array_equal(ours, theirs.astype(jnp.float32))


@pytest.mark.parametrize(
    "entries",
    [
        {"target_modules": [*PAPER, "c_attn"], "layers_to_transform": [0, 1, 2, 7, -1], "init_lora_weights": None},
        {"target_modules": r".*\.(q|k|v|up|down)_proj|lm_head", "exclude_modules": "lm_.*"},
        {"rank_pattern": PATTERNS["rank_pattern"] | {"nothing": 3}, "a_later_flag": False},
    ],
)
def test_entries_for_modules_that_the_model_lacks_are_ignored(entries, config, folder) -> None:
    """As in PEFT, names, layers and patterns of other models, neutral entries and excluded targets are ignored."""
    expected = load_peft(folder, config)
    change_config(folder, **entries)
    assert load_peft(folder, config).targets == expected.targets


@pytest.mark.parametrize(
    "entries",
    [
        {"exclude_modules": r".*\.[02]\..*|.*v_proj"},
        {"exclude_modules": ["v_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    ],
)
def test_excluded_modules_and_layers_given_by_number(entries, config, folder) -> None:
    expected = load_peft(folder, config)
    change_config(folder, **entries)
    left_out = [name for name in read_tensors(folder) if "v_proj" in name or "layers.1." not in name]
    change_tensors(folder, lambda tensors: [tensors.pop(name) for name in left_out])
    adapter = load_peft(folder, config)
    assert "self_attn.v_proj" not in adapter.params
    assert [target.ranks[1] for target in adapter.targets] == [
        target.ranks[1] for target in expected.targets if target.module != "self_attn.v_proj"
    ]
    assert {target.ranks[0::2] for target in adapter.targets} == {(0, 0)}


def test_an_existing_adapter_is_replaced_completely(config, params, folder, monkeypatch) -> None:
    """A folder is refused if writing stopped between the renames; otherwise it has the new adapter."""
    new = LoraConfig(rank=2, alpha=1.0).build(jax.random.key(0), config, params)
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


def test_a_full_disk_preserves_the_existing_adapter(golden, config, folder, full_disk) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    adapter = load_peft(golden.FOLDER / "rora", config)
    full_disk()
    with pytest.raises(InputError, match="cannot write the adapter: No space left"):
        save_peft(folder, adapter)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_no_symbolic_link_is_followed(golden, config, folder, tmp_path, monkeypatch) -> None:
    """No link is followed at the file's own name or at the predictable name of the temporary file."""
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
    weights.unlink()
    weights.symlink_to(weights)
    with pytest.raises(InputError, match=r"adapter_model\.safetensors"):
        load_peft(folder, config)


def test_equal_adapters_are_equal_in_bytes(golden, config, tmp_path) -> None:
    """With the two entries in a random order, all 12 files would be equal once in 2,048 times."""
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


def test_a_file_in_place_of_the_folder_is_refused(config, params, tmp_path) -> None:
    (tmp_path / "here").write_text("")
    adapter = LoraConfig(rank=2, alpha=1.0).build(jax.random.key(0), config, params)
    with pytest.raises(InputError, match="here is a file"):
        save_peft(tmp_path / "here", adapter)
    with pytest.raises(InputError, match="inside: cannot write the adapter: Not a directory"):
        save_peft(tmp_path / "here" / "inside", adapter)


UNSUPPORTED = {
    "bias": "all", "lora_bias": True, "fan_in_fan_out": True, "use_qalora": True, "from_a_later_version": 0,
    "modules_to_save": ["lm_head"], "trainable_token_indices": [1], "layer_replication": [[0, 2]],
}  # fmt: skip
INVALID = {
    "peft_type": ("IA3", ["LORA"], None),
    "task_type": ("SEQ_CLS",),
    "init_lora_weights": ("pissa", "loftq", [[True]]),
    "r": (0, "8", 10**400),
    "lora_alpha": (None, -1, float("nan"), 10**400),
    "lora_dropout": (1.0,),
    "use_dora": (1,),
    "target_modules": (None,),
    "rank_pattern": ({"q_proj": 2.5},),
    "alpha_pattern": ({"q_proj": 0},),
    "layers_to_transform": ([7], [10**29, -1]),
    "layers_pattern": (["blocks"],),
}
REFUSED = [
    *(({key: value}, rf"\b{key} is not supported.* got ") for key, value in UNSUPPORTED.items()),
    *(
        ({key: value}, rf"\b{key} .*{re.escape(repr(value)[:4])}")
        for key, values in INVALID.items()
        for value in values
    ),
    ({"a\nkey": [1]}, r"'a\\nkey' is not supported.*\[1\]"),
    ({"alpha_pattern": {"q_proj(": 2}}, r"alpha_pattern 'q_proj\(' is not a regular expression"),
    ({"exclude_modules": "q_proj("}, r"exclude_modules 'q_proj\(' is not a regular expression"),
    ({"target_modules": ["c_attn"]}, "'c_attn', which matches no module"),
    ({"target_modules": ["embed_tokens"]}, "matches model.embed_tokens, which cannot be adapted"),
    ({"r": 9}, r"another model: .*_proj.lora_A.weight .*\[4, 16\]"),
    ({"rank_pattern": {}}, r"another model: .*layers.1.self_attn.q_proj.lora_A.weight .*\[6, 16\]"),
    ({"use_dora": False}, "unexpected tensor '.*lora_magnitude_vector'.*adapter_config.json"),
    ({"target_modules": ["q_proj", "k_proj", "up_proj", "o_proj"], "rank_pattern": {}}, "unexpected tensor "),
]


@pytest.mark.parametrize(("entries", "message"), REFUSED, ids=range(len(REFUSED)))
def test_refuses_configurations(entries, message, config, folder, time_limit) -> None:
    change_config(folder, **entries)
    with time_limit(10), pytest.raises(InputError, match=message) as error:
        load_peft(folder, config)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < len(str(folder)) + 300


NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def renamed(old: str, new: str):
    """Return a change that adds a tensor under a name with another part."""
    return lambda tensors: tensors.update({NAME.replace(old, new): tensors[NAME]})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop(NAME), f"missing tensor {NAME}"),
        (lambda t: t.update({NAME: t[NAME].T.copy()}), rf"another model: {NAME} .*\[16, 4\]"),
        (lambda t: t.update({NAME: t[NAME] * np.inf}), f"{NAME} has a value that is not finite"),
        (lambda t: t.update({NAME: t[NAME].astype(np.int32)}), rf"{NAME} .*I32"),
        (renamed("0", "40"), "layers.40.*; the model has 3 layers"),
        *((renamed("0", index), "unexpected tensor ") for index in ("00", "٣", "9" * 5000)),
        (renamed("model.layers.0.self_attn.q_proj", "lm_head"), "unexpected tensor 'base_model.model.lm_head"),
    ],
)
def test_refuses_tensors(damage, message, config, folder) -> None:
    change_tensors(folder, damage)
    with pytest.raises(InputError, match=message):
        load_peft(folder, config)


def test_an_adapter_for_a_wider_model_is_refused(config, folder) -> None:
    wider = dataclasses.replace(config, hidden_size=20)
    with pytest.raises(InputError, match=r"another model: .*q_proj.lora_A.weight .*\[4, 16\]"):
        load_peft(folder, wider)


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        *(("adapter_model.safetensors", slice(end), "damaged or truncated") for end in (0, 4, 100, -1)),
        *(
            ("adapter_config.json", content, reason)
            for content, reason in (
                (b"", "JSON"), (b"{", "JSON"), (b"[]", "list"), (b"\xff", "UTF-8"), (b"[" * 100_000, "JSON"),
            )
        ),
    ],
    ids=range(9),
)  # fmt: skip
def test_a_damaged_file_is_refused(file, damage, message, config, folder) -> None:
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[damage] if isinstance(damage, slice) else damage)
    with pytest.raises(InputError, match=rf"{re.escape(file)}.* {message}"):
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
        save_peft(folder, settings.build(jax.random.key(0), config, params))
    keys = st.sampled_from(sorted(read_config(folder)))
    change_config(folder, **data.draw(st.dictionaries(keys, values, min_size=1, max_size=2)))
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
    """The first entry that matches decides when a file is read, and again after it was written and read."""
    modules = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    names = [full_name(layer, module) for layer in range(3) for module in modules]
    ranks, alphas = (
        {key: value for key, value in pattern.items() if key in first_matches("", pattern, names).values()}
        for pattern in (ranks, alphas)
    )
    lora = LoraConfig(4, 8, rule, modules, rank_pattern=ranks, alpha_pattern=alphas)
    targets = lora.targets(config)
    written = json.loads(json.dumps(peft_config.to_peft(lora, targets, None), sort_keys=True))
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


def test_a_module_by_its_full_name_is_adapted_whatever_its_layer(config, params, tmp_path) -> None:
    """As in PEFT, ``layers_to_transform`` applies only to names that match the end of a module's name."""
    modules = ["v_proj", "model.layers.2.self_attn.q_proj"]
    adapter = LoraConfig(rank=2, alpha=1.0, target_modules=modules, layers=[0]).build(jax.random.key(0), config, params)
    assert {target.module: target.ranks for target in adapter.targets} == {
        "self_attn.q_proj": (0, 0, 2),
        "self_attn.v_proj": (2, 0, 0),
    }
    save_peft(tmp_path, adapter)
    assert load_peft(tmp_path, config).targets == adapter.targets
