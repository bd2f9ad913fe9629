r"""Packing of items into rows of equal shape, in which common prefixes of sequences appear only once.

Every choice of every item is a token sequence. Its last token is scored but never read. Together the sequences are the
paths of a trie, and an item is the set of nodes on the paths of its choices. A row of T slots holds the nodes of
several items in depth-first order. Each node appears once, however many choices and items pass through it:

    paths    a b c    a b d e    a f
    slots    a  b  c  d  e  f  -  -
    end      6  5  3  5  5  6

The descendants of a slot follow it up to its end, so a query attends to a key if :math:`key \le query < end_{key}`.
Positions count along the path. All rows have the same shape, so the model is compiled once, and only the end of a row
is padding. The plan depends on the items only: any grouping of rows into device calls computes the same numbers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rora_theory.lab.evaluate.choices import EncodedChoice
from rora_theory.lab.llama.shared_prompt import common_length

MIN_ROW_LENGTH, ROW_MULTIPLE = 64, 8
"""Minimum number of slots per row, and the number that it must be a multiple of."""
PACKING_WINDOW = 256
"""Number of items that are packed together; the packing time grows with its square."""
BLOCK_COST = 64
"""Fixed cost of a block, for reading every weight once, in units of the cost of a slot (on two CPU cores)."""


@dataclass(frozen=True)
class Trie:
    """Token sequences merged at their common prefixes, with nodes numbered in depth-first order.

    Attributes:
      tokens: Token of each node, [n] int32.
      depth: Depth of each node, [n] int32; roots have depth 0.
      items: Nodes on the paths of each item's choices.
      targets: Scored tokens of each choice of each item, as pairs of the predicting node and the token.
    """

    tokens: np.ndarray
    depth: np.ndarray
    items: tuple[frozenset[int], ...]
    targets: tuple[tuple[tuple[tuple[int, int], ...], ...], ...]

    def count_scored(self, item: int) -> int:
        """Return the number of scored tokens of an item over all its choices."""
        return sum(map(len, self.targets[item]))

    def row_size(self, item: int) -> int:
        """Return the number of slots of a row with this item alone; a row has two scored tokens per slot at most."""
        return max(len(self.items[item]), math.ceil(self.count_scored(item) / 2))


@dataclass(frozen=True)
class PackedRow:
    """Items that share a row.

    Attributes:
      items: Indices of the items.
      nodes: Nodes on the paths of the items.
    """

    items: list[int]
    nodes: set[int]


@dataclass(frozen=True)
class Block:
    """Arrays of one device call: packed rows, and the tokens to score.

    Attributes:
      tokens: Token of each slot, [r, t] int32.
      end: Slot after the last descendant of each slot, [r, t] int32; for an empty slot, the next slot.
      position: Position of each slot in its sequence, [r, t] int32.
      slots: Indices into the flattened rows of the slots that predict a scored token, [s] int32. Only the first
        ``used`` are valid; s is r t rounded up to a multiple of the chunk size.
      used: Number of valid ``slots``.
      entries: Scored tokens as pairs (index into ``slots``, token), [e, 2] int32. Only the first ``len(owners)`` are
        valid.
      owners: Item and choice of each entry.
      items: Items in the block, each with all its choices.
    """

    tokens: np.ndarray
    end: np.ndarray
    position: np.ndarray
    slots: np.ndarray
    used: int
    entries: np.ndarray
    owners: tuple[tuple[int, int], ...]
    items: tuple[int, ...]


def build_trie(items: Sequence[Sequence[EncodedChoice]], start: int = 0) -> Trie:
    """Build the trie of the tokens that all choices read.

    Args:
      items: Choices of each item, each of at least two tokens.
      start: Number of leading tokens to omit, none of which predicts a scored token.
    """
    tokens: list[int] = []
    depth: list[int] = []
    nodes_of: dict[tuple[int, ...], list[int]] = {}
    previous: tuple[int, ...] = ()
    nodes: list[int] = []
    # Sorted paths visit the trie in depth-first order. Each path keeps the nodes of the prefix that it shares with the
    # one before it, and adds nodes for its other tokens.
    for path in sorted({choice.tokens[start:-1] for item in items for choice in item}):
        common = common_length(previous, path)
        nodes = nodes[:common] + list(range(len(tokens), len(tokens) + len(path) - common))
        tokens += path[common:]
        depth += range(common, len(path))
        nodes_of[path] = nodes
        previous = path

    def path_of(choice: EncodedChoice) -> list[int]:
        return nodes_of[choice.tokens[start:-1]]

    # The node of each token predicts the next one, so the last ``count`` nodes of a path predict the scored tokens.
    def targets(choice: EncodedChoice) -> tuple[tuple[int, int], ...]:
        return tuple(zip(path_of(choice)[-choice.count :], choice.tokens[-choice.count :], strict=True))

    return Trie(
        tokens=np.array(tokens, np.int32),
        depth=np.array(depth, np.int32),
        items=tuple(frozenset().union(*map(path_of, item)) for item in items),
        targets=tuple(tuple(map(targets, item)) for item in items),
    )


def plan_blocks(trie: Trie, *, block_tokens: int, chunk: int, start: int = 0) -> list[Block]:
    """Assign every item to a row of a block.

    Rows are as short as the items allow, because the cost of attention grows with the square of a row's length. The
    number of rows per block is chosen between half the maximum and the maximum, to leave few slots empty.

    Args:
      block_tokens: Maximum number of slots per block, a power of two. An item of more slots gets a block of its own,
        with its size rounded up to a multiple of ``block_tokens``.
      chunk: Number of slots that are projected to the vocabulary together, a divisor of ``block_tokens``.
      start: Position of the trie's roots.
    """
    # Oversized items get blocks of their own. The others are sorted such that neighbours share long prefixes.
    sizes = list(map(trie.row_size, range(len(trie.items))))
    blocks: list[Block] = []
    short: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda index: (max(trie.items[index]), index)):
        if sizes[index] <= block_tokens:
            short.append(index)
        else:
            length = math.ceil(sizes[index] / block_tokens) * block_tokens
            blocks.append(_build_block([PackedRow([index], set(trie.items[index]))], 1, length, trie, chunk, start))
    if not short:
        return blocks
    # Candidate row lengths: from the largest item's size, rounded up, to four times this size.
    shortest = -(-max(MIN_ROW_LENGTH, *(sizes[index] for index in short)) // ROW_MULTIPLE) * ROW_MULTIPLE
    lengths = range(shortest, min(block_tokens, 4 * shortest) + 1, ROW_MULTIPLE) or [block_tokens]
    # Packing a sample of one window tells how many rows a length needs.
    sample = short[:: math.ceil(len(short) / PACKING_WINDOW)]

    def cheapest(length: int, rows: int) -> tuple[float, int]:
        """Return the lowest cost of computing a number of rows, and the number of rows per block that attains it."""
        # Rows per block: between half of what the block can hold and all of it.
        max_count = max(1, block_tokens // length)
        # The cost of attention per slot is proportional to the row's length: 1/1500 of all other work per slot.
        slot_cost = 1.0 + length / 1500.0
        counts = range(min(rows, max(1, max_count // 2)), max_count + 1)
        return min((math.ceil(rows / count) * (count * length * slot_cost + BLOCK_COST), count) for count in counts)

    # Choose the row length by packing a sample of the items, and extrapolating the number of rows to all items.
    row_counts = {length: len(_pack_rows(sample, trie, length)) * len(short) / len(sample) for length in lengths}
    length = min(row_counts, key=lambda length: cheapest(length, math.ceil(row_counts[length])))
    # Pack all items, a window at a time, and group the rows into blocks.
    windows = [short[first : first + PACKING_WINDOW] for first in range(0, len(short), PACKING_WINDOW)]
    rows = [row for window in windows for row in _pack_rows(window, trie, length)]
    _, count = cheapest(length, len(rows))
    return blocks + [
        _build_block(rows[first : first + count], count, length, trie, chunk, start)
        for first in range(0, len(rows), count)
    ]


def _pack_rows(items: Sequence[int], trie: Trie, length: int) -> list[PackedRow]:
    """Pack items greedily into rows of at most ``length`` slots and ``2 * length`` scored tokens."""
    rows: list[PackedRow] = []
    scored: list[int] = []
    # Large items first; items of similar size in the order of the trie, so that neighbours share prefixes.
    for index in sorted(items, key=lambda index: (-(len(trie.items[index]) // 16), max(trie.items[index]), index)):
        nodes, count = sorted(trie.items[index]), trie.count_scored(index)
        # Best row so far: fewest added nodes, then least room. The default is a new row.
        best = (length + 1, 0, len(rows))
        for number, row in enumerate(rows):
            room = length - len(row.nodes)
            if room and scored[number] + count <= 2 * length:
                added = len(nodes) - _shared_count(nodes, row.nodes)
                if added <= room:
                    best = min(best, (added, room, number))
        # Add the item to that row; nodes that the row has already cost nothing.
        number = best[2]
        if number == len(rows):
            rows.append(PackedRow([], set()))
            scored.append(0)
        rows[number].items.append(index)
        rows[number].nodes.update(nodes)
        scored[number] += count
    return rows


def _shared_count(nodes: list[int], present: set[int]) -> int:
    """Return the number of leading nodes, in depth-first order, that are all present: a lower bound of shared nodes."""
    for count, node in enumerate(nodes):
        if node not in present:
            return count
    return len(nodes)


def _build_block(rows: Sequence[PackedRow], count: int, length: int, trie: Trie, chunk: int, start: int) -> Block:
    """Build the arrays of a block of ``count`` rows, adding empty rows if there are fewer."""
    tokens, position = np.zeros((count, length), np.int32), np.zeros((count, length), np.int32)
    # An empty slot is visible to itself only.
    end = np.tile(np.arange(1, length + 1, dtype=np.int32), (count, 1))
    scored: list[tuple[int, int]] = []
    owners: list[tuple[int, int]] = []
    for number, row in enumerate(rows):
        # Fill the row with its nodes in depth-first order.
        nodes = sorted(row.nodes)
        depth = trie.depth[nodes]
        tokens[number, : len(nodes)], position[number, : len(nodes)] = trie.tokens[nodes], start + depth
        end[number, : len(nodes)] = _ends(depth.tolist())
        # Collect the scored tokens with the slots that predict them.
        slot = {node: number * length + slot_index for slot_index, node in enumerate(nodes)}
        for index in row.items:
            for choice, targets in enumerate(trie.targets[index]):
                scored += [(slot[node], token) for node, token in targets]
                owners += [(index, choice)] * len(targets)
    # A slot may predict several tokens: list it once. Pad to shapes that all blocks of this size share.
    slots, inverse = np.unique(np.array([slot for slot, _ in scored]), return_inverse=True)
    total = count * length
    padded = np.zeros(math.ceil(total / chunk) * chunk, np.int32)
    padded[: len(slots)] = slots
    entries = np.zeros((2 * total, 2), np.int32)
    entries[: len(scored), 0] = inverse
    entries[: len(scored), 1] = [token for _, token in scored]
    items = tuple(index for row in rows for index in row.items)
    return Block(tokens, end, position, padded, len(slots), entries, tuple(owners), items)


def _ends(depth: list[int]) -> list[int]:
    """Return the slot after the last descendant of each node, for nodes in depth-first order."""
    ends = [len(depth)] * len(depth)
    # Slots on the path from the root to the present node. A node of depth d ends the subtrees of all nodes on the path
    # with depth d or more.
    path: list[int] = []
    for slot, level in enumerate(depth):
        for ended in path[level:]:
            ends[ended] = slot
        path[level:] = [slot]
    return ends
