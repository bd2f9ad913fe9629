"""Generation against transformers' (`tests/golden/make_generation.py`)."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import make_generation
import pytest

from rora_theory.errors import InputError
from rora_theory.lab.llama import generate
from rora_theory.lab.llama.config import LlamaConfig
from rora_theory.lab.llama.model import Params, forward, linear
from rora_theory.lab.llama.weights import build_params

GOLDEN = Path(__file__).parents[2] / "golden"
CASES = json.loads((GOLDEN / "generation.json").read_text())
GREEDY = {"num_beams": 1}


def model(name: str, seed: int) -> tuple[Params, LlamaConfig]:
    def read(names, out):
        for i, tensor_name in enumerate(names):
            out[i] = make_generation.draw(tensor_name, out[i].shape, seed)

    config = LlamaConfig.from_hf(make_generation.MODELS[name])
    return build_params(config, jnp.float32, read), config


def generate_case(case: dict, prompts: list[list[int]], **more) -> list[list[int]]:
    params, config = model(case["model"], case["seed"])
    settings = {"eos_ids": case["eos"], **(case["settings"] or GREEDY), **more}
    return generate.beam_search(params, config, prompts, max_new_tokens=make_generation.NEW_TOKENS, **settings)


def _groups() -> dict[str, list[dict]]:
    groups: dict[str, list[dict]] = {}
    for case in CASES:
        settings = ",".join(f"{key}={value}" for key, value in case["settings"].items())
        groups.setdefault(f"{case['model']}-{settings or 'greedy'}-{len(case['eos'])}_ends", []).append(case)
    return groups


@pytest.mark.slow
@pytest.mark.parametrize("group", _groups())
def test_equals_transformers(group: str):
    for case in _groups()[group]:
        assert generate_case(case, make_generation.prompts(case["model"], case["seed"])) == case["new"], case["seed"]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, make_generation.BEAM])
def test_a_result_depends_neither_on_other_prompts_nor_on_padding(settings: dict):
    case = next(c for c in CASES if c["settings"] == settings and c["model"] == "grouped")
    prompts = make_generation.prompts("grouped", case["seed"])
    assert generate_case(case, prompts, pad_id=5) == case["new"]
    assert generate_case(case, prompts[::-1]) == case["new"][::-1]
    assert generate_case(case, prompts[1:2]) == case["new"][1:2]  # other buckets, here and in the next line
    long = [[3] * 33, *prompts]
    assert generate_case(case, long)[1:] == case["new"]


class Spy:
    """Adapter that doubles one module's output, adds a prefix, and counts the calls of the model."""

    runs = 0

    def layers(self):
        return {"k": jnp.ones((2, 3, 2, 8)), "v": jnp.full((2, 3, 2, 8), 0.5)}

    def linear(self, name, x, weight, bias, layer, *, key):
        assert key is None
        assert layer["k"].shape == (3, 2, 8)
        if name == "self_attn.q_proj":
            jax.debug.callback(Spy.count)
        y = linear(x, weight, bias)
        return y * 2.0 if name == "mlp.up_proj" else y

    def prefix(self, layer):
        return layer["k"], layer["v"]

    @staticmethod
    def count():
        Spy.runs += 1


jax.tree_util.register_pytree_node(Spy, lambda _: ((), None), lambda *_: Spy())


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, make_generation.BEAM])
@pytest.mark.parametrize(("shared", "more"), [(1, {}), (20, {}), (20, {"adapter": Spy()})])
def test_a_shared_prefix_is_read_once(settings: dict, shared: int, more: dict):
    """The texts are the same, also with an adapter's prefix, and differ after another beginning."""
    case = next(c for c in CASES if c["settings"] == settings and c["model"] == "grouped")
    begins = [[1 + (7 * i + start) % 30 for i in range(20)] for start in (0, 3)]
    rests = make_generation.prompts("grouped", case["seed"])
    texts, other_texts = ([begin + rest for rest in rests] for begin in begins)
    expected = generate_case(case, texts, **more)
    assert generate_case(case, texts, shared=shared, **more) == expected
    assert generate_case(case, other_texts, shared=shared, **more) != expected


