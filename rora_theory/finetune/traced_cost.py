r"""What a traced program costs: floating-point operations of its products, and the memory it holds at its fullest.

Both are read off the jaxpr, so they know the true dtypes and the length of every loop, and need no device: XLA's own
count takes a loop's body once, and its CPU compiler turns bfloat16 products into float32 ones.

Memory follows the values through the program in order. A value takes memory when a product, a loop or a gather makes
it or reads it, or when it leaves the computation; elementwise work between those is taken to be fused away, as XLA
does, and its inputs live until the fused work is done. A loop takes its stacked outputs and its body's fullest moment.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.extend.core as jex
import numpy as np

_CALLS = ("jit", "pjit", "closed_call", "core_call", "remat", "checkpoint", "custom_jvp_call", "custom_vjp_call")
# Another view of the same memory, or a permutation that a product reads as it lies.
_VIEWS = ("reshape", "squeeze", "expand_dims", "transpose", "copy", "name", "stop_gradient")
# What reads its operands from memory; a reduction is fused with what comes before it.
_READERS = (
    "dot_general", "scan", "while", "cond", "gather", "scatter", "scatter-add", "scatter_add", "sort", "cumsum",
    "cumlogsumexp", "cummax", "top_k",
)  # fmt: skip
# What writes its result to memory whoever reads it.
_WRITERS = (*_READERS, "random_bits", "dynamic_update_slice")


def flops(jaxpr: jex.ClosedJaxpr | jex.Jaxpr) -> int:
    """Operations of all matrix products: 2 m n k each, times the lengths of the loops around it.

    Raises:
      ValueError: a product in a loop of unknown length.
    """
    total = 0
    for eqn in _open(jaxpr).eqns:
        if eqn.primitive.name == "dot_general":
            total += _product(eqn)
            continue
        inner = sum(flops(sub) for sub in _inner(eqn))
        if eqn.primitive.name == "while" and inner:
            raise ValueError("a product in a loop of unknown length has no count")
        total += inner * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
    return total


@dataclass(frozen=True)
class Held:
    """Bytes that a program holds beside its arguments, at its fullest moment.

    Attributes:
      kept: stacked by one loop for another to read: activations that wait for the backward pass.
      stacked: other stacked results of loops: gradients.
      working: everything else.
    """

    kept: int = 0
    stacked: int = 0
    working: int = 0

    @property
    def total(self) -> int:
        return self.kept + self.stacked + self.working


def held(jaxpr: jex.ClosedJaxpr) -> Held:
    """The fullest moment of a program whose results take the memory of donated arguments."""
    return _Computation(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars), results_free=True).fullest()


def size_in_bytes(array: Any) -> int:
    """Bytes of an array or abstract value; a random key is the default generator's, two words."""
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        return 8 * math.prod(array.shape)
    return math.prod(array.shape) * np.dtype(array.dtype).itemsize


@dataclass
class _Node:
    name: str
    reads: list[Any]
    writes: list[Any]
    eqn: Any


