r"""Hooks on a model's linear modules that collect inputs in a forward pass and gradients in a backward pass.

The gradient of a module's weight is :math:`G = \sum_t \delta_t x_t^\top`, where :math:`x_t` is the module's input at
token t and :math:`\delta_t = \partial L/\partial y_t` the gradient at its output. It is the same whether the weight is
quantised or shared. Each G is computed when :math:`\delta` arrives in the backward pass, is handed to the caller and
is freed at once, so that only one module's G is in memory. Inputs are saved the way autograd saves tensors, so that
gradient checkpointing can drop and recompute them.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers.pytorch_utils import Conv1D

from rora_theory.errors import InputError
from rora_theory.measure.batches import naming_failure
from rora_theory.measure.modules import trainable_parameters

HALF_LOSS_SCALE = 2.0**10
"""Factor of the loss for outputs in float16, whose gradients would be rounded to 0; every G is divided by it."""

MAX_DEVIATION = 0.05
"""Largest relative difference between G and autograd's gradient of a weight; rounding to 16 bits stays far below."""

Inputs = Float[torch.Tensor, "... _features"]
"""Input of a module in one call, in the shape that the module received."""


def read_modules(
    modules: Mapping[str, torch.nn.Module], run: Callable[[], float], on_inputs: Callable[[str, Inputs], None]
) -> tuple[float, dict[str, str]]:
    """Run a forward pass without gradients and collect the inputs of modules.

    Args:
      modules: Linear modules by name.
      run: Function that runs the forward pass and returns the loss.
      on_inputs: Function that is called with a module's name and input, once for each call of the module.

    Returns:
      The loss, and the type of the output of every module that does not return a tensor. The inputs of such a module
      are not passed to ``on_inputs``.
    """
    unsupported: dict[str, str] = {}

    def hook(name: str, _: Any, args: tuple, kwargs: dict[str, Any], y: Any) -> None:
        if isinstance(y, torch.Tensor):
            on_inputs(name, first_input(args, kwargs))
        else:
            unsupported[name] = type(y).__name__

    with _hooked(modules, hook), torch.no_grad():
        return run(), unsupported


def backward(
    model: torch.nn.Module,
    modules: Mapping[str, torch.nn.Module],
    run: Callable[[], torch.Tensor],
    calls: Mapping[str, int],
    on_gradient: Callable[[str, Float[torch.Tensor, "p_out p_in"], list[Inputs]], None],
) -> float:
    """Run a forward and a backward pass and pass every module's gradient G and inputs to a function.

    The ``grad`` of the model's parameters is not changed. G of one module of each kind is compared with the gradient
    that autograd computes for its weight in the same pass, which finds modules that use a weight in another way.

    Args:
      model: Model. Its parameters are frozen during the passes.
      modules: Linear modules of the model by name.
      run: Function that runs the forward pass and returns the loss as a scalar tensor.
      calls: Number of calls of each module in a pass, after which its G is complete.
      on_gradient: Function of a module's name, its G and its inputs by call. It is called within the backward pass,
        without autograd, with products in float32, and not for modules that receive no gradient.

    Returns:
      The loss.

    Raises:
      InputError: If the loss is not finite or does not depend on a module's output, if a module is called more often
        than ``calls`` says, or if G of a module is not its weight's gradient.
    """
    check = _GradientCheck(model, modules)

    def finish(name: str, grad: torch.Tensor, inputs: list[Inputs]) -> None:
        check.add(name, grad)
        on_gradient(name, grad, inputs)

    partial_sums: dict[str, tuple[torch.Tensor, list[Inputs]]] = {}
    received: dict[str, int] = dict.fromkeys(modules, 0)
    dtypes: set[torch.dtype | None] = set()  # of the modules' outputs

    def on_delta(name: str, saved: list[Any], delta: torch.Tensor | None) -> None:
        if delta is None:  # the layers after the module pass on no gradient
            return
        if received[name] == calls[name]:
            raise InputError(
                f"{name} is called more often with the batch than with the held-out batch (limit: {calls[name]}). "
                "Pass two batches for which the model calls its modules equally often."
            )
        # Reading a saved tensor recomputes it if gradient checkpointing dropped it. `pop` and `del` release the input.
        # The list holds the node's output because in torch 2.6 the node alone does not keep its saved tensors.
        saved_output = saved.pop()
        x = saved_output.grad_fn.saved_tensors[0].detach()
        del saved_output
        with torch.no_grad(), _full_precision(delta.device.type):
            # G = sum over tokens of delta x^T; a module that is called several times sums over its calls.
            grad = _flatten_tokens(delta).float().T @ _flatten_tokens(x).float()
            if scale != 1:
                grad /= scale
            inputs = [x]
            if name in partial_sums:
                previous_grad, previous_inputs = partial_sums.pop(name)
                grad += previous_grad
                inputs = [*previous_inputs, x]
                del previous_grad
            received[name] += 1
            # Hand over a complete G at once, so that its memory is freed before the next module's G is computed.
            if received[name] == calls[name]:
                finish(name, grad, inputs)
            else:
                partial_sums[name] = (grad, inputs)

    def hook(name: str, _: Any, args: tuple, kwargs: dict[str, Any], y: Any) -> torch.Tensor | None:
        dtypes.add(getattr(y, "dtype", None))
        # The first forward pass of a checkpointed block runs without gradients; its recomputation is hooked instead.
        if not torch.is_grad_enabled():
            return None
        if not isinstance(y, torch.Tensor):
            raise InputError(f"{name} must return a tensor, got a {type(y).__name__}. Leave it out of target_modules.")
        # Save the input with autograd, and wait for delta at the output.
        y = _with_graph(y)
        y.register_hook(partial(on_delta, name, [_SavedInput.apply(first_input(args, kwargs), _anchor(y))]))
        return y

    with _frozen(model), check, _hooked(modules, hook), _embeddings_with_graph(model), torch.enable_grad():
        loss = run()
        value = float(loss.detach())
        # Check before the backward pass, whose errors would be harder to read.
        if not (loss.numel() == 1 and torch.isfinite(loss).item()):
            raise InputError(f"the loss of the batch must be finite, got {value}. Check the model and the batch.")
        if not loss.requires_grad:
            raise InputError(
                "the loss does not depend on the output of a target module, so no gradient reaches one. "
                "Check loss and target_modules."
            )
        scale = HALF_LOSS_SCALE if torch.float16 in dtypes else 1.0
        with naming_failure("the backward pass"):
            (loss.float() * scale).backward()
    # Modules with fewer calls in this pass than expected: what arrived is their whole gradient.
    for name, (grad, inputs) in partial_sums.items():
        with torch.no_grad(), _full_precision(grad.device.type):
            finish(name, grad, inputs)
    check.compare(scale)
    return value


