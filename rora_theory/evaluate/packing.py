r"""Items packed into rows of one shape: what sequences begin with in common is there once, many sequences a row.

Every choice of every item is a token sequence, whose last token is only scored, never read. Together they are the
paths of one trie, and an item is the set of nodes on its choices' paths. A row of T slots holds the nodes of several
items in depth-first order, each node once, however many choices and items pass through it:

    paths    a b c    a b d e    a f
    slots    a  b  c  d  e  f  -  -
    end      6  5  3  5  5  6

A slot's descendants follow it up to its end, so a query sees a key where :math:`key \le query < end_{key}`; positions
count along the path. Every row has the same shape, so the model compiles once a shape; nothing is padded but a row's
end. The plan depends on the items alone: any grouping of rows into device calls computes the same numbers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rora_theory.evaluate.choices import Scored
from rora_theory.llama.shared_prompt import common_length

SHORTEST_ROW, STEP = 64, 8
"""Rows have a multiple of ``STEP`` slots."""
WINDOW = 256
"""Items that are put into rows together, since the time to do so grows with the square of it."""
BLOCK_COST = 64
"""What a block costs beside its slots, in slots: every weight is read once more (on two CPU cores)."""


@dataclass(frozen=True)
class Trie:
    """Token sequences merged at their common beginnings. Nodes are numbered in depth-first order.

    Attributes:
      tokens, depth: [n] int32, of each node; a root has depth 0.
      items: the nodes on the paths of each item's choices.
      targets: for each choice of each item, the scored tokens as ``(node, token)``: the node that predicts it.
    """

    tokens: np.ndarray
    depth: np.ndarray
    items: tuple[frozenset[int], ...]
    targets: tuple[tuple[tuple[tuple[int, int], ...], ...], ...]

    def scored(self, item: int) -> int:
        """Scored tokens of an item, over its choices."""
        return sum(map(len, self.targets[item]))

    def size(self, item: int) -> int:
        """Slots that an item needs in a row of its own; a slot has room for two scored tokens."""
        return max(len(self.items[item]), math.ceil(self.scored(item) / 2))


@dataclass(frozen=True)
class PackedRow:
    """Items that share a row, and the nodes on their paths."""

    items: list[int]
    nodes: set[int]


@dataclass(frozen=True)
class Block:
    """Rows of one device call, [r, t] each, and what is read off their hidden states.

    Attributes:
      tokens, end, position: [r, t] int32; an empty slot's end is behind itself.
      slots: [s] int32, places in the flattened rows whose next-token distribution is needed; the first
        ``used`` count, and s is r t rounded up to whole chunks.
      used: number of them.
      entries: [e, 2] int32, scored tokens as (index into ``slots``, token); the first ``len(owners)`` count.
      owners: item and choice that each entry adds to.
      items: the items whose choices are all here.
    """

    tokens: np.ndarray
    end: np.ndarray
    position: np.ndarray
    slots: np.ndarray
    used: int
    entries: np.ndarray
    owners: tuple[tuple[int, int], ...]
    items: tuple[int, ...]


def grow(items: Sequence[Sequence[Scored]], start: int = 0) -> Trie:
    """The trie of what all choices read.

    Args:
      items: each choice of at least two tokens, the last ``count`` scored.
      start: so many first tokens are left out, none of which predicts a scored one.
    """
    tokens: list[int] = []
    depth: list[int] = []
    nodes_of: dict[tuple[int, ...], list[int]] = {}
    before: tuple[int, ...] = ()
    nodes: list[int] = []
    for path in sorted({choice.tokens[start:-1] for item in items for choice in item}):  # which is depth first
        common = common_length(before, path)
        nodes = nodes[:common] + list(range(len(tokens), len(tokens) + len(path) - common))
        tokens += path[common:]
        depth += range(common, len(path))
        nodes_of[path] = nodes
        before = path

    def targets(choice: Scored) -> tuple[tuple[int, int], ...]:
        path = nodes_of[choice.tokens[start:-1]]
        return tuple(zip(path[-choice.count :], choice.tokens[-choice.count :], strict=True))

    return Trie(
        tokens=np.array(tokens, np.int32),
        depth=np.array(depth, np.int32),
        items=tuple(frozenset(n for choice in item for n in nodes_of[choice.tokens[start:-1]]) for item in items),
        targets=tuple(tuple(map(targets, item)) for item in items),
    )


def plan(trie: Trie, *, block_tokens: int, chunk: int, start: int = 0) -> list[Block]:
    """Every item in some row of some block.

    Args:
      trie: of `grow`.
      block_tokens: most slots of a block, a power of two; blocks have as few rows, down to half, as leave least empty.
        Rows are shorter where items are, since attention costs a row its length squared; an item above it gets a
        block of its own, its size rounded up to whole ``block_tokens``.
      chunk: slots whose vocabulary projections are computed together, a divisor of ``block_tokens``.
      start: position of the trie's roots.
    """
    sizes = list(map(trie.size, range(len(trie.items))))
    blocks = []
    short = []
    for index in sorted(range(len(sizes)), key=lambda index: (max(trie.items[index]), index)):  # neighbours begin alike
        if sizes[index] <= block_tokens:
            short.append(index)
        else:
            length = math.ceil(sizes[index] / block_tokens) * block_tokens
            blocks.append(_block([PackedRow([index], set(trie.items[index]))], 1, length, trie, chunk, start))
    if not short:
        return blocks
    shortest = -(-max(SHORTEST_ROW, *(sizes[index] for index in short)) // STEP) * STEP
    lengths = range(shortest, min(block_tokens, 4 * shortest) + 1, STEP) or [block_tokens]
    sample = short[:: math.ceil(len(short) / WINDOW)]

    def cheapest(length: int, rows: int) -> tuple[float, int]:
        """The least cost of so many rows, and how many of them a block has then."""
        most = max(1, block_tokens // length)
        # Attention costs a slot in proportion to its row's length, here a 1500th of all else.
        slot = 1.0 + length / 1500.0
        counts = range(min(rows, max(1, most // 2)), most + 1)
        return min((math.ceil(rows / count) * (count * length * slot + BLOCK_COST), count) for count in counts)

    tried = {length: len(_fill(sample, trie, length)) * len(short) / len(sample) for length in lengths}
    length = min(tried, key=lambda length: cheapest(length, math.ceil(tried[length])))
    windows = [short[first : first + WINDOW] for first in range(0, len(short), WINDOW)]
    rows = [row for window in windows for row in _fill(window, trie, length)]
    _, count = cheapest(length, len(rows))
    return blocks + [
        _block(rows[first : first + count], count, length, trie, chunk, start) for first in range(0, len(rows), count)
    ]


def _fill(items: Sequence[int], trie: Trie, length: int) -> list[PackedRow]:
    """Rows of at most ``length`` slots and twice as many scored tokens: large items first, neighbours in the trie among
    those of like size; each goes where it adds the fewest nodes, and of such rows to the fullest."""
    rows: list[PackedRow] = []
    scored: list[int] = []
    for index in sorted(items, key=lambda index: (-(len(trie.items[index]) // 16), max(trie.items[index]), index)):
        nodes, count = sorted(trie.items[index]), trie.scored(index)
        best = (length + 1, 0, len(rows))
        for number, row in enumerate(rows):
            room = length - len(row.nodes)
            if room and scored[number] + count <= 2 * length:
                added = len(nodes) - _begun(nodes, row.nodes)
                if added <= room:
                    best = min(best, (added, room, number))
        number = best[2]
        if number == len(rows):
            rows.append(PackedRow([], set()))
            scored.append(0)
        rows[number].items.append(index)
        rows[number].nodes.update(nodes)
        scored[number] += count
    return rows


def _begun(nodes: list[int], present: set[int]) -> int:
    """How many nodes are present before the first, in depth-first order, that is not; others may be."""
    for count, node in enumerate(nodes):
        if node not in present:
            return count
    return len(nodes)


def _block(rows: Sequence[PackedRow], count: int, length: int, trie: Trie, chunk: int, start: int) -> Block:
    """The arrays of ``count`` rows, the last ones empty where there are fewer."""
    tokens, position = np.zeros((count, length), np.int32), np.zeros((count, length), np.int32)
    end = np.tile(np.arange(1, length + 1, dtype=np.int32), (count, 1))
    wanted: list[tuple[int, int]] = []
    owners: list[tuple[int, int]] = []
    for number, row in enumerate(rows):
        nodes = sorted(row.nodes)
        depth = trie.depth[nodes]
        tokens[number, : len(nodes)], position[number, : len(nodes)] = trie.tokens[nodes], start + depth
        end[number, : len(nodes)] = _ends(depth.tolist())
        slot = {node: number * length + place for place, node in enumerate(nodes)}
        for index in row.items:
            for choice, targets in enumerate(trie.targets[index]):
                wanted += [(slot[node], token) for node, token in targets]
                owners += [(index, choice)] * len(targets)
    slots, inverse = np.unique(np.array([slot for slot, _ in wanted]), return_inverse=True)
    total = count * length
    padded = np.zeros(math.ceil(total / chunk) * chunk, np.int32)
    padded[: len(slots)] = slots
    entries = np.zeros((2 * total, 2), np.int32)
    entries[: len(wanted), 0] = inverse
    entries[: len(wanted), 1] = [token for _, token in wanted]
    items = tuple(index for row in rows for index in row.items)
    return Block(tokens, end, position, padded, len(slots), entries, tuple(owners), items)


def _ends(depth: list[int]) -> list[int]:
    """For nodes in depth-first order, the place behind each one's last descendant."""
    ends = [len(depth)] * len(depth)
    path: list[int] = []
    for place, level in enumerate(depth):
        for left in path[level:]:
            ends[left] = place
        path[level:] = [place]
    return ends
