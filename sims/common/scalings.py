"""Scaling rules from the command line."""

from rora_theory.errors import InputError
from rora_theory.rules import check_rule, check_rules
from rora_theory.scaling import KAPPAS, Rule


def parse_rules(texts: tuple[str, ...]) -> dict[str, Rule]:
    """Rules from the command line, names or exponents kappa, by their text.

    Raises:
      InputError: none, one that is neither, or one rule twice.
    """
    rules = [parse_rule(text, "--rules") for text in texts]
    check_rules(rules)
    return dict(zip(texts, rules, strict=True))


def parse_rule(text: str, option: str) -> Rule:
    """A rule by its name or its exponent kappa. Raises `InputError` where it is neither."""
    if text in KAPPAS:
        return text  # type: ignore[return-value]
    try:
        kappa = float(text)
    except ValueError:
        kappa = float("nan")
    try:
        check_rule(option, kappa)
    except InputError as error:
        raise InputError(str(error).replace(f"has {kappa!r}", f"has {text!r}")) from None
    return kappa