class _GradientCheck(AbstractContextManager[None]):
    """Comparison of G with the gradient that autograd computes for the weight, for one module of each kind.

    Within the context, autograd computes the gradients of these weights. Of each gradient only products with a few
    random vectors are kept, so that its memory is freed at once.
    """

    def __init__(self, model: torch.nn.Module, modules: Mapping[str, torch.nn.Module]) -> None:
        # Modules that share a weight (tied layers) are compared together: autograd sums their gradients.
        sharing: dict[int, list[str]] = {}
        for name, module in modules.items():
            sharing.setdefault(id(_weight(module)), []).append(name)
        owners = Counter(id(weight) for module in model.modules() for weight in module._parameters.values())
        kinds = {re.sub(r"\.\d+(?=\.|$)", "", name): name for name in reversed(list(modules))}
        self._weights: dict[str, torch.nn.Parameter] = {}
        self._names: dict[str, list[str]] = {}
        for name in kinds.values():
            weight = _weight(modules[name])
            # Another owner of the weight, such as an embedding, adds a gradient of its own.
            names = sharing[id(weight)]
            if weight is not None and owners[id(weight)] == len(names) and names not in self._names.values():
                self._weights[name], self._names[name] = weight, names
        self._is_transposed = {name: _is_transposed(modules[name]) for name in self._weights}
        self._own: dict[str, torch.Tensor] = {}
        self._autograd: dict[str, torch.Tensor] = {}
        self._grads: list[tuple[torch.nn.Parameter, torch.Tensor | None]] = []
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        for name, weight in self._weights.items():
            self._grads.append((weight, weight.grad))
            weight.grad = None
            weight.requires_grad_(True)
            self._handles.append(weight.register_post_accumulate_grad_hook(partial(self._collect, name)))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        for weight, grad in self._grads:
            weight.requires_grad_(False)
            weight.grad = grad

    def add(self, name: str, grad: Float[torch.Tensor, "p_out p_in"]) -> None:
        """Add G of a module."""
        for checked, names in self._names.items():
            if name in names:
                self._add(self._own, checked, grad)

    def compare(self, scale: float) -> None:
        """Raise `InputError` for a module whose G differs from autograd's gradient, of the loss times ``scale``."""
        for name, gradient in self._own.items():
            expected = self._autograd.get(name, torch.zeros_like(gradient)) / scale
            norms = [float(torch.linalg.matrix_norm(matrix)) for matrix in (gradient - expected, gradient, expected)]
            deviation = norms[0] / (max(norms) or 1.0)
            # Gradients in float16 may overflow, which says nothing about G.
            if math.isfinite(norms[2]) and deviation > MAX_DEVIATION:
                raise InputError(
                    f"the gradient of {name} differs by {deviation:.0%} from the one that autograd computes for its "
                    "weight, so the module does not act on its input alone. Leave it out of target_modules."
                )

    def _collect(self, name: str, weight: torch.nn.Parameter) -> None:
        grad, weight.grad = weight.grad, None
        if grad is not None:
            self._add(self._autograd, name, grad.T if self._is_transposed[name] else grad)

    def _add(self, sums: dict[str, torch.Tensor], name: str, grad: torch.Tensor) -> None:
        with torch.no_grad(), _full_precision(grad.device.type):
            vectors = torch.randn((grad.shape[1], 8), generator=torch.Generator().manual_seed(0)).to(grad.device)
            product = grad.float() @ vectors
        sums[name] = sums[name] + product if name in sums else product


