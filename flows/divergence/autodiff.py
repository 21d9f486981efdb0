"""Products of vectors with the Jacobian of a field, by reverse or forward mode.

What a product costs, in bare evaluations of the field (bare forward + backward passes when training), as the
median of alternating runs of the trace of one Jacobian, CPU time on one core, torch 2.13:

| field | products | reverse, loop | reverse, 8 a call | forward, loop | forward, 8 a call |
|---|---|---|---|---|---|
| MLP d = 2, batch 512 | 2 | 1.2 (training 1.6) | 1.2 (1.6) | 6.0 (4.6) | 3.6 (3.2) |
| MLP d = 64, batch 256 | 64 | 0.8 (1.4) | 0.8 (0.8) | 5.7 (4.3) | 1.5 (1.2) |
| MLP d = 512, batch 64 | 512 | 0.7 (0.9) | 0.6 (0.7) | 4.4 (3.6) | 1.1 (1.0) |
| four convolutions, 28 × 28 | 25 | 1.0 (1.4) | 1.1 (1.5) | 3.3 (3.4) | 1.6 (1.4) |
| four convolutions, 8 × 8 | 25 | 1.1 (1.4) | 1.2 (1.3) | 4.0 (3.3) | 1.5 (1.3) |

Hence the defaults. Reverse mode takes one product at a time: several a call are up to 1.7 times faster in training
perceptrons, but no faster without gradients, slower on convolutions, and not every operation can be batched. Forward
mode takes 16 a call, since each call evaluates the field again. Forward mode pays for training convolutions (at 32 a
call 1.2 to 1.3 times faster than the reverse loop) and for memory: it keeps no graph without gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from flows.errors import ComputationError, InvalidValueError
from flows.promises import raise_explained
from flows.vector_field import VectorField, checked_value

Mode = Literal["reverse", "forward"]
Products = Callable[[Tensor], Tensor]  # (n, B, *event) -> (n, B, *event)

_UNTRACEABLE = (
    "autograd cannot trace the field's value to x: it was computed under torch.no_grad(), detached, or does not "
    "depend on x; remove the detachment, or write a constant field as `c + 0 * x`"
)
_DEFAULT_CHUNK = {"reverse": 1, "forward": 16}  # products in one call


def check_mode(mode: str, chunk_size: int | None) -> None:
    """Raise `ValueError` on an unknown mode or a chunk size below one."""
    if mode not in ("reverse", "forward"):
        raise InvalidValueError(f"mode must be 'reverse' or 'forward', got {mode!r}")
    if chunk_size is not None and chunk_size < 1:
        raise InvalidValueError(
            f"chunk_size must be >= 1, or None for one product at a time in reverse mode and "
            f"{_DEFAULT_CHUNK['forward']} in forward mode, got {chunk_size}"
        )


def products_per_call(mode: Mode, chunk_size: int | None) -> int:
    """`chunk_size`, or the default of the mode where it is `None`."""
    return _DEFAULT_CHUNK[mode] if chunk_size is None else chunk_size


def linearise(
    field: VectorField,
    t: Tensor,  # 0-d or (B,)
    x: Tensor,  # (B, *event)
    mode: Mode = "reverse",
    chunk_size: int | None = None,
    check: Callable[[Tensor, Tensor], Tensor] = checked_value,
) -> tuple[Tensor, Products]:
    r"""Evaluate `field` at `(t, x)` and return its value with a function for Jacobian products.

    With J = ∂v/∂x of each sample, `products(u)` is Jᵀu in reverse mode and Ju in forward mode; uᵀJu, and with it every
    trace estimate, is the same for both. `u` stacks n directions for every sample of the batch, and may be an expanded
    (stride 0) tensor. Products taken under `torch.no_grad()` are constants.

    Cost: one field evaluation. Each product then costs about one backward pass in reverse mode (the graph is shared),
    and in forward mode the evaluation of a tangent, with the field's own once a call.

    Args:
        field: the vector field.
        t: time.
        x: the points.
        mode: `"reverse"` or `"forward"`.
        chunk_size: products in one vectorised call, which takes that many times the memory; `None`: 1 in reverse and 16
            in forward mode.
        check: called as `check(value, x)` on what the field returns, and raises on a wrong shape; by default, one that
            differs from that of `x`.

    Raises:
        ValueError: `check` refuses the value, or, in reverse mode, autograd cannot trace the value to `x`.
        RuntimeError: reverse mode under `torch.inference_mode()`.

    Example:
        ```python
        import torch

        from flows.divergence import linearise

        x = torch.randn(10, 3)
        value, products = linearise(lambda t, x: torch.sin(x), torch.tensor(0.0), x)
        products(torch.ones(1, 10, 3))  # (1, 10, 3): vᵀJ of one v
        ```
    """
    size = products_per_call(mode, chunk_size)
    name = getattr(field, "name", getattr(field, "__name__", type(field).__name__))
    if mode == "forward":
        return _forward(lambda y: check(field(t, y), y), x, size, name)
    if torch.is_inference_mode_enabled():
        raise ComputationError(
            "reverse-mode products need autograd, which torch.inference_mode() forbids; use torch.no_grad(), "
            "mode='forward' or Analytic()"
        )
    differentiable = torch.is_grad_enabled()
    if not (differentiable and x.requires_grad):
        x = x.detach().requires_grad_()
    with torch.enable_grad():
        value = check(field(t, x), x)
    if not value.requires_grad and not _is_constant(field, t, x, value):
        raise InvalidValueError(_UNTRACEABLE)

    def products(directions: Tensor) -> Tensor:
        return torch.cat([vjp(chunk) for chunk in directions.split(size)])

    def vjp(directions: Tensor) -> Tensor:
        if not value.requires_grad:
            return torch.zeros_like(directions)
        batched = len(directions) > 1
        try:
            (product,) = torch.autograd.grad(
                value,
                x,
                grad_outputs=directions if batched else directions[0],
                create_graph=differentiable and torch.is_grad_enabled(),
                retain_graph=True,
                is_grads_batched=batched,
                allow_unused=True,
            )
        except RuntimeError as error:
            raise_explained(error, name)
        if product is None:
            if not _is_constant(field, t, x, value):
                raise InvalidValueError(_UNTRACEABLE)
            return torch.zeros_like(directions)
        return product if batched else product.unsqueeze(0)

    return (value if differentiable else value.detach()), products


def _is_constant(field: VectorField, t: Tensor, x: Tensor, value: Tensor) -> bool:
    """Whether a value without a path to `x` is the same at other points; that of a detached field is not."""
    try:
        with torch.no_grad():
            return all(torch.equal(field(t, a * x + b), value) for a, b in ((0.6, -0.3), (-1.0, 0.2), (3.0, 1.0)))
    except RuntimeError:  # within a transform of torch.func
        return False


def _forward(function: Callable[[Tensor], Tensor], x: Tensor, chunk_size: int, name: str) -> tuple[Tensor, Products]:
    x = x.contiguous()  # forward-mode differentiation refuses expanded tensors
    value = function(x)

    def jvp(direction: Tensor) -> Tensor:
        return torch.func.jvp(function, (x,), (direction,))[1]

    def products(directions: Tensor) -> Tensor:
        try:
            if chunk_size == 1 or len(directions) == 1:
                return torch.stack([jvp(direction.contiguous()) for direction in directions])
            return torch.func.vmap(jvp, chunk_size=chunk_size)(directions)
        except RuntimeError as error:
            raise_explained(error, name)

    return value, products
