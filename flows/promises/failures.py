"""Known failures of torch inside a field, each with its cure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from flows.errors import ComputationError, FlowsError

_SECOND = (
    "training by likelihood differentiates the divergence once more, and this operation has no second derivative. "
)
_ATTENTION = (
    "write the attention as plain products, `(q @ k.mT / d**0.5).softmax(-1) @ v`, or call the field inside "
    "`torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)`"
)
_NO_CLOSED_FORM = "; flow matching with divergence_weight=0 needs no divergence in training"
_COMPILED = (
    "compiled code has no double backward; leave the field uncompiled, train by flow matching with "
    "divergence_weight=0, or use a field with value_and_divergence(t, x)"
)
_CDIST = "write distances as `(x[:, None] - c).square().sum(-1)`, with a square root where you need it"
_VMAP = (
    "products with the Jacobian are batched by vmap, which this field does not allow: use chunk_size=1 for the "
    "divergence estimator, or mode='reverse' with its default chunk_size"
)
_REVERSE = "use mode='reverse' for the divergence estimator"

# What a message of torch must contain, in lower case, and what to do. The first that fits is used.
KNOWN: tuple[tuple[tuple[str, ...], str], ...] = (
    (("forward ad", "scaled_dot_product"), f"fused attention has no forward mode; {_REVERSE}, or {_ATTENTION}"),
    (("derivative", "scaled_dot_product"), _SECOND + _ATTENTION[0].upper() + _ATTENTION[1:] + _NO_CLOSED_FORM),
    (("forward ad", "cdist"), f"torch.cdist has no forward mode; {_CDIST}"),
    (("derivative", "cdist"), _SECOND + _CDIST[0].upper() + _CDIST[1:] + _NO_CLOSED_FORM),
    (("donated buffer",), "the backward pass of compiled code runs once, and an exact divergence takes several; leave "
        "the field uncompiled, or use mode='forward' or Hutchinson() for the divergence estimator; flow matching with "
        "divergence_weight=0 takes no divergence"),
    (("double backward",), _COMPILED),
    (("once_differentiable",), _SECOND + "Write the backward of the autograd.Function in differentiable operations"),
    (("forward ad",), f"this operation has no forward mode; {_REVERSE}"),
    (("forward mode ad", "jvp"), f"an autograd.Function in the field has no jvp; {_REVERSE}"),
    (("functorch transforms", "setup_context"), f"an autograd.Function in the field is of the old style; {_REVERSE}"),
    (("a different number of tensors was saved",), "torch.utils.checkpoint in the field does not go with forward-mode "
        f"products; {_REVERSE}, or leave the checkpoint out"),
    (("functorch transform",), f"torch.func cannot follow the field through its forward mode; {_REVERSE}"),
    (("mutate a captured tensor",), f"the field writes into a buffer, which forward mode does not allow; {_REVERSE}"),
    (("batching rule",), _VMAP),
    (("vmap",), _VMAP),
    (("c++ compiler",), "torch.compile needs a C++ compiler and finds none; install one (such as g++), or leave "
        "hardware.compile=false and the field uncompiled"),
    (("cppcompileerror",), "torch.compile could not build its C++ code; install the compiler's and Python's header "
        "files, or leave hardware.compile=false and the field uncompiled"),
    (("leaf variable that requires grad", "in-place"), "the field writes into its argument x; begin with "
        "`x = x.clone()`, or use the operation that returns a new tensor"),
    (("incompatible with .grad()",), "the reentrant torch.utils.checkpoint does not go with Jacobian products; use "
        "`checkpoint(..., use_reentrant=False)`"),
    (("does not require grad and does not have a grad_fn",), "the field calls torch.autograd.grad where autograd does "
        "not record, as in sampling; write `with torch.enable_grad(): x = x if x.requires_grad else "
        "x.detach().requires_grad_()` before it, and pass create_graph=True"),
    (("can't call numpy() on tensor that requires grad",), "it computes with numpy, which autograd cannot follow; use "
        "the functions of torch"),
    (("out=... arguments",), "the field writes with out=, which autograd cannot follow; let the operation return a new "
        "tensor"),
    (("backward through the graph a second time",), "the field holds a tensor whose graph is gone, such as a value "
        "cached in an earlier call; compute it in forward, or pass it as context"),
    (("cannot access data pointer",), f"forward-mode products go through no code outside torch; {_REVERSE}, and "
        "compute with the functions of torch"),
    (("derivative for", "is not implemented"), _SECOND + "Replace it by basic operations" + _NO_CLOSED_FORM),
)  # fmt: skip


def explained(error: Exception, name: str) -> Exception:
    """The same failure with its cure if it is a known one, otherwise the error itself.

    Args:
        error: what an evaluation of the field, or of its derivatives, raised.
        name: of the field.
    """
    if isinstance(error, FlowsError):
        return error
    if not isinstance(error, RuntimeError | TypeError) and not type(error).__module__.startswith("torch"):
        return error
    kind = type(error).__name__
    text = f"{kind} {error}".lower()
    lines = str(error).strip().splitlines() or [kind]
    for words, cure in KNOWN:
        if all(word in text for word in words):
            first = lines[0].split(". ")[0][:200]
            return ComputationError(f"the field {name} failed: {first}. The reason: {cure}")
    return error


def raise_explained(error: Exception, name: str) -> NoReturn:
    """Raise the failure with its cure if it is a known one, otherwise the error itself; see `explained`."""
    known = explained(error, name)
    if known is error:
        raise error
    raise known from error


def without_gradients(tensor: Tensor, reason: str, told: Callable[[], None]) -> Tensor:
    """The same values, whose backward pass calls `told` and raises `ComputationError(reason)`."""
    return _Refusal.apply(tensor, reason, told)  # pyright: ignore[reportReturnType]


class _Refusal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, reason: str, told: Callable[[], None]) -> Tensor:
        ctx.reason, ctx.told = reason, told
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.told()
        raise ComputationError(ctx.reason)
