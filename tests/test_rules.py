"""Lists of ranks and scaling rules: what is refused, with the option's name, and where rules meet."""

import math

import pytest

from rora_theory import InputError, rules, scaling_factor


@pytest.mark.parametrize(
    ("check", "said"),
    [
        (lambda: rules.check_rules(()), "--rules is empty"),
        (lambda: rules.check_rules(("rora", 0.5)), r"--rules has one rule twice \(rora 0.5\)"),
        (
            lambda: rules.check_rules((math.inf,)),
            "--rules has inf; accepted are lora, rora, rslora or a finite exponent",
        ),
        (lambda: rules.check_rule("--to-rule", math.nan), "--to-rule has nan"),
        (lambda: rules.check_ranks((4,)), "--ranks has 1 values; accepted are 2 or more"),
        (lambda: rules.check_ranks((4, 4)), r"--ranks repeats a value \(4 4\)"),
        (lambda: rules.check_ranks((4, 0)), "--ranks: rank is 0"),
        (lambda: rules.alpha_at("lora", gamma=0.0, reference_rank=4), "--gamma is 0.0"),
        (lambda: rules.alpha_at("lora", gamma=1.0, reference_rank=0), "--reference-rank: rank is 0"),
    ],
)
def test_what_is_refused(check, said) -> None:
    with pytest.raises(InputError, match=said):
        check()


def test_rules_meet_at_the_reference_rank() -> None:
    for rule in ("lora", "rora", 0.25):
        alpha = rules.alpha_at(rule, gamma=2.0, reference_rank=8)
        assert scaling_factor(rule, alpha=alpha, rank=8) == pytest.approx(2.0, rel=1e-15)
    rules.check_rules(("lora", "rora", 0.25))
    rules.check_ranks((1,), fewest=1)
