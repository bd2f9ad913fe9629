"""Packed log-likelihoods against plain forward passes, choice by choice."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.harness import plain_log_likelihoods
from support.tiny import WIDE, WINDOWED

from rora_theory.lab.adapters import PrefixAdapter, PrefixConfig
from rora_theory.lab.evaluate.choices import EncodedChoice
from rora_theory.lab.evaluate.likelihood import log_likelihoods, visible
from rora_theory.lab.evaluate.packing import build_trie, plan_blocks
from rora_theory.lab.llama.config import LlamaConfig
from rora_theory.lab.llama.model import init_params
from rora_theory.lab.llama.shared_prompt import shared_length

# Ten times the usual spread: what a token attends to then changes scores by much more than rounding.
PARAMS = jax.tree.map(lambda leaf: 10 * leaf if leaf.ndim > 1 else leaf, init_params(jax.random.key(0), WIDE))
SHAPE = (64, 16)


def _items(seed: int, count: int) -> list[list[EncodedChoice]]:
    """Return items of 2-4 choices: mostly shared contexts, also one-token and equal choices, and long ones."""
    rng = np.random.default_rng(seed)

    def some(least: int, most: int) -> tuple[int, ...]:
        return tuple(rng.integers(0, WIDE.vocab_size, rng.integers(least, most + 1)).tolist())

    items = []
    for number in range(count):
        context, kind = some(1, 20), number % 5
        choices = [some(1, 1 if kind == 0 else 6) for _ in range(rng.integers(2, 5))]
        if kind == 1:
            choices[-1] = choices[0]
        contexts = [some(1, 9) if kind == 2 else context for _ in choices]
        if kind == 3:
            contexts = [context + some(2, 2) for _ in choices]  # winogrande: differing contexts, equal ends
            choices = [choices[0]] * len(choices)
        items.append([EncodedChoice(c + y, len(y)) for c, y in zip(contexts, choices, strict=True)])
    long = some(70, 70)
    return [*items, [EncodedChoice(long + some(3, 3), 3), EncodedChoice(long + some(4, 4), 4)]]


def _check(
    items: Sequence[Sequence[EncodedChoice]],
    *,
    params: dict = PARAMS,
    config: LlamaConfig = WIDE,
    adapter: PrefixAdapter | None = None,
) -> None:
    """Compare packed scores with plain ones. Sums of six float32 terms of order 10 agree to about 1e-5."""
    packed = dict(log_likelihoods(params, config, items, shape=SHAPE, adapter=adapter))
    plain = plain_log_likelihoods(params, config, list(itertools.chain(*items)), length=96, adapter=adapter)
    scores = itertools.chain(*(packed[index] for index in range(len(items))))
    np.testing.assert_allclose(list(scores), plain, rtol=0, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shared_count", "config", "prefix", "params"),
    [
        (0, WIDE, False, PARAMS),
        (0, WINDOWED, True, PARAMS),
        (16, WINDOWED, False, {**PARAMS, "lm_head": 2.0 * PARAMS["embed_tokens"]}),
        (40, WIDE, True, PARAMS),
        (40, WINDOWED, True, PARAMS),
    ],
)
def test_equal_to_plain_forward_passes(shared_count, config, prefix, params, prompts_read) -> None:
    """Of 40 tokens that all items share, 32 are read once, also with a trained prefix before them, and in a window."""
    shared = tuple(np.random.default_rng(5).integers(0, WIDE.vocab_size, shared_count).tolist())
    items = [
        [EncodedChoice(shared + choice.tokens[: 96 - shared_count], choice.count) for choice in item]
        for item in _items(4, 12)[: -1 if shared_count else None]
    ]
    adapter = PrefixConfig(3).build(jax.random.key(1), config, params) if prefix else None
    _check(items, params=params, config=config, adapter=adapter)
    assert prompts_read == ([shared_count // 16 * 16] if shared_count else [])


@pytest.mark.parametrize(
    ("items", "read"),
    [
        # Items of 34 tokens, two scored: 32 are context, the last of which predicts, so that 16 are read once.
        ([[EncodedChoice(tuple(range(34)), 2), EncodedChoice((*range(32), 60, 59), 2)]] * 2, [16]),
        # 16 choices of 9 scored tokens on 9 slots, more than two a slot: the row is as long as they need.
        ([[EncodedChoice(tuple(range(10)), 9)] * 16, [EncodedChoice((5, 4, 3), 1)]], []),
    ],
    ids=["a token that predicts is no beginning", "many equal choices"],
)
def test_edges_of_packing(items, read, prompts_read) -> None:
    _check(items)
    assert prompts_read == read


@pytest.mark.parametrize(
    ("sequences", "spare", "count"),
    [
        ([range(40), [*range(35), 99]], 0, 32),
        ([range(40), range(17), range(90)], 0, 16),
        ([range(32)] * 3, 0, 32),
        ([range(32)] * 3, 1, 16),
        ([range(40), [1, *range(40)]], 0, 0),
        ([[]], 1, 0),
    ],
)
def test_shared_length(sequences, spare, count) -> None:
    assert shared_length([list(sequence) for sequence in sequences], spare) == count


def test_results_are_bitwise_independent_of_batch_size_and_finished_items() -> None:
    """One compiled program gives the same bits for equal inputs, and equal choices score equally."""
    items = _items(1, 30)
    whole, again = (dict(log_likelihoods(PARAMS, WIDE, items, shape=SHAPE, batch_size=size)) for size in (1, 3))
    assert again == whole
    done = set(range(0, len(items), 2))
    rest = dict(log_likelihoods(PARAMS, WIDE, items, shape=SHAPE, done=done, batch_size=2))
    assert rest == {index: whole[index] for index in range(len(items)) if index not in done}
    for index in range(1, 30, 5):  # whose last choice is the first
        assert whole[index][0] == whole[index][-1]


def test_trie_of_choices() -> None:
    """The last token of each choice is scored, not read."""
    trie = build_trie(
        [
            [EncodedChoice((1, 2, 3, 4, 5), 3), EncodedChoice((1, 2, 3, 6), 2)],
            [EncodedChoice((1, 2, 7, 8), 1), EncodedChoice((1, 2), 1)],
        ]
    )
    assert trie.tokens.tolist() == [1, 2, 3, 4, 7]
    assert trie.depth.tolist() == [0, 1, 2, 3, 2]
    assert trie.items == ({0, 1, 2, 3}, {0, 1, 4})
    assert trie.targets == ((((1, 3), (2, 4), (3, 5)), ((1, 3), (2, 6))), (((4, 8),), ((0, 2),)))


def test_trie_without_a_shared_beginning() -> None:
    """Depths count from the end of the shared beginning."""
    trie = build_trie([[EncodedChoice((1, 2, 3, 4, 5), 2), EncodedChoice((1, 2, 3, 6), 1)]], start=2)
    assert (trie.tokens.tolist(), trie.depth.tolist()) == ([3, 4], [0, 1])
    assert trie.targets == ((((0, 4), (1, 5)), ((0, 6),)),)


def test_a_row_is_in_depth_first_order_and_sees_its_paths() -> None:
    """Two items begin alike and one does not: 1 2 (3 4 | 5), 1 6, 7; the rest of the row stays empty."""
    items = [
        [EncodedChoice((1, 2, 3, 4, 0), 1), EncodedChoice((1, 2, 5, 0), 1)],
        [EncodedChoice((7, 0), 1)],
        [EncodedChoice((1, 6, 0), 2)],
    ]
    (block,) = plan_blocks(build_trie(items), block_tokens=64, chunk=16)
    (seen_by,) = visible(jnp.asarray(block.end))
    assert block.tokens[0, :9].tolist() == [1, 2, 3, 4, 5, 6, 7, 0, 0]
    assert block.position[0, :9].tolist() == [0, 1, 2, 3, 2, 1, 0, 0, 0]
    seen = [
        "1........",
        "11.......",
        "111......",
        "1111.....",
        "11..1....",
        "1....1...",
        "......1..",
        ".......1.",
        "........1",
    ]  # fmt: skip
    visible_slots = ["".join(".1"[int(cell)] for cell in row) for row in seen_by[:9, :9]]
    assert visible_slots == seen
    assert not seen_by[:7, 9:].any()


@pytest.mark.parametrize("count", [1, 7, 60, 600])
def test_plan_holds_every_item_once_in_few_shapes(count: int) -> None:
    trie = build_trie(_items(2, count))
    blocks = plan_blocks(trie, block_tokens=64, chunk=16)
    assert sorted(itertools.chain.from_iterable(block.items for block in blocks)) == list(range(count + 1))
    assert {block.tokens.shape for block in blocks} <= {(1, 64), (1, 128)}
    for block in blocks:
        nodes = frozenset().union(*(trie.items[index] for index in block.items))
        assert np.count_nonzero(block.tokens) <= len(nodes) <= block.tokens.size
        assert block.tokens[0, : len(nodes)].tolist() == trie.tokens[sorted(nodes)].tolist()
        assert len(block.owners) == sum(trie.count_scored(index) for index in block.items)


@pytest.mark.slow
def test_plan_wastes_little() -> None:
    """Less than a tenth of the slots of many short items stays empty. A shared beginning is stored once in each row."""
    sizes = np.random.default_rng(0).integers(10, 90, 300).tolist()
    for beginning in ((), (7, 8, 9)):
        items = [[EncodedChoice((*beginning, 100 + n, *range(size)), 1)] * 2 for n, size in enumerate(sizes)]
        trie = build_trie(items)
        blocks = plan_blocks(trie, block_tokens=512, chunk=64)
        slots = sum(block.tokens.size for block in blocks)
        assert sum(len(nodes) - len(beginning) for nodes in trie.items) > 0.9 * slots
        assert len({block.tokens.shape for block in blocks}) == 1


@pytest.mark.parametrize(
    ("count", "rows"), [(1, [1]), (3, [3]), (8, [8]), (12, [6, 6]), (14, [7, 7]), (16, [8, 8]), (18, [6, 6, 6])]
)
def test_blocks_have_the_rows_that_leave_fewest_slots_empty(count: int, rows: list[int]) -> None:
    """Each row has one item of 64 slots and each block at most eight rows; all blocks have one shape."""
    items = [
        [EncodedChoice(tuple(range(n, n + 65)), 1), EncodedChoice((*range(n, n + 64), 0), 1)] for n in range(count)
    ]
    blocks = plan_blocks(build_trie(items), block_tokens=512, chunk=64)
    assert [block.tokens.shape for block in blocks] == [(number, 64) for number in rows]
