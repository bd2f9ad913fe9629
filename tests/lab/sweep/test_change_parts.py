"""The two parts of a trained adapter's change against explicit weights, at the inputs of the records."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny

from rora_theory.errors import InputError
from rora_theory.lab import llama
from rora_theory.lab.adapters import LoraAdapter, LoraConfig
from rora_theory.lab.data.batches import Examples
from rora_theory.lab.sweep import change_parts

CONFIG = tiny.CONFIG
PARAMS = tiny.params()


def examples(rows: list[list[int]]) -> Examples:
    tokens, offsets = np.concatenate(rows), np.cumsum([0, *map(len, rows)])
    return Examples(tokens, offsets, np.ones(len(tokens), bool), truncated=0, skipped=0)


def randomised(seed: int, adapter: LoraAdapter) -> LoraAdapter:
    """Return the adapter with every entry drawn anew."""
    random = np.random.default_rng(seed)
    return adapter.replace(jax.tree.map(lambda a: random.normal(size=a.shape).astype(np.float32), adapter.params))


@pytest.fixture(scope="module")
def start() -> LoraAdapter:
    config = LoraConfig(3, 6, rule="lora", target_modules=("q_proj", "down_proj"), layers=(1,))
    return randomised(1, config.build(jax.random.key(1), CONFIG, PARAMS))


@pytest.fixture(scope="module")
def inputs(start) -> dict[str, np.ndarray]:
    random = np.random.default_rng(2)
    layers = CONFIG.num_hidden_layers
    return {name: random.normal(size=(layers, 11, CONFIG.module_shape(name)[1])) for name in start.params}


def test_parts_are_those_of_the_whole_products(start, inputs) -> None:
    """A sink, with an input a hundred times the others', is left out; a layer without an adapter has no row."""
    trained = randomised(3, start)
    with_sink = {name: np.concatenate([x, 100 * x[:, :1]], axis=1) for name, x in inputs.items()}
    measured = change_parts.compute_part_rms(start, trained, with_sink)
    assert measured[["layer", "module"]].to_numpy().tolist() == [[1, "self_attn.q_proj"], [1, "mlp.down_proj"]]
    for row in measured.to_dict("records"):
        first, last = (adapter.params[row["module"]] for adapter in (start, trained))
        B, x = last["lora_B"][1], inputs[row["module"]][1]
        for part, A in (
            ("B_part", first["lora_A"][1]),
            ("A_part", last["lora_A"][1] - first["lora_A"][1]),
            ("whole", last["lora_A"][1]),
        ):
            change = 2.0 * x @ (B.astype(np.float64) @ A).T  # gamma = 6 / 3
            assert row[part] == pytest.approx(np.sqrt(np.mean(change**2)), rel=1e-5), part


def test_inputs_are_those_of_the_records_own_tokens(start) -> None:
    """Inputs are the base model's behind the common beginning of all records; the last token is only predicted."""
    rows = [[5, 6, 7, 8, 9, 1], [5, 6, 3, 8], [5, 6, 3, 2, 4]]
    _, expected = llama.hidden_states(PARAMS, jnp.array([rows[0][:-1]]), CONFIG, capture=("mlp.down_proj",))
    x = change_parts.module_inputs(PARAMS, CONFIG, examples(rows), start)["mlp.down_proj"]
    assert x.shape[1] == 3 + 1 + 2
    np.testing.assert_allclose(x[:, :3], expected["mlp.down_proj"][:, 0, 2:], rtol=2e-5, atol=1e-6)
    x = change_parts.module_inputs(PARAMS, CONFIG, examples(rows), start, records=2)["mlp.down_proj"]
    assert x.shape[1] == 3 + 1
    x = change_parts.module_inputs(PARAMS, CONFIG, examples(rows[:1]), start)["mlp.down_proj"]
    assert x.shape[1] == 5, "a single record shares its beginning with no other"
    two_share = [[5, 6, 7, 0], [5, 6, 8, 0], [5, 9, 1, 0]]
    x = change_parts.module_inputs(PARAMS, CONFIG, examples(two_share), start)["mlp.down_proj"]
    assert x.shape[1] == 2 + 2 + 2, "the third differs from what two of them share"


def test_bad_input(start, inputs) -> None:
    with pytest.raises(InputError, match=r"examples .* 2 "):
        change_parts.module_inputs(PARAMS, CONFIG, examples([[5, 6, 7]] * 2), start)
    with pytest.raises(InputError, match=r"use_dora .* true"):
        change_parts.compute_part_rms(start, replace(start, config=replace(start.config, use_dora=True)), inputs)
