r"""Hooks on a model's linear modules: their inputs in a forward pass, and each module's gradient in a backward pass.

The gradient of a module's weight is :math:`G = \sum_t \delta_t x_t^\top` with x_t its input and :math:`\delta_t =
\partial L/\partial y_t` at its output, whatever the weight is stored as and whoever shares it. It is formed when
:math:`\delta` comes by in the backward pass and given away at once, so that no two modules' G are there together.
The inputs are kept as autograd keeps what it needs: gradient checkpointing drops and recomputes them.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float

from rora_theory.errors import InputError

Inputs = Float[torch.Tensor, "*tokens _features"]
"""A module's input in one call, in the shape that the module received."""


def read_modules(
    modules: Mapping[str, torch.nn.Module], run: Callable[[], float], keep: Callable[[str, Inputs], None]
) -> tuple[float, dict[str, str]]:
    """Run a forward pass without gradients and pass the input of every module to ``keep``, call by call.

    Returns:
      The result of ``run``, and the type of the output of every module that does not return a tensor. The inputs of
      such a module are not passed to ``keep``.
    """
    unsupported: dict[str, str] = {}

    def hook(name: str, _: Any, args: tuple, kwargs: dict[str, Any], y: Any) -> None:
        if isinstance(y, torch.Tensor):
            keep(name, _input(args, kwargs))
        else:
            unsupported[name] = type(y).__name__

    with _hooked(modules, hook), torch.no_grad():
        return run(), unsupported


def backward(
    model: torch.nn.Module,
    modules: Mapping[str, torch.nn.Module],
    run: Callable[[], torch.Tensor],
    calls: Mapping[str, int],
    use: Callable[[str, Float[torch.Tensor, "p_out p_in"], list[Inputs]], None],
) -> float:
    """Run a forward and a backward pass, and give ``use`` every module's G with the inputs that it had, call by call.

    The parameters' own gradients are neither formed nor touched.

    Args:
      model: whose parameters are frozen meanwhile.
      modules: its linear modules by name.
      run: gives the loss, a number with a graph.
      calls: how often a pass runs each module: its G is complete after so many.
      use: is called within the backward pass, under no_grad; a module that no gradient reaches is not shown.

    Returns:
      the loss.

    Raises:
      InputError: a loss that is not finite or has no graph, or a module that is run more often.
    """
    partial_sums: dict[str, tuple[torch.Tensor, list[Inputs]]] = {}
    done: dict[str, int] = dict.fromkeys(modules, 0)

    def arrived(name: str, kept: list[Any], delta: torch.Tensor) -> None:
        if done[name] == calls[name]:
            raise InputError(
                f"{name} is run more than {calls[name]} times with the batch, and {calls[name]} times with the "
                "held-out one; accepted are two batches of one kind"
            )
        # Unpacking recomputes what gradient checkpointing dropped; the node is let go, and with it the inputs.
        held = kept.pop()  # by its output: in torch 2.6 the node alone does not keep what it saved
        x = held.grad_fn.saved_tensors[0].detach()
        del held
        with torch.no_grad(), _full_precision():
            grad = _rows(delta).float().T @ _rows(x).float()
            if name in partial_sums:
                grad += partial_sums[name][0]
            every = [*(partial_sums.pop(name)[1] if name in partial_sums else []), x]
            done[name] += 1
            if done[name] == calls[name]:
                use(name, grad, every)
            else:
                partial_sums[name] = (grad, every)

    def hook(name: str, _: Any, args: tuple, kwargs: dict[str, Any], y: Any) -> torch.Tensor | None:
        if not torch.is_grad_enabled():  # the first pass of a checkpoint
            return None
        if not isinstance(y, torch.Tensor):
            raise InputError(f"{name} returns a {type(y).__name__}; accepted is a module that returns a tensor")
        y = _with_graph(y)
        y.register_hook(partial(arrived, name, [_Keep.apply(_input(args, kwargs), _anchor(y))]))
        return y

    with _frozen(model), _hooked(modules, hook), _embeddings_with_graph(model), torch.enable_grad():
        loss = run()
        value = float(loss.detach())
        if not (loss.numel() == 1 and torch.isfinite(loss).item()):
            raise InputError(f"the batch's loss is {value}; accepted are a model and a batch with a finite loss")
        if not loss.requires_grad:
            raise InputError("no gradient comes from the loss to a target module; accepted is a loss of their outputs")
        loss.backward()
    for name, (grad, every) in partial_sums.items():
        use(name, grad, every)
    return value


class _Keep(torch.autograd.Function):
    """Keeps a tensor as autograd keeps what a backward pass needs, apart from the graph of the loss."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return torch.zeros_like(anchor)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[None, None]:
        return None, None


def _anchor(y: torch.Tensor) -> torch.Tensor:
    return torch.zeros((), dtype=y.dtype, device=y.device, requires_grad=True)


def _with_graph(y: torch.Tensor) -> torch.Tensor:
    """``y`` in a graph, though nothing before it needs a gradient."""
    return y if y.requires_grad else y + _anchor(y)


@contextmanager
def _hooked(modules: Mapping[str, torch.nn.Module], hook: Callable) -> Iterator[None]:
    """Hook the modules, before any hook of the user's: one that changes the output is part of what follows it."""
    with ExitStack() as stack:
        for name, module in modules.items():
            handle = module.register_forward_hook(partial(hook, name), with_kwargs=True, prepend=True)
            stack.callback(handle.remove)
        yield


@contextmanager
def _embeddings_with_graph(model: torch.nn.Module) -> Iterator[None]:
    """The embeddings' output in a graph: a reentrant checkpoint passes on no gradient where its input needs none."""
    try:
        embeddings = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # a plain module, or a model without one such layer, has none
        embeddings = None
    if embeddings is None:
        yield
        return

    def hook(_: Any, __: Any, y: Any) -> Any:
        usable = isinstance(y, torch.Tensor) and y.is_floating_point() and torch.is_grad_enabled()
        return _with_graph(y) if usable else None

    handle = embeddings.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _frozen(model: torch.nn.Module) -> Iterator[None]:
    needed = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in needed:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in needed:
            parameter.requires_grad_(True)


@contextmanager
def _full_precision() -> Iterator[None]:
    """Compute products in float32, not in the TF32 or bfloat16 that PyTorch may be allowed to use instead."""
    if not hasattr(torch.backends, "fp32_precision"):  # before torch 2.9
        before = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("highest")
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    # The older getter raises where a precision was set by these attributes, as transformers' tf32=True does.
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    values = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, value in zip(backends, values, strict=True):
            # "none" inherits the general setting, and keeps on following it.
            backend.fp32_precision = "none" if value == torch.backends.fp32_precision else value


def _input(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    return args[0] if args else next(iter(kwargs.values()))


def _rows(x: torch.Tensor) -> Float[torch.Tensor, "tokens _features"]:
    return x.reshape(-1, x.shape[-1])
