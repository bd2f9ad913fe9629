"""Shapes of published models have their published sizes, and adapters the papers' share of the weights."""

import functools

import jax
import pytest
from support.shapes import SHAPES

from rora_theory.lab import adapters
from rora_theory.lab.finetune import FinetuneConfig
from rora_theory.lab.llama import abstract_params
from rora_theory.lab.llama.model import count_parameters


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-7b", 6_738_415_616),
        ("llama-13b", 13_015_864_320),
        ("llama2-7b", 6_738_415_616),
        ("llama2-70b", 68_976_648_192),
        ("llama3-8b", 8_030_261_248),
        ("sheared-llama-1.3b", 1_345_423_360),
        ("mistral-7b", 7_241_732_096),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen3-8b", 8_190_735_360),
        ("gemma3-270m", 268_098_176),
        ("smollm2-135m", 134_515_008),
    ],
)
def test_named_models_have_their_published_sizes(name, parameters):
    assert count_parameters(SHAPES[name]) == parameters


def test_the_papers_models_have_shapes() -> None:
    assert {"llama-7b", "llama-13b", "llama2-7b", "llama3-8b", "sheared-llama-1.3b"} < set(SHAPES)


@pytest.mark.parametrize(
    ("model", "method", "changes", "percent"),
    [
        # The papers' tables: LoRA on q, k, v, up and down; parallel as LLM-Adapters' protocol says.
        ("llama-7b", "lora", {}, 0.83),
        ("llama-13b", "lora", {}, 0.67),
        ("llama3-8b", "lora", {}, 0.70),
        ("llama-7b", "dora", {}, 0.84),
        ("llama-13b", "prefix", {}, 0.03),
        ("llama-7b", "parallel", {}, 3.54),
        ("llama-13b", "parallel", {}, 2.89),
        # Series as one adapter a layer, as the tables count it, and as LLM-Adapters trains it.
        ("llama-7b", "series", {"targets": ("down_proj",)}, 0.99),
        ("llama-13b", "series", {"targets": ("down_proj",)}, 0.80),
        ("llama-7b", "series", {}, 1.95),
        ("llama-13b", "series", {}, 1.59),
    ],
)
def test_adapters_have_the_papers_share_of_the_weights(model, method, changes, percent):
    base, config = abstract_params(SHAPES[model]), FinetuneConfig(method=method, **changes).adapter()
    adapter = jax.eval_shape(functools.partial(config.build, jax.random.key(0), SHAPES[model]), base)
    assert round(100 * adapters.share(adapter, base), 2) == percent
