"""A field with a few points, and how two of its values are compared."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flows.errors import FlowsError, InvalidValueError
from flows.promises.failures import explained

FEW = 3  # points of an examination
TIMES = (0.37, 0.61, 0.18)
TRACING: set[int] = set()  # the threads in which steps of solvers are compiled, which is told of in all of them


@dataclass
class Specimen:
    """A field with a few points to look at it.

    Args:
        field: called as `field(t, x)` or `field(t, x, context)`.
        name: of the field.
        x: the points, (B, *event).
        context: of the points.
        whole: whether these are all points of the caller's batch, because the field takes no other number.
    """

    field: Any
    name: str
    x: Tensor
    context: Tensor | None
    whole: bool = False
    record: bool = True  # whether it is evaluated with autograd on, unless said otherwise
    frozen: dict[str, Tensor] | None = None

    def __call__(self, t: Tensor, x: Tensor, context: Tensor | None = None, record: bool | None = None) -> Tensor:
        """The value at copies of the arguments, as a constant."""
        with torch.set_grad_enabled(self.record if record is None else record):
            return self.raw(t, x, context).detach().clone()  # it may be memory that the field uses again

    def raw(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The value at copies of the arguments."""
        context = self.context if context is None else context
        x = x if x.requires_grad or not torch.is_grad_enabled() else x.detach().requires_grad_()
        given = (t.clone(), x.clone()) if context is None else (t.clone(), x.clone(), context.clone())
        if self.frozen is None:
            return uncompiled(self.field)(*given)
        copies = {name: buffer.clone() for name, buffer in self.frozen.items()}
        return torch.func.functional_call(self.field, copies, given)

    def times(self, number: int) -> Tensor:
        """Different times, (number,)."""
        return torch.tensor(TIMES, dtype=self.x.dtype, device=self.x.device).repeat(number // FEW + 1)[:number]


def is_transformed() -> bool:
    """Whether this runs inside torch.compile or a transform of torch.func, where values cannot be looked at."""
    functorch = getattr(torch._C, "_functorch")  # noqa: B009 (it has no stubs)
    if torch.compiler.is_dynamo_compiling():
        return True
    elsewhere = bool(TRACING) and threading.get_ident() not in TRACING
    return (torch.compiler.is_compiling() and not elsewhere) or functorch.peek_interpreter_stack() is not None


def is_velocity(value: Any, x: Tensor) -> bool:
    """Whether a value can be compared: a finite real tensor shaped like `x`."""
    return (
        isinstance(value, Tensor)
        and value.shape == x.shape
        and value.is_floating_point()
        and value.device == x.device
        and bool(value.isfinite().all())
    )


def tolerance(x: Tensor) -> float:
    """The relative difference that other batch sizes and kernels may make."""
    if torch.is_autocast_enabled(x.device.type) or x.dtype.itemsize < 4:
        return 0.05
    if x.dtype == torch.float64:
        return 1e-7
    return 1e-4 if x.device.type == "cpu" else 5e-3  # with tf32


def differs(a: Tensor, b: Tensor, relative: float) -> bool:
    """Whether two values differ by more than rounding."""
    scale = torch.maximum(a.abs().max(), b.abs().max())
    return bool((a - b).abs().max() > relative * scale)


def uncompiled(field: Any) -> Callable[..., Any]:
    """The field without compilation, which would compile once more for each question."""
    if getattr(field, "_orig_mod", None) is not None:
        return field._orig_mod
    if isinstance(field, nn.Module) and field.__dict__.get("_compiled_call_impl") is not None:
        return field._call_impl
    return field


def specimen_of(field: Any, name: str, x: Tensor, few: Tensor, context: Tensor | None) -> Specimen | None:
    """The field with a few points, or with the caller's where it takes no other number.

    Raises:
        InvalidValueError: it takes neither.
    """
    rows = None if context is None else _few_contexts(context.detach())
    whole = None if context is None else context.detach()
    failures: list[tuple[str, Exception]] = []
    for record in (True, False):
        for few_or_all in (Specimen(field, name, few, rows), Specimen(field, name, x.detach(), whole, True)):
            few_or_all.record = record
            for t in (few_or_all.times(1)[0], few_or_all.times(1).expand(len(few_or_all.x))):
                try:
                    with torch.set_grad_enabled(record):
                        value = few_or_all.raw(t, few_or_all.x)
                except (FlowsError, torch.OutOfMemoryError):
                    raise
                except Exception as error:  # whatever a stranger raises; the next shape may suit it
                    failures.append((f"with t of shape {tuple(t.shape)} it raised {_told(error)}", error))
                    continue
                if is_velocity(value, few_or_all.x):
                    return few_or_all
                return None  # the caller's own evaluation will say what is wrong, for the caller's own points
    error = failures[0][1]
    known = explained(error, name)
    if known is not error:
        raise known from error
    reasons = "; ".join(dict.fromkeys(reason for reason, _ in failures[2:4]))
    given = "t and x" if context is None else "t, x and the context"
    raise InvalidValueError(
        f"the field {name} cannot be evaluated at {given} for points of shape {tuple(x.shape)}: {reasons}. A field "
        "is called as forward(t, x) or forward(t, x, context), with t of shape () or (B,); flows.fields.Adapter calls "
        "networks with other arguments"
    ) from error


def _few_contexts(
    context: Tensor,  # (B, *context)
) -> Tensor:  # (FEW, *context)
    """Contexts that differ from each other where they are numbers, so that mixing them shows."""
    rows = context[torch.arange(FEW) % len(context)]
    if not rows.is_floating_point():
        return rows
    return rows + 0.03 * torch.arange(FEW).to(rows).view(-1, *[1] * (rows.ndim - 1))


def _told(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def attempt(subject: Specimen, t: Tensor, x: Tensor, context: Tensor | None = None) -> tuple[Tensor | None, str]:
    """The value, or why there is none."""
    try:
        value = subject(t, x, context)
    except Exception as error:
        return None, _told(error)
    if not is_velocity(value, x):
        return None, f"it returns {tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__}"
    return value, ""


def suitable_time(subject: Specimen) -> Tensor:
    """A time of the first shape that the field takes."""
    t = subject.times(1)[0]
    return t if attempt(subject, t, subject.x)[0] is not None else t.expand(len(subject.x))