def _weight(module: torch.nn.Module) -> torch.nn.Parameter | None:
    """Return the weight of a linear module if autograd can compute its gradient and no adapter changes it."""
    if isinstance(module, BaseTunerLayer):
        if not module.disable_adapters:
            return None
        module = module.get_base_layer()
    weight = module._parameters.get("weight")
    is_dense = weight is not None and weight.is_floating_point() and weight.ndim == 2 and not weight.is_meta
    return weight if is_dense else None


def _is_transposed(module: torch.nn.Module) -> bool:
    return isinstance(module.get_base_layer() if isinstance(module, BaseTunerLayer) else module, Conv1D)


class _SavedInput(torch.autograd.Function):
    """Function that saves its input as autograd does for a backward pass, outside the graph of the loss."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return torch.zeros_like(anchor)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[None, None]:
        return None, None


def _anchor(y: torch.Tensor) -> torch.Tensor:
    """Return a zero that requires a gradient; adding it to a tensor makes the tensor part of the graph."""
    return torch.zeros((), dtype=y.dtype, device=y.device, requires_grad=True)


def _with_graph(y: torch.Tensor) -> torch.Tensor:
    """Return ``y`` as part of a graph, even if nothing before it requires a gradient."""
    return y if y.requires_grad else y + _anchor(y)


@contextmanager
def _hooked(modules: Mapping[str, torch.nn.Module], hook: Callable) -> Iterator[None]:
    """Register a forward hook on the modules.

    It runs before the user's hooks (``prepend``): a user's hook that changes the output belongs to the layers after it.
    """
    with ExitStack() as stack:
        for name, module in modules.items():
            handle = module.register_forward_hook(partial(hook, name), with_kwargs=True, prepend=True)
            stack.callback(handle.remove)
        yield


@contextmanager
def _embeddings_with_graph(model: torch.nn.Module) -> Iterator[None]:
    """Bring the embeddings' output into the graph.

    A reentrant checkpoint passes on a gradient only if its input requires one, and all parameters are frozen.
    """
    try:
        embeddings = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # not a transformers model, or one without a single embedding layer
        embeddings = None
    if embeddings is None:
        yield
        return

    def hook(_: Any, __: Any, y: Any) -> Any:
        is_differentiable = isinstance(y, torch.Tensor) and y.is_floating_point() and torch.is_grad_enabled()
        return _with_graph(y) if is_differentiable else None

    handle = embeddings.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _frozen(model: torch.nn.Module) -> Iterator[None]:
    trainable = trainable_parameters(model)
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def _full_precision(device: str) -> Iterator[None]:
    """Compute matrix products in float32 even if PyTorch is allowed to use TF32 or bfloat16, also by autocast."""
    with torch.autocast(device, enabled=False), _without_tf32():
        yield


@contextmanager
def _without_tf32() -> Iterator[None]:
    if not hasattr(torch.backends, "fp32_precision"):  # torch before 2.9
        before = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("highest")
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    # The older getter raises an error if a precision was set by these attributes, as transformers' tf32=True does.
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    values = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, value in zip(backends, values, strict=True):
            # Restore "none" rather than the inherited value, so that later changes of the general setting apply.
            backend.fp32_precision = "none" if value == torch.backends.fp32_precision else value


def first_input(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    """Return the input of a module from the arguments of its call."""
    return args[0] if args else next(iter(kwargs.values()))


def _flatten_tokens(x: torch.Tensor) -> Float[torch.Tensor, "tokens _features"]:
    return x.reshape(-1, x.shape[-1])
