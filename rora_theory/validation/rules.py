"""Lists of ranks, of steps, and of scaling rules that meet at one rank, so that runs differ in the exponent alone."""

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from rora_theory.errors import InputError, shown
from rora_theory.random.seeds import check_seed
from rora_theory.scaling import KAPPAS, Rule, alpha_for, check_integer, check_positive, check_rank, exponent

USUAL_RANKS = (8, 128)
"""Most users choose among these: exponents in the rank are told between them."""


def name_of(rule: Rule) -> str:
    """What results call a rule: its name, or its exponent.

    Examples:
      >>> name_of("rora"), name_of(0.25)
      ('rora', '0.25')
    """
    return rule if isinstance(rule, str) else f"{rule:g}"


def check_rule(option: str, rule: Rule) -> None:
    """Raise `InputError` unless ``rule`` is the name of one or a finite exponent."""
    try:
        exponent(rule)
    except InputError:
        raise InputError(
            f"{option} has {rule!r}; accepted are {', '.join(KAPPAS)} or a finite exponent such as 0.25"
        ) from None


def check_rules(rules: Sequence[Rule], option: str = "--rules") -> None:
    """Raise `InputError` unless there is a rule, and none comes twice under whatever name."""
    if not rules:
        raise InputError(f"{option} is empty; accepted is at least one rule")
    for rule in rules:
        check_rule(option, rule)
    if len({exponent(rule) for rule in rules}) != len(rules):
        words = " ".join(map(name_of, rules))
        raise InputError(f"{option} has one rule twice ({words}); accepted are different rules")


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


def check_alphas(rules: Sequence[Rule], *, gamma: float, reference_rank: int) -> None:
    """Raise `InputError` unless every rule has an alpha that gives the scaling ``gamma``, see `alpha_at`."""
    for rule in rules:
        alpha_at(rule, gamma=gamma, reference_rank=reference_rank)


def option_of(name: str) -> str:
    """What the option of a dataclass's field is called."""
    return "--" + name.replace("_", "-")


def as_words(value: object) -> str:
    """A value as a command line has it."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def listed(values: Sequence[int]) -> str:
    """Return one or more whole numbers as a sentence lists them.

    Examples:
      >>> listed([1]), listed((1, 2)), listed((1, 2, 4))
      ('1', '1 and 2', '1, 2 and 4')
    """
    *first, last = map(str, values)
    return f"{', '.join(first)} and {last}" if first else last


def check_unread(config: Any, *names: str, without: str = "", beside: str = "") -> None:
    """Raise `InputError` where an option that nothing would read is not at its default.

    Args:
      config: a dataclass.
      names: of its fields; of one that is a dataclass every option is meant.
      without: what is not given, but would have them read; or
      beside: what is given, and is read in their place.
    """
    for field in fields(config):
        if field.name in names:
            default = field.default if field.default_factory is MISSING else field.default_factory()
            for name, value in _changed(field.name, getattr(config, field.name), default):
                option = option_of(name)
                why = f"without {without}; accepted is to give {without} too, or to leave {option} out"
                if beside:
                    why = f"beside {beside}; accepted is to leave one of the two out, {option} or {beside}"
                raise InputError(f"{option} is {as_words(value)}, which nothing reads {why}")


def _changed(name: str, value: Any, default: Any) -> Iterator[tuple[str, Any]]:
    """The options of a value that are not as in its default."""
    if is_dataclass(value):
        for field in fields(value):
            yield from _changed(field.name, getattr(value, field.name), getattr(default, field.name))
    elif value != default:
        yield name, value


def check_list(option: str, values: Sequence[object], *, fewest: int = 1) -> None:
    """Raise `InputError` unless there are at least ``fewest`` values and none comes twice."""
    if len(values) < fewest:
        raise InputError(f"{option} has {len(values)} values; accepted are {fewest} or more")
    if len(set(values)) != len(values):
        raise InputError(f"{option} repeats a value ({' '.join(map(str, values))}); accepted are different ones")


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raise `InputError` unless ``value`` is one of ``choices``.

    Args:
      name: Name of the argument, for the error.
      value: Value to check.
      choices: Supported values.

    Examples:
      >>> check_choice("template", "none", ("train", "eval"))
      Traceback (most recent call last):
      rora_theory.errors.InputError: template must be one of train, eval, got 'none'
    """
    if value not in choices:
        raise InputError(f"{name} must be one of {', '.join(choices)}, got {shown(value)}")


def check_choices(option: str, values: Sequence[str], accepted: Collection[str], *, fewest: int = 1) -> None:
    """`check_list`, and raise `InputError` for a value that is not among ``accepted``."""
    check_list(option, values, fewest=fewest)
    for value in values:
        if value not in accepted:
            raise InputError(f"{option} has {value!r}; accepted are {', '.join(accepted)}")


def check_seeds(seeds: Sequence[int], *, fewest: int = 1) -> None:
    """`check_list`, and raise `InputError` for a seed out of range."""
    check_list("--seeds", seeds, fewest=fewest)
    for seed in seeds:
        check_seed(seed, "--seeds")


def check_ranks(ranks: Sequence[int], *, fewest: int = 2) -> None:
    """Raise `InputError` unless ``ranks`` has at least ``fewest`` different integers of 1 or more."""
    check_list("--ranks", ranks, fewest=fewest)
    for rank in ranks:
        try:
            check_rank(rank)
        except InputError as error:
            raise InputError(f"--ranks: {error}") from None


def check_steps(steps: Sequence[int]) -> None:
    """Raise `InputError` unless steps ascend strictly from 1 or more."""
    if not steps or steps[0] < 1 or any(a >= b for a, b in itertools.pairwise(steps)):
        raise InputError(f"steps are {' '.join(map(str, steps))}; accepted are ascending integers of 1 or more")
    check_integer("the last of the steps", steps[-1])