class _Computation:
    """One jaxpr with its calls inlined and its dead code removed."""

    def __init__(self, jaxpr: Any, needed: Sequence[bool], *, results_free: bool = False, carried: int = 0) -> None:
        self.nodes: list[_Node] = []
        names: dict[Any, Any] = {var: var for var in (*jaxpr.invars, *jaxpr.constvars)}
        self._inline(jaxpr, names)
        outs = [names.get(v, v) for v, wanted in zip(jaxpr.outvars, needed, strict=True) if wanted and _is_var(v)]
        self.arguments = set(jaxpr.invars) | set(jaxpr.constvars)
        self.outs, self._results_free = set(outs), results_free
        held_to_end = [names.get(v, v) for v in jaxpr.outvars[:carried] if _is_var(v)]
        self._last = set() if results_free else set(held_to_end)
        self._drop_dead()

    def _inline(self, jaxpr: Any, names: dict[Any, Any]) -> None:
        for eqn in jaxpr.eqns:
            reads = [names.get(v, v) if _is_var(v) else None for v in eqn.invars]
            if eqn.primitive.name in _CALLS or "custom_vjp" in eqn.primitive.name:
                inner = _open(next(_inner(eqn)))
                own = dict.fromkeys(inner.constvars)
                own |= dict(zip(inner.invars, reads, strict=True))
                self._inline(inner, own)
                names.update(
                    (out, own.get(v) if _is_var(v) else None) for out, v in zip(eqn.outvars, inner.outvars, strict=True)
                )
                continue
            # A jaxpr may be called twice: each call's values are its own.
            writes = [_Value(v.aval) for v in eqn.outvars]
            names.update(zip(eqn.outvars, writes, strict=True))
            self.nodes.append(_Node(eqn.primitive.name, [r for r in reads if r is not None], writes, eqn))

    def _drop_dead(self) -> None:
        wanted, kept = set(self.outs), []
        for node in reversed(self.nodes):
            if any(w in wanted for w in node.writes):
                wanted.update(node.reads)
                kept.append(node)
        self.nodes, self.wanted = kept[::-1], wanted

    def fullest(self) -> Held:
        source = self._sources()
        end = len(self.nodes)
        last: dict[Any, int] = {}
        reads_by_loops: set[Any] = set()
        # Where each buffer is read last; work that is fused away reads when what it is fused into does.
        when: dict[Any, int] = {}
        for position in range(end - 1, -1, -1):
            node = self.nodes[position]
            fused = not any(w in self.memory for w in node.writes)
            at = max((when.get(w, -1) for w in node.writes), default=-1) if fused else position
            for value in node.reads:
                when[value] = max(when.get(value, -1), at)
                for buffer in source.get(value, ()):
                    last[buffer] = max(last.get(buffer, -1), at)
            if node.name == "scan":
                stacked = [v for v in node.eqn.invars[sum(_loop_inputs(node.eqn)) :] if _is_var(v)]
                tail = node.reads[len(node.reads) - len(stacked) :]
                reads_by_loops.update(b for value in tail for b in source.get(value, ()))
        for value in self._last:
            for buffer in source.get(value, ()):
                last[buffer] = end
        return self._walk(last, reads_by_loops)

    def _sources(self) -> dict[Any, set[Any]]:
        """For each value the buffers it is computed from; sets `memory`, the values that have a buffer."""
        read_from_memory: set[Any] = set(() if self._results_free else self.outs)
        for node in reversed(self.nodes):
            if node.name in _READERS or (node.name in _VIEWS and node.writes[0] in read_from_memory):
                read_from_memory.update(node.reads)
        self.memory: set[Any] = set()
        source: dict[Any, set[Any]] = {}
        for node in self.nodes:
            below = set().union(*(source.get(r, ()) for r in node.reads)) if node.reads else set()
            for value in node.writes:
                if node.name in _VIEWS:
                    source[value] = below
                elif node.name in _WRITERS or value in read_from_memory:
                    self.memory.add(value)
                    source[value] = {value}
                else:
                    source[value] = below
        return source

    def _walk(self, last: dict[Any, int], reads_by_loops: set[Any]) -> Held:
        live: dict[Any, tuple[str, int]] = {}
        best = Held()
        deaths: dict[int, list[Any]] = defaultdict(list)
        for buffer, position in last.items():
            deaths[position].append(buffer)
        for position, node in enumerate(self.nodes):
            if node.name not in _READERS:  # written over an input that is read for the last time
                for buffer in deaths[position]:
                    live.pop(buffer, None)
            for index, value in enumerate(node.writes):
                if value in self.memory and value in self.wanted:
                    if self._results_free and value in self.outs and value not in last:
                        continue
                    live[value] = (self._kind(node, index, value, reads_by_loops), size_in_bytes(value.aval))
            inner = self._inside(node)
            sums = {"kept": inner.kept, "stacked": inner.stacked, "working": inner.working}
            for kind, size in live.values():
                sums[kind] += size
            now = Held(**sums)
            best = max(best, now, key=lambda h: h.total)
            for buffer in (*deaths[position], *(w for w in node.writes if w not in last)):
                live.pop(buffer, None)
        return best

    def _kind(self, node: _Node, index: int, value: Any, reads_by_loops: set[Any]) -> str:
        if node.name != "scan" or index < _loop_inputs(node.eqn)[1]:
            return "working"
        return "kept" if value in reads_by_loops else "stacked"

    def _inside(self, node: _Node) -> Held:
        if node.name == "scan":
            _, carried = _loop_inputs(node.eqn)
            needed = [True] * carried + [w in self.wanted for w in node.writes[carried:]]
            return _Computation(_open(node.eqn.params["jaxpr"]), needed, carried=carried).fullest()
        parts = [_Computation(_open(sub), [True] * len(_open(sub).outvars)).fullest() for sub in _inner(node.eqn)]
        return max(parts, key=lambda h: h.total, default=Held())


class _Value:
    """A value of an inlined program; equal to itself alone."""

    def __init__(self, aval: Any) -> None:
        self.aval = aval


def _loop_inputs(scan: Any) -> tuple[int, int]:
    """How many inputs of a scan are constants, and how many are carried; the rest are stacked."""
    if "num_carry" in scan.params:
        return scan.params["num_consts"], scan.params["num_carry"]
    constants, carried, _ = scan.params["ft_in"].unpack()  # from JAX 0.12 on
    return len(constants.vals), len(carried.vals)


def _product(eqn: Any) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    return 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)


def _inner(eqn: Any) -> Iterator[Any]:
    """The jaxprs an equation calls."""
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, (jex.ClosedJaxpr, jex.Jaxpr)):
                yield item


def _open(jaxpr: Any) -> Any:
    return jaxpr.jaxpr if isinstance(jaxpr, jex.ClosedJaxpr) else jaxpr


def _is_var(atom: Any) -> bool:
    return not isinstance(atom, jex.Literal)
