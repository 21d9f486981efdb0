"""What callers give to a flow, as one solve takes it: points and contexts in a single batch dimension."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flows.bases import ConditionalNormal, Frame
from flows.conditions import Named
from flows.errors import InvalidTypeError, InvalidValueError
from flows.expectations import refusal
from flows.models.precision import working_dtype

if TYPE_CHECKING:
    from flows.encoders import Encoder
    from flows.models.cnf import CNF


def contexts_of(flow: CNF, given: Tensor | Named | None, name: str = "context") -> Tensor | None:
    """Contexts as a tensor (*batch, *context): those that are given by name become numbers, in data units.

    Raises:
        InvalidTypeError, InvalidValueError: the contexts of the flow have no names, or they do not fit.
    """
    if given is None or isinstance(given, Tensor):
        return given
    if flow.encoder is not None and flow.encoder.conditions is not None:
        return flow.encoder.contexts(given).to(flow.device)
    by_name = isinstance(given, Mapping) or hasattr(given, "columns")
    why = f", for the contexts of this flow have no names; their shape is {flow.context_shape}" if by_name else ""
    raise InvalidTypeError(refusal(name, given, Tensor | None) + why)


def points_of(flow: CNF, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Points (B, *event) and the batch shape."""
    check_place(flow, "points", x)
    batch_shape = batch_shape_of(flow, x)
    dtypes = _dtypes(flow)
    if not x.is_floating_point() or (dtypes and x.dtype not in dtypes and x.dtype != torch.float64):
        own = next(iter(dtypes), flow.dtype)
        raise InvalidValueError(
            f"the points are {x.dtype} and the flow is {own}; convert the points with x.to({own}), or the flow "
            "with flow.double() for more digits"
        )
    points = x.reshape(-1, *flow.event_shape)
    bad = (~points.isfinite()).flatten(1).any(1).nonzero()
    if len(bad):
        raise InvalidValueError(
            f"{len(bad)} of {len(points)} points hold NaN or infinite values, the first at index "
            f"{bad[0].item()}; remove or repair them"
        )
    return points, batch_shape


def batch_shape_of(flow: CNF, x: Tensor) -> tuple[int, ...]:
    """The batch shape of points (*batch, *event), which are checked."""
    event_ndim = len(flow.event_shape)
    batch_shape = tuple(x.shape[: x.ndim - event_ndim])
    if x.ndim < event_ndim or tuple(x.shape[len(batch_shape) :]) != flow.event_shape:
        raise InvalidValueError(
            f"expected points of shape (*batch, {', '.join(map(str, flow.event_shape))}), got {tuple(x.shape)}"
        )
    return batch_shape


def _dtypes(flow: CNF) -> set[torch.dtype]:
    """The dtype of points; empty for a field without parameters, which takes any."""
    return {working_dtype(flow.field)} if next(flow.field.parameters(), None) is not None else set()


def in_own_dtype(flow: CNF, values: Tensor) -> Tensor:
    """Round float64 points to the flow's dtype, after a transform has had their digits."""
    dtypes = _dtypes(flow)
    return values.to(flow.dtype) if dtypes and values.dtype not in dtypes else values


def check_place(flow: CNF, what: str, given: Tensor) -> None:
    """Raise `InvalidValueError` unless `given` holds numbers where the flow computes."""
    if given.is_meta:
        raise InvalidValueError(
            f"the {what} {'is' if what != 'points' else 'are'} on the device meta, which holds no numbers; make it "
            "on the device where the flow computes"
        )
    places = {parameter.device for parameter in flow.field.parameters()}
    if places and given.device not in places | {flow.device}:
        raise InvalidValueError(
            f"the {what} {'is' if what != 'points' else 'are'} on the device {given.device}, and the flow is on "
            f"{flow.device}; move one of them, e.g. x.to(flow.device)"
        )
    if given.layout != torch.strided:
        raise InvalidValueError(f"the {what} must be a dense tensor, got {given.layout}; write x.to_dense()")


def features_of(flow: CNF, context: Tensor | None, batch_shape: tuple[int, ...]) -> Tensor | None:
    """What the field takes as its context, a row (*features) for each point of the batch."""
    if context is None:
        return None
    check_place(flow, "context", context)
    if context.is_complex():
        raise InvalidValueError(f"the context is {context.dtype}; give real numbers, such as context.real")
    place = context.ndim - context_ndim(flow, context)
    own, leading = context.shape[place:], context.shape[:place]
    encoded = flow.encode(context.reshape(-1, *own))
    if encoded.device.type == "cpu" or not torch.is_grad_enabled():  # a GPU need not wait in each training step
        bad = (~encoded.isfinite()).reshape(len(encoded), -1).any(1).nonzero()
        if len(bad):
            raise InvalidValueError(
                f"{len(bad)} of {len(encoded)} contexts hold NaN or infinite values, the first at index "
                f"{bad[0].item()}; remove or repair them"
            )
    features = encoded.shape[1:]
    try:
        return encoded.reshape(*leading, *features).expand(*batch_shape, *features).reshape(-1, *features)
    except RuntimeError:
        raise InvalidValueError(
            f"a context of shape {tuple(context.shape)} does not broadcast to one of shape {tuple(own)} for each "
            f"point of a batch of shape {batch_shape}"
        ) from None


def frame_of(flow: CNF, context: Tensor | None, batch_shape: tuple[int, ...]) -> Frame | None:
    """The units of a base that depends on the context, for each point; `None` for any other base."""
    base = flow.base
    if not isinstance(base, ConditionalNormal):
        return None
    if context is None:
        raise InvalidValueError(
            f"the base {type(base).__name__} depends on the context: pass context=..., of shape "
            f"{base.context_shape} for each point"
        )
    check_place(flow, "context", context)
    place = context.ndim - context_ndim(flow, context)
    leading, own = context.shape[:place], context.shape[place:]
    return base.frame(context.reshape(-1, *own)).expand(leading, batch_shape)


def context_ndim(flow: CNF, context: Tensor) -> int:
    """How many of the dimensions of `context` are those of a single one."""
    stated = flow.context_shape
    return min(1, context.ndim) if stated is None else min(len(stated), context.ndim)


def check_base(flow: CNF) -> None:
    """Raise `InvalidValueError` unless the base depends on no contexts, or on those of the flow."""
    own, stated = flow.base.context_shape, flow.context_shape
    if own is not None and (not flow.bind().takes_context or stated not in (None, own)):
        takes = "takes none" if stated is None else f"takes contexts of shape {stated}"
        raise InvalidValueError(
            f"the base {type(flow.base).__name__} depends on contexts of shape {own}, and the flow {takes}; build "
            "both for the same contexts"
        )


def check_encoder(flow: CNF, encoder: Encoder) -> None:
    """Raise `InvalidValueError` unless the field takes the features of the encoder."""
    view = flow.bind()
    if not view.takes_context or view.context_shape not in (None, encoder.features_shape):
        takes = f"of shape {view.context_shape}" if view.takes_context else "none"
        raise InvalidValueError(
            f"the encoder makes features of shape {encoder.features_shape}, and the field {view.name} takes "
            f"contexts {takes}; build it with context_shape={encoder.features_shape}"
        )
