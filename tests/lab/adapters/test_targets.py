"""Modules, layers and patterns are matched as in PEFT; invalid ones are refused."""

import pytest

from rora_theory.errors import InputError
from rora_theory.lab.adapters import FullConfig, LoraConfig
from rora_theory.lab.adapters.targets import layer_text, resolve
from rora_theory.lab.llama import MODULES, LlamaConfig
from sims.tune import TuneOptions


def resolved(config: LlamaConfig, **settings):
    return resolve(config, **{"rank": 4, "alpha": 8.0, "target_modules": ["q_proj", "v_proj"]} | settings)


def ranks(config: LlamaConfig, **settings) -> dict[str, tuple[int, ...]]:
    return {target.module: target.ranks for target in resolved(config, **settings)}


def test_names_match_whole_or_after_a_dot(config) -> None:
    both = {"self_attn.q_proj": (4, 4, 4), "self_attn.v_proj": (4, 4, 4)}
    assert ranks(config) == both
    assert set(ranks(config, rank=8).values()) == {(8, 8, 8)}, "the largest rank of v_proj"
    assert ranks(config, target_modules=["self_attn.q_proj", "self_attn.v_proj"]) == both
    assert ranks(config, target_modules=["model.layers.1.self_attn.q_proj"]) == {"self_attn.q_proj": (0, 4, 0)}
    with pytest.raises(InputError, match="'_proj', which matches no module"):
        ranks(config, target_modules=["_proj"])


def test_all_linear_may_be_the_only_word_of_a_list(config) -> None:
    """A command line has lists only. PEFT reads the string alone."""
    words = ("all-linear",)
    assert tuple(ranks(config, target_modules=words)) == MODULES
    assert LoraConfig(4, 8.0, target_modules=words) == LoraConfig(4, 8.0, target_modules="all-linear")
    assert FullConfig(words).table(config) == FullConfig(MODULES).table(config)
    assert TuneOptions(parameters=1.0, targets=words).peft_entries()["target_modules"] == "all-linear"
    with pytest.raises(InputError, match="'all-linear'"):
        ranks(config, target_modules=["q_proj", "all-linear"])


def test_a_string_is_a_whole_regular_expression(config) -> None:
    assert ranks(config, target_modules=r".*\.[02]\.self_attn\.q_proj") == {"self_attn.q_proj": (4, 0, 4)}
    assert tuple(ranks(config, target_modules="All-Linear")) == MODULES
    with pytest.raises(InputError, match="'q_proj' matches no module"):
        ranks(config, target_modules="q_proj")


def test_patterns_match_from_a_dot_and_the_first_wins(config) -> None:
    pattern = {r"layers\.1\.self_attn\.q_proj": 2, "q_proj": 3}
    assert list(ranks(config, rank_pattern=pattern).values()) == [(3, 2, 3), (4, 4, 4)]
    alphas = [target.alphas for target in resolved(config, alpha_pattern={".*v_proj": 1.5})]
    assert alphas == [(8.0, 8.0, 8.0), (1.5, 1.5, 1.5)]
    # An alternative is one pattern, kept together: PEFT puts it in parentheses.
    assert set(ranks(config, rank_pattern={"q_proj|v_proj": 1}).values()) == {(1, 1, 1)}


@pytest.mark.parametrize(
    ("expression", "layers"),
    [
        (r"model(?=\.).*\.(q_proj|v_proj)", (0, 1, 2)),  # as ms-swift writes it
        (
            r"(?:.*?(?:language|model).*?(?:self_attn|mlp).*?(?:q_proj|up_proj).*?)|(?:\bmodel\.[\d]{1,}\.q)",
            (0, 1, 2),
        ),
        (r".*\.([12])\.self_attn\.q_proj", (1, 2)),
        (r"(?P<part>.*\.1\.).*q_proj(?#a comment)", (1,)),
    ],
)
def test_common_expressions(config, expression: str, layers: tuple[int, ...]) -> None:
    chosen = ranks(config, target_modules=expression)["self_attn.q_proj"]
    assert [layer for layer, rank in enumerate(chosen) if rank] == list(layers)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank_pattern": {"o_proj": 2}}, r"rank_pattern has 'o_proj', which matches no adapted module"),
        ({"rank_pattern": {"proj": 2}}, r"'proj', which matches no adapted module"),
        ({"alpha_pattern": {"q_proj": 1.0, "layers.0.self_attn.q_proj": 2.0}}, "hidden by the patterns before it"),
        ({"alpha_pattern": {"q_proj(": 1.0}}, r"alpha_pattern 'q_proj\(' is not a regular expression"),
        ({"target_modules": "(q_proj"}, r"target_modules '\(q_proj' is not a regular expression"),
        ({"target_modules": []}, "matches no module"),
        ({"target_modules": ["q_proj", "lm_head"]}, "matches lm_head, which cannot be adapted"),
        ({"target_modules": ".*"}, "matches lm_head, which cannot be adapted"),
        ({"target_modules": ["self_attn"]}, "'self_attn', which matches no module"),
        ({"layers": (3,)}, "layers .*0 to 2, got 3"),
        ({"layers": (-1,)}, "layers .*0 to 2, got -1"),
        ({"layers": ()}, r"layers \(\) has none"),
        ({"layers": (0,), "target_modules": ".*q_proj"}, "layers .*list of names, got '.*q_proj'"),
        ({"layers": (0,), "target_modules": ["layers.1.self_attn.q_proj"]}, r"layers \(0,\) has none"),
        # k and v project 16 to 8: the smaller side bounds the rank.
        (
            {"rank": 9},
            r"rank .* 8 at model.layers.0.self_attn.v_proj.*\[8, 16\] weight, got 9",
        ),
        (
            {"rank_pattern": {"layers.2.self_attn.q_proj": 17}},
            r"at most 16 at model.layers.2.self_attn.q_proj.*got 17",
        ),
        ({"rank_pattern": {"q_proj": 0}}, r"rank .*got 0"),
        ({"alpha_pattern": {"q_proj": -1.0}}, r"alpha .*got -1\.0"),
    ],
)
def test_refuses(config, settings, message) -> None:
    with pytest.raises(InputError, match=message):
        ranks(config, **settings)


def test_table_has_a_row_for_every_rank_and_alpha(config) -> None:
    pattern = {"layers.1.self_attn.q_proj": 16}
    settings = LoraConfig(4, 8, "rora", target_modules=["q_proj", "v_proj"], rank_pattern=pattern)
    assert [tuple(row) for row in settings.table(config)] == [
        ("self_attn.q_proj", "0, 2", 4, 8.0, "rora", 4.0),
        ("self_attn.q_proj", "1", 16, 8.0, "rora", 2.0),
        ("self_attn.v_proj", "0-2", 4, 8.0, "rora", 4.0),
    ]
    assert layer_text([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"


def test_a_long_list_of_names_is_resolved_in_linear_time(config, time_limit) -> None:
    many = ["q_proj"] * 50_000 + ["v_proj"] * 50_000
    with time_limit(10):
        assert ranks(config, target_modules=many) == ranks(config)
