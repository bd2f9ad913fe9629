"""Regular expressions of untrusted adapter files, in Python's syntax and matched in bounded time.

`re` backtracks, so an expression such as ``(.*.*)*x`` can run practically forever. This module follows all paths at
once: a part of an expression maps a set of positions in the text to the set of positions where it may end. Constructs
that depend on the path (a reference to a group, an atomic group, a possessive repetition) are not supported. `re`
parses the expressions and matches the parts without repetitions.
"""

import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from re import _compiler, _parser  # type: ignore[attr-defined]
from typing import Any

from rora_theory.errors import InputError, shown

LIMIT = 5_000_000
"""Maximum number of matched parts per setting, which takes a few seconds. A list of 500 full names for 500 modules
needs 300 000."""

Positions = set[int]
Part = Callable[[str, Positions, "MatchBudget"], Positions]


class MatchBudget:
    """Budget of `LIMIT` matched parts, shared by the expressions of one setting.

    Args:
      where: Name of the setting in error messages.
    """

    def __init__(self, where: str) -> None:
        self.where, self.remaining = where, LIMIT

    def spend(self, parts: int) -> None:
        """Subtract matched parts from the budget.

        Raises:
          InputError: If the budget is exhausted.
        """
        self.remaining -= parts
        if self.remaining < 0:
            raise InputError(f"{self.where} takes too long to match. Use fewer or simpler regular expressions.")


class Expression:
    """A regular expression matched in bounded time.

    Args:
      pattern: Expression in the syntax of `re`.
      budget: Budget of the setting that the expression belongs to.

    Raises:
      InputError: If the pattern is not a regular expression, or contains a reference, an atomic group or a possessive
        repetition.
    """

    def __init__(self, pattern: str, budget: MatchBudget) -> None:
        self._budget, self._pattern = budget, pattern
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # syntax that a later Python may interpret differently
                tree = _parser.parse(pattern)
            # Numbers of characters that a match can have, by which `matches` excludes positions.
            self._min_width, self._max_width = tree.getwidth()
            self._match = _sequence(tree, tree.state.flags)
        except _Unsupported as error:
            raise InputError(
                f"{budget.where} {shown(pattern)} has {error}, which is not supported. Remove it."
            ) from None
        except (re.error, OverflowError) as error:
            raise InputError(f"{budget.where} {shown(pattern)} is not a regular expression: {error}") from error
        except RecursionError:
            raise self._nesting_error() from None

    def matches(self, text: str, starts: Iterable[int] = (0,)) -> bool:
        """Return whether the expression matches the text from one of the positions ``starts`` to its end.

        Raises:
          InputError: If the budget is exhausted.
        """
        self._budget.spend(1)
        end = len(text)
        # Skip positions from which the remaining text is too short or too long.
        candidates = {start for start in starts if self._min_width <= end - start <= self._max_width}
        if not candidates:
            return False
        try:
            return end in self._match(text, candidates, self._budget)
        except RecursionError:
            raise self._nesting_error() from None

    def _nesting_error(self) -> InputError:
        return InputError(f"{self._budget.where} {shown(self._pattern)} is nested too deeply. Simplify it.")


class _Unsupported(Exception):  # noqa: N818 (internal)
    """Exception for a construct that depends on the matched path; its message names the construct."""


_NAMES = {
    _parser.GROUPREF: "a reference to a group",
    _parser.GROUPREF_EXISTS: "a reference to a group",
    _parser.ATOMIC_GROUP: "an atomic group",
    _parser.POSSESSIVE_REPEAT: "a possessive repetition",
}
_REPEATS = (_parser.MAX_REPEAT, _parser.MIN_REPEAT)
_COMPOUND = (*_NAMES, *_REPEATS, _parser.BRANCH, _parser.SUBPATTERN, _parser.ASSERT, _parser.ASSERT_NOT)


def _sequence(items: Any, flags: int) -> Part:
    """Return a part that matches the items of a `_parser.SubPattern` in sequence."""
    parts: list[Part] = []
    simple_items: list[Any] = []

    # Adjacent items that match in one way only become a single part.
    def flush() -> None:
        if simple_items:
            parts.append(_simple(simple_items.copy(), flags))
            simple_items.clear()

    for item in items:
        if item[0] not in _COMPOUND:
            simple_items.append(item)
            continue
        flush()
        parts.append(_compound(item, flags))
    flush()

    # Every part maps all positions reached so far to those where it may end, so no path is followed twice.
    def match(text: str, starts: Positions, budget: MatchBudget) -> Positions:
        budget.spend(1)
        for part in parts:
            if not starts:
                break
            starts = part(text, starts, budget)
        return starts

    return match


def _simple(items: Sequence[Any], flags: int) -> Part:
    """Return a part that matches characters, classes and anchors with `re`."""
    state = _parser.State()
    state.flags = flags
    compiled = _compiler.compile(_parser.SubPattern(state, list(items)), flags)

    def match(text: str, starts: Positions, budget: MatchBudget) -> Positions:
        budget.spend(len(starts))
        return {result.end() for start in starts if (result := compiled.match(text, start))}

    return match


def _compound(item: Any, flags: int) -> Part:
    """Return a part that matches a repetition, a branch, a group or an assertion."""
    kind, value = item
    # Constructs that depend on the path, which sets of positions do not record.
    if kind in _NAMES:
        raise _Unsupported(_NAMES[kind])
    if kind in _REPEATS:
        minimum, maximum, body = value
        return _repeat(minimum, maximum, _sequence(body, flags))
    # A branch reaches the positions of all its alternatives.
    if kind is _parser.BRANCH:
        branches = [_sequence(branch, flags) for branch in value[1]]
        return lambda text, starts, budget: set().union(*(branch(text, starts, budget) for branch in branches))
    if kind is _parser.SUBPATTERN:
        _, added, removed, body = value
        return _sequence(body, (flags | added) & ~removed)
    # An assertion matches without moving on. A look-behind begins a fixed width before the position.
    direction, body = value
    min_width, max_width = body.getwidth()
    if direction < 0 and min_width != max_width:
        raise re.error("look-behind requires fixed-width pattern")
    width = 0 if direction > 0 else min_width
    return _assertion(_sequence(body, flags), width, positive=kind is _parser.ASSERT, ahead=direction > 0)


def _repeat(minimum: int, maximum: int, body: Part) -> Part:
    """Return a part that matches ``body`` from ``minimum`` to ``maximum`` times."""

    def match(text: str, starts: Positions, budget: MatchBudget) -> Positions:
        # Required repetitions; once the positions no longer change, further ones change nothing.
        for _ in range(minimum):
            following = body(text, starts, budget)
            if following == starts:
                break
            starts = following
        # Optional repetitions, from new positions only: a text of n characters has at most n + 1 positions.
        ends, new, count = set(starts), starts, minimum
        while new and count < maximum:
            new = body(text, new, budget) - ends
            ends |= new
            count += 1
        return ends

    return match


def _assertion(body: Part, width: int, *, positive: bool, ahead: bool) -> Part:
    """Return a part that keeps the positions where a look-ahead or look-behind holds.

    Args:
      body: Part to match before or after the position.
      width: Number of characters of a look-behind; 0 for a look-ahead.
      positive: Whether ``body`` must match; otherwise it must not.
      ahead: Whether the assertion is a look-ahead.
    """

    def body_matches(text: str, position: int, budget: MatchBudget) -> bool:
        if position < width:
            return False
        ends = body(text, {position - width}, budget)
        return bool(ends) if ahead else position in ends

    return lambda text, starts, budget: {start for start in starts if body_matches(text, start, budget) is positive}
