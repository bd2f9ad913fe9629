"""Lists of ranks and scaling rules: invalid ones are refused with the name of the argument."""

import math
from dataclasses import dataclass

import pytest

from rora_theory import InputError, scaling, scaling_factor
from rora_theory.validation import rules


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: rules.check_rules(()), "rules .*, got none"),
        (lambda: rules.check_rules(("rora", 0.5)), r"rules .*, got one rule twice: rora 0.5"),
        (lambda: rules.check_rules((math.inf,)), "rules .*, got inf"),
        (lambda: scaling.exponent(math.nan, "to_rule"), r"to_rule .*, got nan"),
        (lambda: rules.check_list("ranks", (4,), fewest=2), "ranks .*, got 1"),
        (lambda: rules.check_list("ranks", (4, 4)), r"ranks .*, got 4 4"),
        (lambda: rules.check_list("ranks", (4, 0), scaling.check_integer), "^ranks .*, got 0"),
        (lambda: rules.check_warmup(4, 4), "warmup .* 4, got 4"),
        (lambda: rules.alpha_at("lora", gamma=0.0, reference_rank=4), "gamma .*, got 0.0"),
        (lambda: rules.alpha_at("lora", gamma=1.0, reference_rank=0), "reference_rank .*, got 0"),
    ],
)
def test_invalid_values_are_refused(check, message) -> None:
    with pytest.raises(InputError, match=message):
        check()


@dataclass(frozen=True)
class Options:
    check: str | None = None
    batch_size: int = 4


def test_an_option_without_effect_is_named_with_two_remedies() -> None:
    config = Options(batch_size=8)
    for condition, advice in (
        ({"requires": "check"}, r"without check\. Add check or remove batch_size\."),
        ({"conflicts_with": "all"}, r"with all\. Remove batch_size or all\."),
    ):
        with pytest.raises(InputError, match=f"^batch_size 8 has no effect {advice}$"):
            rules.check_unread(config, "check", "batch_size", **condition)
    rules.check_unread(Options(check="given"), "batch_size", requires="check")


def test_rules_meet_at_the_reference_rank() -> None:
    for rule in ("lora", "rora", 0.25):
        alpha = rules.alpha_at(rule, gamma=2.0, reference_rank=8)
        assert scaling_factor(rule, alpha=alpha, rank=8) == pytest.approx(2.0, rel=1e-15)
    rules.check_rules(("lora", "rora", 0.25))
    rules.check_list("ranks", (1,), scaling.check_integer)
