"""Regular expressions in files: they match as in Python's `re`, in bounded time."""

import re
import warnings

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rora_theory.errors import InputError
from rora_theory.lab.adapters import expressions
from rora_theory.lab.adapters.expressions import Expression, MatchBudget

NAME = "model.layers.12.self_attn.q_proj"

atoms = st.sampled_from(
    ["a", "b", "A", ".", r"\.", "[ab]", "[^a]", r"\w", r"\b", r"\B", "^", "$", r"\Z", "", "(?i:a)", "(?-i:b)"]
)
looks = st.sampled_from(["(?=%s)", "(?!%s)"])
behinds = st.sampled_from(["(?<=a)", "(?<!b)", "(?<=a.)", r"(?<!\.)"])


def grow(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    repeats = st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,3}", "{2,}?", "??", "{0}"])
    return st.one_of(
        st.tuples(inner, repeats).map(lambda pair: f"(?:{pair[0]}){pair[1]}"),
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"({pair[0]}|{pair[1]})"),
        st.tuples(looks, inner).map(lambda pair: pair[0] % pair[1]),
        behinds,
    )


@pytest.mark.slow
@given(
    pattern=st.recursive(atoms, grow, max_leaves=8),
    flags=st.sampled_from(["", "(?i)", "(?s)"]),
    text=st.text("abA.\n", max_size=7),
)
@example(pattern="(?:a?){2}b", flags="", text="aab")  # the second repetition matches more than the first
@settings(max_examples=150, deadline=None, derandomize=True)
def test_agrees_with_re(pattern: str, flags: str, text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = re.fullmatch(flags + pattern, text)
    assert Expression(flags + pattern, MatchBudget("here")).matches(text) is (expected is not None)


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        (r"model(?=\.).*\.(q_proj|v_proj)", True),  # as ms-swift writes it
        (r"(?:.*?(?:language|text|model).*?(?:self_attn|mlp).*?(?:q_proj|up_proj).*?)|(?:\bmodel\.[\d]{1,}\.q)", True),
        (r".*\.(1[0-5])\..*_proj", True),
        (r".*(?<!self_attn)\.q_proj", False),
        (r"(?P<part>.*)q_proj(?#a comment)", True),
        ("q_proj", False),
    ],
)
def test_common_expressions(pattern: str, matches: bool) -> None:
    assert Expression(pattern, MatchBudget("here")).matches(NAME) is matches
    assert (re.fullmatch(pattern, NAME) is not None) is matches


ENDLESS = [
    "(.*.*)*!",
    "((.*)*)*!",
    "(([a-z._0-9])+.)+[A-Z]([a-z])+$",
    "(.|.)*!",
    ".*" * 40 + "!",
    "(?:" * 6 + ".?" + "){60}" * 6 + "!",
    "(?:" * 40 + "." + "){1,2}" * 40 + "!",
    "(?:" * 4 + "a?" + "){4000000000}" * 4 + "!",
    "(?=.*" * 30 + "!" + ")" * 30,
    r"(\w+\.?)+(?<=!)",
]


@pytest.mark.parametrize("pattern", ENDLESS, ids=range(len(ENDLESS)))
def test_catastrophic_backtracking_is_stopped(pattern: str, monkeypatch, time_limit) -> None:
    """The limit is lowered to a hundredth, so that expressions that exceed it end at once."""
    monkeypatch.setattr(expressions, "LIMIT", expressions.LIMIT // 100)
    with time_limit(20):
        try:
            assert not Expression(pattern, MatchBudget("target_modules")).matches(NAME)
        except InputError as error:
            assert "too long" in str(error)  # noqa: PT017 (either end will do)


def test_the_limit_covers_all_expressions_of_a_setting(monkeypatch) -> None:
    monkeypatch.setattr(expressions, "LIMIT", 50)
    budget = MatchBudget("rank_pattern")
    many = [Expression(f"{i}.*", budget) for i in range(60)]
    with pytest.raises(InputError, match="rank_pattern takes too long to match"):
        [expression.matches(NAME) for expression in many]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("q_proj(", r"'q_proj\(' is not a regular expression: missing \), unterminated subpattern"),
        ("a**", "is not a regular expression: multiple repeat"),
        ("a{99999999999999999999}", "is not a regular expression: the repetition number is too large"),
        ("(?<=a+)b", "is not a regular expression: look-behind requires fixed-width pattern"),
        (r"(a)\1", "has a reference to a group"),
        ("(a)?(?(1)b|c)", "has a reference to a group"),
        ("(?>a*)b", "has an atomic group"),
        ("a*+b", "has a possessive repetition"),
        ("(" * 5000 + "a" + ")" * 5000, r"'\(\(\(.*nested too deeply"),
    ],
)
def test_refuses(pattern: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        Expression(pattern, MatchBudget("target_modules"))
    assert len(str(error.value)) < 250
