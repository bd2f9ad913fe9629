"""Scaling rules that meet at one rank, so that their runs differ in the exponent alone."""

from rora_theory.errors import InputError
from rora_theory.scaling import KAPPAS, Rule, alpha_for, check_positive, check_rank, exponent


def parse_rules(texts: tuple[str, ...]) -> dict[str, Rule]:
    """Rules from the command line, names or exponents kappa, by their text.

    Raises:
      InputError: none, one that is neither, or one rule twice.
    """
    if not texts:
        raise InputError("--rules is empty; accepted is at least one rule")
    rules = {text: parse_rule(text, "--rules") for text in texts}
    if len({exponent(rule) for rule in rules.values()}) != len(texts):
        raise InputError(f"--rules has one rule twice ({' '.join(texts)}); accepted are different rules")
    return rules


def parse_rule(text: str, option: str) -> Rule:
    """A rule by its name or its exponent kappa. Raises `InputError` where it is neither."""
    if text in KAPPAS:
        return text  # type: ignore[return-value]
    try:
        kappa = float(text)
        exponent(kappa)
    except ValueError:
        raise InputError(
            f"{option} has {text!r}; accepted are {', '.join(KAPPAS)} or a finite exponent such as 0.25"
        ) from None
    return kappa


def alpha_at(rule: Rule, *, gamma: float, reference_rank: int) -> float:
    """The alpha with which ``rule`` gives the scaling ``gamma`` at ``reference_rank``.

    Raises:
      InputError: a gamma or rank out of range.
    """
    check_positive("--gamma", gamma)
    try:
        check_rank(reference_rank)
    except InputError as error:
        raise InputError(f"--reference-rank: {error}") from None
    return alpha_for(rule, scaling=gamma, rank=reference_rank)


def check_list(option: str, values: tuple[object, ...], *, fewest: int = 1) -> None:
    """Raise `InputError` unless there are at least ``fewest`` values and none comes twice."""
    if len(values) < fewest:
        raise InputError(f"--{option} has {len(values)} values; accepted are {fewest} or more")
    if len(set(values)) != len(values):
        raise InputError(f"--{option} repeats a value ({' '.join(map(str, values))}); accepted are different ones")


def check_ranks(ranks: tuple[int, ...], *, fewest: int = 2) -> None:
    """Raise `InputError` unless ``ranks`` has at least ``fewest`` different integers of 1 or more."""
    check_list("ranks", ranks, fewest=fewest)
    for rank in ranks:
        try:
            check_rank(rank)
        except InputError as error:
            raise InputError(f"--ranks: {error}") from None
