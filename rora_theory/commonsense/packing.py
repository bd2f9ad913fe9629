r"""Items packed into rows of one shape: the shared prefix once, then each choice's own tokens, several items a row.

The choices of an item are token sequences that begin alike. Their longest common beginning is computed once,
and each choice's rest (its last token is only scored, never read) follows as a branch that sees the common
tokens and itself. A row of T slots holds as many such trees as fit, side by side:

    slots   [ a a a a | b b | c c c ][ A A A | B B ] - - -
    item      0 ..                    1 ..            none
    branch    0 0 0 0   1 1   2 2 2   0 0 0   1 1

A query sees a key of its own item, not after it, in the common part or in its own branch; positions count
along the path. Every row has the same shape, so the model compiles once a shape; nothing is padded but a
row's end. The plan depends on the items alone: any grouping of rows into device calls computes the same numbers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rora_theory.commonsense.choices import Scored

SHORTEST_ROW, STEP = 64, 16
"""Rows have a multiple of ``STEP`` slots."""
SAMPLE = 512
"""Items by which a row length is chosen; all of them where there are fewer."""
BLOCK_COST = 64
"""What a block costs beside its slots, in slots: every weight is read once more (on two CPU cores)."""


@dataclass(frozen=True)
class Tree:
    """The choices of one item, merged at their common beginning.

    Attributes:
      common: tokens that every choice reads.
      branches: the further tokens that each choice reads, possibly none.
      targets: for each choice, the scored tokens as ``(reader, token)``; reader is the place, along the
        choice's own path from 0, of the token that predicts it.
    """

    common: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]
    targets: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def size(self) -> int:
        """Slots it takes."""
        return len(self.common) + sum(map(len, self.branches))


@dataclass(frozen=True)
class Block:
    """Rows of one device call, [r, t] each, and what is read off their hidden states.

    Attributes:
      tokens, item, branch, position: [r, t] int32; item is -1 in empty slots.
      slots: [s] int32, places in the flattened rows whose next-token distribution is needed; the first
        ``used`` count, and s is r t rounded up to whole chunks.
      used: number of them.
      entries: [e, 2] int32, scored tokens as (index into ``slots``, token); the first ``len(owners)`` count.
      owners: item and choice that each entry adds to.
      items: the items whose choices are all here.
    """

    tokens: np.ndarray
    item: np.ndarray
    branch: np.ndarray
    position: np.ndarray
    slots: np.ndarray
    used: int
    entries: np.ndarray
    owners: tuple[tuple[int, int], ...]
    items: tuple[int, ...]


def grow(choices: Sequence[Scored]) -> Tree:
    """The tree of an item's choices: each of at least two tokens, the last ``count`` scored."""
    reads = [choice.tokens[:-1] for choice in choices]
    shortest = min(map(len, reads))
    depth = next((i for i in range(shortest) if len({read[i] for read in reads}) > 1), shortest)
    return Tree(
        common=tuple(reads[0][:depth]),
        branches=tuple(tuple(read[depth:]) for read in reads),
        targets=tuple(
            tuple(
                (place - 1, choice.tokens[place])
                for place in range(len(choice.tokens) - choice.count, len(choice.tokens))
            )
            for choice in choices
        ),
    )


def cut(tree: Tree, count: int) -> Tree:
    """The tree without its first ``count`` common tokens, none of which predicts a scored one."""
    targets = tuple(tuple((reader - count, token) for reader, token in choice) for choice in tree.targets)
    return Tree(tree.common[count:], tree.branches, targets)


