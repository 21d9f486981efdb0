"""The dtype in which a model computes, and moving models between dtypes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from flows.vector_field import BoundField


def working_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of the points that a model takes: that of most of its trainable numbers.

    Frozen parameters, such as those of an encoder in half precision, decide only where nothing is trainable, complex
    ones, by their real part, only where nothing is real, and buffers never. Without any parameter it is torch's
    default dtype.
    """
    numbers: dict[tuple[bool, bool, torch.dtype], int] = {}
    for parameter in module.parameters():
        if parameter.is_floating_point() or parameter.is_complex():
            kind = (parameter.requires_grad, parameter.is_floating_point(), real(parameter.dtype))
            size = 1 if isinstance(parameter, UninitializedParameter) else parameter.numel()  # of a lazy layer
            numbers[kind] = numbers.get(kind, 0) + size
    if not numbers:
        return torch.get_default_dtype()
    return max(numbers, key=lambda kind: (*kind[:2], numbers[kind], kind[2].itemsize))[2]


def suitable_context(
    context: Tensor,  # (*batch, *context)
    view: BoundField,
) -> Tensor:
    """The context in a dtype that the field computes with.

    Floating-point numbers take the working dtype. Whole numbers do so for a field of this package alone: any other may
    look them up, as classes, in an `nn.Embedding`.
    """
    field = view.field
    if not isinstance(field, nn.Module):
        return context
    if context.is_floating_point():
        return context if next(field.parameters(), None) is None else context.to(working_dtype(field))
    return context if view.strangers else context.to(working_dtype(field))


def real(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the real part."""
    return dtype.to_real() if dtype.is_complex else dtype


def keeping_complex(convert: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`convert` as it acts on complex tensors without losing their imaginary parts."""

    def converted(tensor: Tensor) -> Tensor:
        if not tensor.is_complex() or tensor.is_meta:
            return convert(tensor)
        parts = convert(torch.view_as_real(tensor.detach()))
        if parts.dtype not in (torch.float32, torch.float64):
            parts = parts.float()  # there are no complex numbers of that dtype
        return torch.view_as_complex(parts.contiguous())

    return converted
