"""Cost of a traced program: floating-point operations of its matrix products, and its peak memory.

Both are computed from the jaxpr, which has the true dtypes and the length of every loop, and needs no device. XLA's own
count includes a loop's body only once, and its CPU compiler turns bfloat16 products into float32 ones.

The memory estimate follows the values through the program in order. A value has a buffer if a product, a loop or a
gather writes or reads it, or if it is an output of the computation. Elementwise operations between those are assumed to
be fused, as XLA does: they need no buffers, and their inputs live until the fused operation has run. A loop needs
memory for its stacked outputs and for the peak of its body.
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
# Operations whose result is a view of the operand's memory, or a permutation that a product can read directly.
_VIEWS = ("reshape", "squeeze", "expand_dims", "transpose", "copy", "name", "stop_gradient")
# Operations that read their operands from memory. Reductions are not among them: they are fused with their inputs.
_READERS = (
    "dot_general", "scan", "while", "cond", "gather", "scatter", "scatter-add", "scatter_add", "sort", "cumsum",
    "cumlogsumexp", "cummax", "top_k",
)  # fmt: skip
# Operations that write their result to memory, whichever operation reads it.
_WRITERS = (*_READERS, "random_bits", "dynamic_update_slice")


def flops(jaxpr: jex.ClosedJaxpr | jex.Jaxpr) -> int:
    """Count the operations of all matrix products: 2 m n k for each, times the lengths of the enclosing loops.

    Raises:
      ValueError: If a product is in a loop of unknown length.
    """
    total = 0
    for eqn in _open(jaxpr).eqns:
        if eqn.primitive.name == "dot_general":
            total += _product_flops(eqn)
            continue
        # Operations inside: of a loop's body, of a checkpointed layer, or of a function with its own derivative.
        inner = sum(flops(sub) for sub in _called_jaxprs(eqn))
        if eqn.primitive.name == "while" and inner:
            raise ValueError("cannot count a matrix product in a loop of unknown length")
        total += inner * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
    return total


@dataclass(frozen=True)
class PeakMemory:
    """Bytes that a program holds at its peak, its arguments excluded.

    Attributes:
      saved: Outputs that one loop stacks and another loop reads: activations saved for the backward pass.
      stacked: Other stacked outputs of loops: gradients.
      working: All other values.
    """

    saved: int = 0
    stacked: int = 0
    working: int = 0

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.saved + self.stacked + self.working


def peak_memory(jaxpr: jex.ClosedJaxpr) -> PeakMemory:
    """Estimate the peak memory of a program that writes its results to the memory of donated arguments."""
    return _Computation(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars), results_free=True).peak()


def size_in_bytes(array: Any) -> int:
    """Return the bytes of an array or an abstract value."""
    # Keys of the default random generator are two 32-bit integers.
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        return 8 * math.prod(array.shape)
    return math.prod(array.shape) * np.dtype(array.dtype).itemsize


@dataclass
class _Node:
    """One operation of an inlined program, with the values that it reads and writes."""

    name: str
    reads: list[Any]
    writes: list[Any]
    eqn: Any


class _Computation:
    """A jaxpr with its calls inlined and its dead code removed.

    Args:
      jaxpr: Jaxpr to analyse.
      needed: Whether each of its outputs is read by the caller.
      results_free: Whether the outputs reuse the memory of arguments, and thus need no buffers.
      carried: Number of leading outputs that a loop carries, which live until the end of its body.
    """

    def __init__(self, jaxpr: Any, needed: Sequence[bool], *, results_free: bool = False, carried: int = 0) -> None:
        self.nodes: list[_Node] = []
        # Values of the inlined program by the jaxpr's variables.
        values: dict[Any, Any] = {var: var for var in (*jaxpr.invars, *jaxpr.constvars)}
        # Inline all calls first: the lifetime of a value does not end at the boundary of a call.
        self._inline(jaxpr, values)
        outputs = zip(jaxpr.outvars, needed, strict=True)
        self.outs = {values.get(v, v) for v, is_needed in outputs if is_needed and _is_var(v)}
        self._results_free = results_free
        # Loop carries stay in memory until the body ends, even if nothing in it reads them again.
        carries = {values.get(v, v) for v in jaxpr.outvars[:carried] if _is_var(v)}
        self._live_to_end = set() if results_free else carries
        self._drop_dead()

    def _inline(self, jaxpr: Any, values: dict[Any, Any]) -> None:
        """Append the nodes of a jaxpr, replacing each call by the nodes of the called jaxpr."""
        for eqn in jaxpr.eqns:
            reads = [values.get(v, v) if _is_var(v) else None for v in eqn.invars]
            if eqn.primitive.name in _CALLS or "custom_vjp" in eqn.primitive.name:
                # Bind the called jaxpr's inputs to the call's operands, and the call's results to its outputs.
                inner = _open(next(_called_jaxprs(eqn)))
                inner_values = dict.fromkeys(inner.constvars)
                inner_values |= dict(zip(inner.invars, reads, strict=True))
                self._inline(inner, inner_values)
                values.update(
                    (out, inner_values.get(v) if _is_var(v) else None)
                    for out, v in zip(eqn.outvars, inner.outvars, strict=True)
                )
                continue
            # A jaxpr may be called twice, so each call gets new values.
            writes = [_Value(v.aval) for v in eqn.outvars]
            values.update(zip(eqn.outvars, writes, strict=True))
            self.nodes.append(_Node(eqn.primitive.name, [r for r in reads if r is not None], writes, eqn))

    def _drop_dead(self) -> None:
        """Remove nodes without a result that an output depends on."""
        needed_values, live_nodes = set(self.outs), []
        for node in reversed(self.nodes):
            if any(value in needed_values for value in node.writes):
                needed_values.update(node.reads)
                live_nodes.append(node)
        self.nodes, self.needed_values = live_nodes[::-1], needed_values

    def peak(self) -> PeakMemory:
        """Return the memory at the position of the program with the largest total."""
        sources = self._sources()
        end = len(self.nodes)
        # Last position that reads each buffer. A fused operation reads its inputs when the operation that it is fused
        # into runs, so positions propagate backwards from the readers.
        last_reads: dict[Any, int] = {}
        read_by_loops: set[Any] = set()
        read_positions: dict[Any, int] = {}
        for position in range(end - 1, -1, -1):
            node = self.nodes[position]
            is_fused = not any(value in self.buffered for value in node.writes)
            runs_at = max((read_positions.get(v, -1) for v in node.writes), default=-1) if is_fused else position
            # Carry the position back to the operands, and from them to the buffers that they are computed from.
            for value in node.reads:
                read_positions[value] = max(read_positions.get(value, -1), runs_at)
                for buffer in sources.get(value, ()):
                    last_reads[buffer] = max(last_reads.get(buffer, -1), runs_at)
            # Stacked inputs of a loop are the last of its operands.
            if node.name == "scan":
                stacked = [v for v in node.eqn.invars[sum(_loop_inputs(node.eqn)) :] if _is_var(v)]
                stacked_values = node.reads[len(node.reads) - len(stacked) :]
                read_by_loops.update(buffer for value in stacked_values for buffer in sources.get(value, ()))
        # A value that the loop carries is read by the next turn.
        for value in self._live_to_end:
            for buffer in sources.get(value, ()):
                last_reads[buffer] = end
        return self._simulate(last_reads, read_by_loops)

    def _sources(self) -> dict[Any, set[Any]]:
        """Return the buffers that each value is computed from, and set `buffered`, the values that have a buffer."""
        # Values that are read from memory: operands of readers, also through views, and outputs.
        read_from_memory: set[Any] = set(() if self._results_free else self.outs)
        for node in reversed(self.nodes):
            if node.name in _READERS or (node.name in _VIEWS and node.writes[0] in read_from_memory):
                read_from_memory.update(node.reads)
        self.buffered: set[Any] = set()
        sources: dict[Any, set[Any]] = {}
        for node in self.nodes:
            # Buffers that this operation reads, directly or through fused operands.
            operand_buffers = set().union(*(sources.get(value, ()) for value in node.reads)) if node.reads else set()
            for value in node.writes:
                if node.name in _VIEWS:
                    sources[value] = operand_buffers
                elif node.name in _WRITERS or value in read_from_memory:
                    self.buffered.add(value)
                    sources[value] = {value}
                else:
                    # Fused: computed from its operands' buffers whenever it is read.
                    sources[value] = operand_buffers
        return sources

    def _simulate(self, last_reads: dict[Any, int], read_by_loops: set[Any]) -> PeakMemory:
        """Run through the nodes in order, allocating and freeing buffers, and return the peak."""
        live: dict[Any, tuple[str, int]] = {}
        peak = PeakMemory()
        freed_at: dict[int, list[Any]] = defaultdict(list)
        for buffer, position in last_reads.items():
            freed_at[position].append(buffer)
        for position, node in enumerate(self.nodes):
            # An elementwise operation may overwrite an input that is read for the last time.
            if node.name not in _READERS:
                for buffer in freed_at[position]:
                    live.pop(buffer, None)
            # Allocate the results, except for those that reuse the memory of arguments.
            for index, value in enumerate(node.writes):
                if value in self.buffered and value in self.needed_values:
                    if self._results_free and value in self.outs and value not in last_reads:
                        continue
                    live[value] = (self._kind(node, index, value, read_by_loops), size_in_bytes(value.aval))
            # Memory while the node runs: all live buffers and the peak inside the node.
            inner = self._inner_peak(node)
            sums = {"saved": inner.saved, "stacked": inner.stacked, "working": inner.working}
            for kind, size in live.values():
                sums[kind] += size
            peak = max(peak, PeakMemory(**sums), key=lambda memory: memory.total)
            # Free the buffers that nothing reads after this node.
            for buffer in (*freed_at[position], *(value for value in node.writes if value not in last_reads)):
                live.pop(buffer, None)
        return peak

    def _kind(self, node: _Node, index: int, value: Any, read_by_loops: set[Any]) -> str:
        """Return the field of `PeakMemory` that a node's result with this index counts towards."""
        if node.name != "scan" or index < _loop_inputs(node.eqn)[1]:
            return "working"
        return "saved" if value in read_by_loops else "stacked"

    def _inner_peak(self, node: _Node) -> PeakMemory:
        """Return the peak memory inside a loop or a branch."""
        if node.name == "scan":
            _, carried = _loop_inputs(node.eqn)
            needed = [True] * carried + [value in self.needed_values for value in node.writes[carried:]]
            return _Computation(_open(node.eqn.params["jaxpr"]), needed, carried=carried).peak()
        jaxprs = [_open(jaxpr) for jaxpr in _called_jaxprs(node.eqn)]
        peaks = [_Computation(jaxpr, [True] * len(jaxpr.outvars)).peak() for jaxpr in jaxprs]
        return max(peaks, key=lambda memory: memory.total, default=PeakMemory())


class _Value:
    """A value of an inlined program, equal only to itself."""

    def __init__(self, aval: Any) -> None:
        self.aval = aval


def _loop_inputs(scan: Any) -> tuple[int, int]:
    """Return how many inputs of a scan are constants and how many are carried; all others are stacked."""
    if "num_carry" in scan.params:
        return scan.params["num_consts"], scan.params["num_carry"]
    constants, carried, _ = scan.params["ft_in"].unpack()  # from JAX 0.12 on
    return len(constants.vals), len(carried.vals)


def _product_flops(eqn: Any) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    return 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)


def _called_jaxprs(eqn: Any) -> Iterator[Any]:
    """Yield the jaxprs among an equation's parameters."""
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, (jex.ClosedJaxpr, jex.Jaxpr)):
                yield item


def _open(jaxpr: Any) -> Any:
    return jaxpr.jaxpr if isinstance(jaxpr, jex.ClosedJaxpr) else jaxpr


def _is_var(atom: Any) -> bool:
    return not isinstance(atom, jex.Literal)