def plan(trees: Sequence[Tree], *, block_tokens: int, chunk: int, start: int = 0) -> list[Block]:
    """Every tree in some row of some block, long ones first.

    Args:
      trees: of `grow` or `cut`.
      block_tokens: most slots of a block, a power of two; blocks have as few rows, down to half, as leave least empty.
        Rows are shorter where items are, since attention costs a row its length squared; an item above it gets a
        block of its own, its size rounded up to whole ``block_tokens``.
      chunk: slots whose vocabulary projections are computed together, a divisor of ``block_tokens``.
      start: position of every tree's first token.
    """
    order = sorted(range(len(trees)), key=lambda index: (-trees[index].size, index))
    long = [index for index in order if trees[index].size > block_tokens]
    short = order[len(long) :]
    blocks = []
    for index in long:
        row = math.ceil(trees[index].size / block_tokens) * block_tokens
        blocks.append(_block([[index]], trees, row, row, chunk, start))
    if not short:
        return blocks
    shortest = -(-max(SHORTEST_ROW, trees[short[0]].size) // STEP) * STEP
    lengths = range(shortest, min(block_tokens, 4 * shortest) + 1, STEP) or [block_tokens]
    sample = short[:: max(1, len(short) // SAMPLE)]

    def cheapest(length: int, rows: int) -> tuple[float, int]:
        """The least cost of so many rows, and how many of them a block has then."""
        most = max(1, block_tokens // length)
        # Attention costs a slot in proportion to its row's length, here a 1500th of all else.
        slot = 1.0 + length / 1500.0
        counts = range(min(rows, max(1, most // 2)), most + 1)
        return min((math.ceil(rows / count) * (count * length * slot + BLOCK_COST), count) for count in counts)

    tried = {length: len(_fill(sample, trees, length)) * len(short) / len(sample) for length in lengths}
    length = min(tried, key=lambda length: cheapest(length, math.ceil(tried[length])))
    filled = _fill(short, trees, length)
    _, count = cheapest(length, len(filled))
    return blocks + [
        _block(filled[first : first + count], trees, length, count * length, chunk, start)
        for first in range(0, len(filled), count)
    ]


def _fill(order: Sequence[int], trees: Sequence[Tree], length: int) -> list[list[int]]:
    """Rows of at most ``length`` slots and scored tokens: each tree goes to the first row with room for it."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []
    start = 0  # rows before it are full for every later, smaller tree
    for index in order:
        size, scored = trees[index].size, sum(map(len, trees[index].targets))
        for number in range(start, len(rows)):
            if size <= room[number][0] and scored <= room[number][1]:
                break
        else:
            number = len(rows)
            rows.append([])
            room.append((length, 2 * length))
        rows[number].append(index)
        room[number] = (room[number][0] - size, room[number][1] - scored)
        while start < len(rows) and room[start][0] < trees[order[-1]].size:
            start += 1
    return rows


def _block(
    rows: Sequence[Sequence[int]], trees: Sequence[Tree], length: int, total: int, chunk: int, first: int
) -> Block:
    """The arrays of ``total // length`` rows, the last ones empty where there are fewer."""
    tokens, branch, position = (np.zeros((total // length, length), np.int32) for _ in range(3))
    item = np.full(tokens.shape, -1, np.int32)
    wanted: list[tuple[int, int]] = []
    owners: list[tuple[int, int]] = []
    for row, members in enumerate(rows):
        at = 0
        for index in members:
            tree = trees[index]
            depth = len(tree.common)
            start = at
            for number, part in enumerate((tree.common, *tree.branches)):
                span = slice(at, at + len(part))
                tokens[row, span], item[row, span], branch[row, span] = part, index, number
                position[row, span] = first + np.arange(len(part)) + (depth if number else 0)
                if number:
                    for reader, token in tree.targets[number - 1]:
                        place = start + reader if reader < depth else at + reader - depth
                        wanted.append((row * length + place, token))
                        owners.append((index, number - 1))
                at += len(part)
    slots, inverse = np.unique(np.array([slot for slot, _ in wanted]), return_inverse=True)
    capacity = math.ceil(total / chunk) * chunk
    padded = np.zeros(capacity, np.int32)
    padded[: len(slots)] = slots
    entries = np.zeros((2 * total, 2), np.int32)
    entries[: len(wanted), 0] = inverse
    entries[: len(wanted), 1] = [token for _, token in wanted]
    items = tuple(index for members in rows for index in members)
    return Block(tokens, item, branch, position, padded, len(slots), entries, tuple(owners), items)