@pytest.mark.slow
def test_one_compilation_a_shape_bucket():
    program = generate._run_beam_search
    params, config = model("grouped", 0)

    def call(lengths: list[int], max_new_tokens: int = make_generation.NEW_TOKENS, **settings) -> None:
        prompts = [[1 + i % 30 for i in range(length)] for length in lengths]
        generate.beam_search(params, config, prompts, max_new_tokens=max_new_tokens, eos_ids=[2], **settings)

    call([20, 17, 3, 3, 3])
    before = program._cache_size()
    call([32, 1, 2, 3, 4, 5])
    call([18] * 5, pad_id=9)
    assert program._cache_size() == before
    call([20], max_new_tokens=3)
    call([17], max_new_tokens=3)
    assert program._cache_size() == before + 1


def test_buckets_waste_little_and_are_few():
    lengths = range(1, 2049)
    padded = [generate.length_bucket(n) for n in lengths]
    assert all(n <= p for n, p in zip(lengths, padded, strict=True))
    assert all(p < n + max(16, n / 4) for n, p in zip(lengths, padded, strict=True))
    assert len(set(padded)) == 8 + 4 * 4  # multiples of 16 up to 128, then four a doubling
    sizes = [generate.batch_bucket(n) for n in range(1, 65)]
    assert all(n <= p <= 1.5 * n for n, p in enumerate(sizes, 1))
    assert sorted(set(sizes)) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]


@pytest.mark.slow
def test_the_adapter_is_used_and_the_loop_ends_early():
    """With one beam the search follows the argmax of the adapted forward pass, here up to the second token."""
    params, config = model("grouped", 0)
    prompt = [4, 9, 17, 3]
    adapted = jax.jit(lambda tokens: forward(params, tokens, config, Spy()))
    new: list[int] = []
    for _ in range(2):
        tokens = jnp.array([(prompt + new + [0] * 8)[:8]])
        new.append(int(jnp.argmax(adapted(tokens)[0, len(prompt + new) - 1])))
    search = partial(generate.beam_search, params, config, [prompt], max_new_tokens=50, eos_ids=new[1:], **GREEDY)
    Spy.runs = 0
    generated = search(adapter=Spy())
    jax.effects_barrier()
    assert generated == [new]
    assert new[0] != new[1]
    assert Spy.runs == 2 * config.num_hidden_layers  # the prompt, then one token
    assert generated != search()


BAD = [
    ({"prompts": []}, "prompts .*none"),
    ({"prompts": [[1], []]}, "prompt 1 .* 1 to 125 .* 0$"),
    ({"prompts": [[1] * 126]}, "prompt 0 .* 1 to 125 .* 126$"),
    ({"prompts": [[1, 40]]}, "prompt 0 .*integers from 0 to 39.* 40$"),
    ({"prompts": [[1], [-1]]}, "prompt 1 .* -1$"),
    ({"max_new_tokens": 0}, "max_new_tokens .* 0$"),
    ({"max_new_tokens": True}, "max_new_tokens .* True"),
    ({"max_new_tokens": 128}, "prompt 0 .* 1 to 0 .*max_new_tokens"),
    ({"eos_ids": [40]}, "eos_ids .* 40$"),
    ({"pad_id": 40}, "pad_id .* 40$"),
    ({"shared": 1}, "shared .* 0 to 0 .* 1$"),
    ({"prompts": [[1, 2, 3], [1, 3, 3]], "shared": 2}, "shared .* 2; prompt 1 .* prompt 0"),
    ({"num_beams": 0}, "num_beams .* 0$"),
    ({"num_beams": True}, "num_beams .* True"),
    ({"num_beams": 21}, "num_beams .* 40 .* 21 beams and 1 end tokens make 42"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input_is_refused(change: dict, message: str):
    params, config = model("grouped", 0)
    settings = {"prompts": [[1]], "max_new_tokens": 3, "eos_ids": [2]} | change
    with pytest.raises(InputError, match=message):
        generate.beam_search(params, config, **settings)
