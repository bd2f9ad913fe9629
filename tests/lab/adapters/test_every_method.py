"""Properties that all methods share: a start at the base model, a bfloat16 base, and refused settings and files."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.peft_files import change_config
from support.peft_training import next_token_loss

from rora_theory.errors import InputError
from rora_theory.lab.adapters import (
    BottleneckConfig,
    LoraConfig,
    PrefixConfig,
    load_peft,
    save_peft,
)
from rora_theory.lab.llama import Adapter

LORA = {"rank": 4, "alpha": 3.0, "rank_pattern": {"layers.1.self_attn.q_proj": 2, "down_proj": 7}}
STARTS_AT_THE_BASE = {
    "lora": LoraConfig(**LORA),
    "dora": LoraConfig(**LORA, use_dora=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", STARTS_AT_THE_BASE)
def test_a_fresh_adapter_changes_nothing_and_learns(method, config, params, tokens, run) -> None:
    adapter = STARTS_AT_THE_BASE[method].build(jax.random.key(0), config, params)
    assert isinstance(adapter, Adapter)
    loss = jax.value_and_grad(next_token_loss(params, tokens, config, adapter), has_aux=True)
    (_, logits), gradient = jax.jit(loss)(adapter.params)
    # LoRA adds an exact zero, in another program; DoRA multiplies by |W|/|W|, one up to two sums' rounding.
    np.testing.assert_allclose(logits, run(params, tokens), rtol=0, atol=1e-5)
    for module, tensors in gradient.items():
        for name, tensor in tensors.items():
            reached = name != "lora_A"  # nothing passes through B = 0
            assert (np.asarray(tensor).reshape(3, -1).any(axis=1) == reached).all(), (module, name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [None, PrefixConfig(4), BottleneckConfig("series", 5), BottleneckConfig("parallel", 5)]
)
def test_gradients_on_a_bfloat16_base_are_float32s(settings, config, params, tokens, perturbed) -> None:
    """Logits agree with the float32 model's to bfloat16's 8 bits over three layers. None stands for DoRA."""
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    adapter = settings.build(jax.random.key(3), config, params) if settings else perturbed(**LORA, use_dora=True)
    (gradient, rounded), (expected, exact) = (
        jax.jit(jax.grad(next_token_loss(base, tokens, config, adapter), has_aux=True))(adapter.params)
        for base in (half, wide)
    )
    assert 1e-5 < np.abs(np.asarray(rounded - exact)).max() / np.abs(np.asarray(exact)).max() < 0.05
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == jnp.float32
        assert np.asarray(ours).reshape(3, -1).any(axis=1).all(), "in every layer"
        # Cosine of the two gradients: their difference is rounding, uncorrelated with either.
        a, b = np.asarray(ours, np.float64).ravel(), np.asarray(theirs, np.float64).ravel()
        assert a @ b > 0.99 * np.linalg.norm(a) * np.linalg.norm(b)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (PrefixConfig(2), "a prefix"),
        (BottleneckConfig("series", 5), "a series adapter"),
        (BottleneckConfig("parallel", 5), "a parallel adapter"),
    ],
)
def test_methods_that_change_no_weight_cannot_be_merged(settings, name, config, params) -> None:
    adapter = settings.build(jax.random.key(0), config, params)
    with pytest.raises(InputError, match=f"{name} cannot be merged"):
        adapter.merge(params)


def rows_of(table):
    """Return a row of method, field and value for each invalid value."""
    return [
        (method, field, value)
        for method, fields in table.items()
        for field, values in fields.items()
        for value in values
    ]


def name_and_value(field, value) -> str:
    """Return a pattern for a message that names the field and the value; a long value may be cut."""
    return rf"\b{field} .*{re.escape(repr(value)[:4])}"


HUGE, NAN = 10**400, float("nan")
CONFIGS = {
    "lora": lambda **changes: LoraConfig(**LORA | changes),
    "prefix": PrefixConfig,
    "series": lambda **changes: BottleneckConfig(**{"placement": "series"} | changes),
}
INVALID = {
    "lora": {"rank": (0,), "alpha": (-1.0, NAN, HUGE), "dropout": (1.0, -0.1, HUGE), "init": ("pissa",)},
    "prefix": {"virtual_tokens": (0, True, 2.0)},
    "series": {
        "placement": ("before",),
        "width": (0, True),
        "dropout": ("0.1", NAN, 1.0),
        "target_modules": ("up_proj",),
    },
}


@pytest.mark.parametrize(("method", "field", "value"), rows_of(INVALID))
@pytest.mark.usefixtures("unchecked")
def test_invalid_settings_are_refused_by_name(method, field, value) -> None:
    with pytest.raises(InputError, match=name_and_value(field, value)):
        CONFIGS[method](**{field: value})


INVALID_ENTRIES = {
    "prefix": {
        "prefix_projection": (True,), "num_virtual_tokens": (0,), "num_transformer_submodules": (2,),
        "init_weights": ("one",), "modules_to_save": (["lm_head"],), "task_type": ("SEQ_CLS",),
    },
    "series": {
        "bottleneck_size": (0,), "adapter_dropout": (NAN, 1), "bias": ("all",), "target_modules": ("up_proj",),
    },
}  # fmt: skip
OTHER_MODELS = [
    ("prefix", {"num_virtual_tokens": 6}, r"another model: prompt_embeddings .*\[5, 48\]"),
    ("prefix", {"num_layers": 4}, r"another model: num_layers .*4"),
    ("prefix", {"token_dim": 16}, r"another model: token_dim .*16"),
    ("prefix", {"peft_type": "IA3"}, "'IA3'; supported: 'LORA', 'PREFIX_TUNING', 'SERIES_ADAPTER', 'PARALLEL"),
    ("series", {"bottleneck_size": 6}, r"another model: .*adapter_down.weight .*\[5, 16\]"),
    ("series", {"peft_type": "PARALLEL_ADAPTER"}, r"another model: .*adapter_up.weight .*\[16, 5\]"),
    ("series", {"target_modules": ["c_attn"]}, "'c_attn', which matches no module"),
    ("series", {"target_modules": ["model.layers.1.mlp.up_proj"]}, "select mlp.up_proj .*got layers 1 of 3"),
    ("series", {"target_modules": ["up_proj"]}, "unexpected tensor .*gate_proj.adapter_(up|down).weight"),
    ("series", {"target_modules": ["up_proj", "gate_proj", "o_proj"]}, "missing tensor .*o_proj"),
]


REFUSED = [(method, {key: value}, name_and_value(key, value)) for method, key, value in rows_of(INVALID_ENTRIES)]


@pytest.mark.parametrize(("method", "entries", "message"), REFUSED + OTHER_MODELS)
def test_files_that_do_not_fit_are_refused(method, entries, message, config, params, tmp_path) -> None:
    settings = {"prefix": PrefixConfig(5), "series": BottleneckConfig("series", 5)}[method]
    save_peft(tmp_path, settings.build(jax.random.key(0), config, params))
    change_config(tmp_path, **entries)
    with pytest.raises(InputError, match=message) as error:
        load_peft(tmp_path, config)
    assert str(tmp_path) in str(error.value)
