"""Regular expressions that come with an adapter, from anyone: Python's own, matched in bounded time.

`re` follows one path after another, so that ``(.*.*)*x`` keeps it busy for ever. Here all paths are followed at once:
a part of an expression takes a set of positions in the text to the set that it may end at. What needs to know which
path was taken (a reference to a group, an atomic group, a possessive repetition) can't be asked that way and is
refused. The expression is parsed, and its parts without a repetition are matched, by `re` itself.
"""

import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from re import _compiler, _parser  # type: ignore[attr-defined]
from typing import Any

from rora_theory.errors import InputError, shown

LIMIT = 5_000_000
"""Parts matched in all for one setting: some seconds. A list of 500 full names for as many modules takes 300 000."""

Positions = set[int]
Part = Callable[[str, Positions, "Work"], Positions]


class Work:
    """What one setting of a file may cost: `LIMIT`, shared by its expressions.

    Args:
      where: names the setting in errors.
    """

    def __init__(self, where: str) -> None:
        self.where, self.left = where, LIMIT

    def spend(self, parts: int) -> None:
        """Count matched parts. Raises `InputError` beyond the limit."""
        self.left -= parts
        if self.left < 0:
            raise InputError(f"{self.where} takes too long to match; accepted are fewer or simpler expressions")


class Expression:
    """A regular expression.

    Args:
      pattern: as `re` reads it.
      work: of the setting it belongs to.

    Raises:
      InputError: not a regular expression, or one with a reference, an atomic group or a possessive repetition.
    """

    def __init__(self, pattern: str, work: Work) -> None:
        self._work, self._pattern = work, pattern
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what a later Python may read otherwise
                tree = _parser.parse(pattern)
            self._least, self._most = tree.getwidth()
            self._match = _sequence(tree, tree.state.flags)
        except _Unsupported as error:
            raise InputError(
                f"{work.where} {shown(pattern)} has {error}; accepted is a regular expression without one"
            ) from None
        except (re.error, OverflowError) as error:
            raise InputError(f"{work.where} {shown(pattern)} is not a regular expression: {error}") from error
        except RecursionError:
            raise self._deep() from None

    def matches(self, text: str, starts: Iterable[int] = (0,)) -> bool:
        """Whether the text from one of ``starts`` on to its end is matched. Raises `InputError` beyond the limit."""
        self._work.spend(1)
        end = len(text)
        fitting = {start for start in starts if self._least <= end - start <= self._most}
        if not fitting:
            return False
        try:
            return end in self._match(text, fitting, self._work)
        except RecursionError:
            raise self._deep() from None

    def _deep(self) -> InputError:
        return InputError(f"{self._work.where} {shown(self._pattern)} is nested too deeply; accepted is a simpler one")


class _Unsupported(Exception):  # noqa: N818 (never seen outside)
    """A construct that sets of positions can't follow, in words."""


_NAMES = {
    _parser.GROUPREF: "a reference to a group",
    _parser.GROUPREF_EXISTS: "a reference to a group",
    _parser.ATOMIC_GROUP: "an atomic group",
    _parser.POSSESSIVE_REPEAT: "a possessive repetition",
}
_REPEATS = (_parser.MAX_REPEAT, _parser.MIN_REPEAT)
_COMPOUND = (*_NAMES, *_REPEATS, _parser.BRANCH, _parser.SUBPATTERN, _parser.ASSERT, _parser.ASSERT_NOT)


def _sequence(items: Any, flags: int) -> Part:
    """The items of a `_parser.SubPattern`, one after the other; neighbours that match in one way only are one part."""
    parts: list[Part] = []
    plain: list[Any] = []

    def close() -> None:
        if plain:
            parts.append(_plain(plain.copy(), flags))
            plain.clear()

    for item in items:
        if item[0] not in _COMPOUND:
            plain.append(item)
            continue
        close()
        parts.append(_compound(item, flags))
    close()

    def match(text: str, starts: Positions, work: Work) -> Positions:
        work.spend(1)
        for part in parts:
            if not starts:
                break
            starts = part(text, starts, work)
        return starts

    return match


def _plain(items: Sequence[Any], flags: int) -> Part:
    """Characters, classes and anchors, by `re`."""
    state = _parser.State()
    state.flags = flags
    compiled = _compiler.compile(_parser.SubPattern(state, list(items)), flags)

    def match(text: str, starts: Positions, work: Work) -> Positions:
        work.spend(len(starts))
        return {found.end() for start in starts if (found := compiled.match(text, start))}

    return match


def _compound(item: Any, flags: int) -> Part:
    kind, value = item
    if kind in _NAMES:
        raise _Unsupported(_NAMES[kind])
    if kind in _REPEATS:
        least, most, body = value
        return _repeat(least, most, _sequence(body, flags))
    if kind is _parser.BRANCH:
        branches = [_sequence(branch, flags) for branch in value[1]]
        return lambda text, starts, work: set().union(*(branch(text, starts, work) for branch in branches))
    if kind is _parser.SUBPATTERN:
        _, added, removed, body = value
        return _sequence(body, (flags | added) & ~removed)
    direction, body = value
    least, most = body.getwidth()
    if direction < 0 and least != most:
        raise re.error("look-behind requires fixed-width pattern")
    back = 0 if direction > 0 else least
    return _assertion(_sequence(body, flags), back, holds=kind is _parser.ASSERT, ahead=direction > 0)


def _repeat(least: int, most: int, body: Part) -> Part:
    """``least`` times, then up to ``most``: each until no new position comes, which text of n characters ends by n."""

    def match(text: str, starts: Positions, work: Work) -> Positions:
        for _ in range(least):
            following = body(text, starts, work)
            if following == starts:
                break
            starts = following
        found, new, count = set(starts), starts, least
        while new and count < most:
            new = body(text, new, work) - found
            found |= new
            count += 1
        return found

    return match


def _assertion(body: Part, back: int, *, holds: bool, ahead: bool) -> Part:
    """Positions before (``ahead``) or after which ``body`` matches, ``back`` characters wide, or does not."""

    def at(text: str, position: int, work: Work) -> bool:
        if position < back:
            return False
        ends = body(text, {position - back}, work)
        return bool(ends) if ahead else position in ends

    return lambda text, starts, work: {start for start in starts if at(text, start, work) is holds}
