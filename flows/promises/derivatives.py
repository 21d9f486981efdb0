"""The examination of a field's derivatives, as autograd finds them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from flows.errors import ComputationError, FlowsError, InvalidValueError
from flows.promises.failures import explained
from flows.promises.specimen import is_velocity
from flows.promises.untouched import awake, untouched

NUM_POINTS = 6
OTHER_TIMES = (0.09, 0.88)  # at which first derivatives are compared, too
MAX_DIMENSION = 64  # up to which a closed form is compared with the whole trace
STEPS = {torch.float64: 1e-4, torch.float32: 2e-2}  # of the finite differences, halved twice
PRECISION = {torch.float64: 1e-5, torch.float32: 2e-2}  # relative, of derivatives by differences
STRIDES = (0.25, 0.5, 1.0, 2.0, 4.0, -0.5, -1.0, -2.0, -4.0)  # over which a field of steps changes
Evaluate = Callable[[Tensor, Tensor], Any]


def examine_derivatives(
    evaluate: Evaluate,  # v(t, x), with context and healing
    closed_form: Evaluate | None,  # (v, div v)
    field: Any,
    name: str,
    x: Tensor,  # (n, *event), points of the examination
    forward: bool,
    second: bool,
) -> str:
    """Compare the derivatives that a divergence takes with differences of the field's values.

    Returns why the divergence cannot be differentiated, or nothing. That is for the backward pass to say, because
    there may be none.

    Args:
        evaluate: the field bound to the context of the points.
        closed_form: its closed-form divergence, if it is used.
        field, name: the module and its name.
        x: some points.
        forward: whether products are taken in forward mode.
        second: whether training differentiates them once more.

    Raises:
        InvalidValueError: autograd misses a part of the field, or a closed form is another field's.
        ComputationError: torch has no derivative of an operation; the message says what to use instead.
    """
    with untouched(field, x.device), awake(field):
        t = torch.full((), 0.43, dtype=x.dtype, device=x.device)
        if forward and _is_scripted(field):
            raise InvalidValueError(
                f"forward-mode products are wrong for {name}, which holds code of torch.jit: once optimised, it drops "
                "tangents without a word; use mode='reverse' for the divergence estimator, or the module unscripted"
            )
        try:
            with torch.enable_grad():
                value = evaluate(t, x.clone().requires_grad_().clone())
        except Exception:
            return ""  # the caller's own evaluation will fail, with the caller's own points
        if not is_velocity(value, x):
            return ""
        if closed_form is not None:
            _compare_closed_form(closed_form, evaluate, t, x, name)
            return ""
        comparison = _Comparison(evaluate, field, name, t, x, forward)
        for time in (None, *OTHER_TIMES):  # a part may be hidden for a part of the time
            at = comparison if time is None else replace(comparison, t=torch.full_like(t, time))
            if fault := at.confirmed(at.of_value):
                raise InvalidValueError(fault)
        return comparison.confirmed(comparison.of_derivative) if second else ""


@dataclass
class _Comparison:
    """Derivatives by autograd beside differences of values, at some points and in random directions."""

    evaluate: Evaluate
    field: Any
    name: str
    t: Tensor
    x: Tensor  # (n, *event)
    forward: bool

    def __post_init__(self) -> None:
        self.product = _forward_product if self.forward else _reverse_product

    def confirmed(self, fault_of: Callable[[Tensor, Tensor, Tensor], str]) -> str:
        """The fault if other points and directions show it too: near a kink, differences may mislead."""
        generator = torch.Generator().manual_seed(0)
        draw = lambda: torch.randn(self.x.shape, generator=generator, dtype=torch.float64).to(self.x)  # noqa: E731
        fault = ""
        for shift in (0.0, 0.1):
            directions, weights = draw(), draw()
            directions = directions / directions.flatten(1).norm(dim=1).view(-1, *[1] * (self.x.ndim - 1))
            points = self.x + shift * draw() if shift else self.x
            fault = fault_of(points, directions, weights)
            if not fault:
                break
        return fault

    def of_value(self, x: Tensor, directions: Tensor, weights: Tensor) -> str:
        """Whether the Jacobian is that of the values."""
        try:
            first = self.product(self.evaluate, self.t, x, directions, weights, False)
        except RuntimeError as error:
            known = explained(error, self.name)
            if known is not error:
                raise known from error
            if isinstance(error, FlowsError):
                raise
            if self.forward:
                raise ComputationError(
                    f"forward-mode products fail for the field {self.name} ({_first_line(error)}); use mode='reverse' "
                    "for the divergence estimator"
                ) from error
            return ""  # the caller's own evaluation will fail
        if first is None:
            return ""  # `linearise` says it
        change = _differences(lambda y: _inner(weights, _value(self.evaluate, self.t, y)), x, directions)
        size = _inner(weights.abs(), _value(self.evaluate, self.t, x).abs())
        if _contradicts(first, change, size, x):
            return _missing(self.name, "value", first, change[0], self.forward)
        return self._of_steps(x, directions, weights) if not bool(first.any()) else ""

    def _of_steps(self, x: Tensor, directions: Tensor, weights: Tensor) -> str:
        """Whether values change although all derivatives are 0."""
        values = [_value(self.evaluate, self.t, x)]
        for length in STRIDES:
            y = x + length * directions
            product = self.product(self.evaluate, self.t, y, directions, weights, False)
            if product is None or bool(product.any()):
                return ""
            values.append(_value(self.evaluate, self.t, y))
        changed = torch.stack([(value != values[0]).flatten(1).any(1) for value in values]).any(0)
        if int(changed.sum()) < 2:
            return ""
        return (
            f"the field {self.name} changes by steps: its values differ from point to point, and all its derivatives "
            "are 0, so that log-densities would be wrong and nothing would be learnt. Look for round, floor, sign, "
            "argmax and comparisons, and use smooth functions such as tanh, sigmoid and softmax"
        )

    def of_derivative(self, x: Tensor, directions: Tensor, weights: Tensor) -> str:
        """Whether the products can be differentiated, and rightly."""
        try:
            slope = _second_product(self.product, self.evaluate, self.t, x, directions, weights, self.field)
        except RuntimeError as error:
            known = explained(error, self.name)
            if known is not error:
                return str(known)
            return (
                f"the divergence of the field {self.name} cannot be differentiated "
                f"({_first_line(error)}), which training by likelihood needs; flow matching with "
                "divergence_weight=0 does not"
            )

        def product(y: Tensor) -> Tensor:
            return _constant(self.product, self.evaluate, self.t, y, directions, weights)

        bend = _differences(product, x, directions)
        if _contradicts(slope, bend, product(x).abs(), x):
            return _missing(self.name, "derivative", slope, bend[0], self.forward)
        return ""


def _missing(name: str, what: str, found: Tensor, expected: Tensor, forward: bool) -> str:
    worst = int((found - expected).abs().argmax())
    other = ", or use mode='reverse' for the divergence estimator" if forward else ""
    if forward and what == "derivative":
        other += ": the forward mode of torch's LayerNorm and InstanceNorm cannot be differentiated once more"
    return (
        f"autograd misses a part of the field {name}: in one direction its {what} changes by {expected[worst]:.4g} a "
        f"unit, and the derivative by autograd is {found[worst]:.4g}, so that log-densities and their gradients would "
        "be wrong. Look for detach(), .data, numpy, torch.no_grad(), or an autograd.Function whose backward is not the "
        f"derivative of its forward{other}"
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0]


def _inner(a: Tensor, b: Tensor) -> Tensor:  # (B,)
    return (a * b).flatten(1).sum(1)


def _value(evaluate: Evaluate, t: Tensor, x: Tensor) -> Tensor:
    with torch.enable_grad():  # as fields with derivatives inside need it
        return evaluate(t, x.clone().requires_grad_().clone()).detach().clone()


def _reverse_product(
    evaluate: Evaluate, t: Tensor, x: Tensor, directions: Tensor, weights: Tensor, graph: bool
) -> Tensor | None:  # (B,), wᵀJu
    with torch.enable_grad():
        leaf = x if x.requires_grad else x.clone().requires_grad_()
        value = evaluate(t, leaf)
        if not value.requires_grad:
            return None
        # The graph may be that of a tensor which the caller computed before.
        (gradient,) = torch.autograd.grad(value, leaf, weights, True, create_graph=graph, allow_unused=True)
        return None if gradient is None else _inner(gradient, directions)


def _forward_product(
    evaluate: Evaluate, t: Tensor, x: Tensor, directions: Tensor, weights: Tensor, graph: bool
) -> Tensor | None:  # (B,), wᵀJu
    with torch.set_grad_enabled(graph):
        return _inner(weights, torch.func.jvp(lambda y: evaluate(t, y), (x,), (directions,))[1])


def _constant(product: Any, evaluate: Evaluate, t: Tensor, x: Tensor, directions: Tensor, weights: Tensor) -> Tensor:
    found = product(evaluate, t, x.detach(), directions, weights, False)
    return torch.zeros(len(x)).to(x) if found is None else found.detach()


def _second_product(
    product: Any, evaluate: Evaluate, t: Tensor, x: Tensor, directions: Tensor, weights: Tensor, field: Any
) -> Tensor:  # (B,), the derivative of wᵀJu along u
    leaf = x.clone().requires_grad_()
    with torch.enable_grad():
        found = product(evaluate, t, leaf, directions, weights, True)
        if found is None or not found.requires_grad:
            return torch.zeros_like(x).flatten(1).sum(1)
        parameters = [p for p in field.parameters() if p.requires_grad] if isinstance(field, nn.Module) else []
        gradient, *_ = torch.autograd.grad(
            found.sum(), [leaf, *parameters], retain_graph=True, allow_unused=True, materialize_grads=True
        )
    return _inner(gradient, directions)


def _differences(
    function: Callable[[Tensor], Tensor], x: Tensor, directions: Tensor
) -> list[Tensor]:  # three of (B,), with ever smaller steps
    step = STEPS.get(x.dtype, 0.1)
    return [(function(x + h * directions) - function(x - h * directions)) / (2 * h) for h in (step / 4, step / 2, step)]


def _contradicts(found: Tensor, differences: list[Tensor], size: Tensor, x: Tensor) -> bool:
    """Whether the differences agree with each other and not with the derivative, for two points if there are so many.

    The values, of magnitude `size` (B,), carry the rounding of some operations.
    """
    fine, middle, coarse = differences
    spread = torch.maximum((fine - middle).abs(), (middle - coarse).abs())
    scale = torch.maximum(found.abs(), fine.abs()).max()
    precision = PRECISION.get(x.dtype, 0.3)
    if torch.is_autocast_enabled(x.device.type):
        precision = 0.3
    rounding = 8 * torch.finfo(x.dtype).eps * size / (STEPS.get(x.dtype, 0.1) / 4)
    wrong = (found - fine).abs() > 5 * spread + precision * scale + rounding
    return bool(wrong.sum() >= min(2, len(wrong)))


def _compare_closed_form(closed_form: Evaluate, evaluate: Evaluate, t: Tensor, x: Tensor, name: str) -> None:
    value, divergence = closed_form(t, x)
    if not isinstance(divergence, Tensor) or divergence.shape != (len(x),):
        got = tuple(divergence.shape) if isinstance(divergence, Tensor) else type(divergence).__name__
        raise InvalidValueError(
            f"value_and_divergence of the field {name} must return one divergence a point, of shape ({len(x)},), "
            f"got {got}"
        )
    value, divergence = value.detach(), divergence.detach()
    loose = 1e-3 if x.dtype == torch.float32 else 1e-6 if x.dtype == torch.float64 else 0.1
    direct = _value(evaluate, t, x)
    if not is_velocity(value, x) or _apart(value, direct, loose):
        raise InvalidValueError(
            f"value_and_divergence of the field {name} returns another velocity than its forward, so that densities "
            "and samples would belong to different flows. A subclass that changes forward must change "
            "value_and_divergence too, or set it to None"
        )
    dimension = math.prod(x.shape[1:])
    if dimension > MAX_DIMENSION:
        return
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        flat = evaluate(t, leaf).flatten(1)
        if not flat.requires_grad:
            return
        trace = torch.zeros_like(flat[:, 0])
        for i in range(dimension):
            (row,) = torch.autograd.grad(flat[:, i].sum(), leaf, retain_graph=True, allow_unused=True)
            trace = trace if row is None else trace + row.flatten(1)[:, i]
    if _apart(divergence, trace.detach(), loose):
        raise InvalidValueError(
            f"value_and_divergence of the field {name} returns another divergence than the trace of its Jacobian: "
            f"{float(divergence[0]):.6g} where it is {float(trace[0]):.6g}; mend it, or set it to None"
        )


def check_receptive_radius(evaluate: Evaluate, name: str, radius: int, periodic: bool, x: Tensor) -> None:
    """Raise `InvalidValueError` if a velocity depends on sites of the grid beyond the radius that the field states."""
    grid = x.shape[2:]
    t = x.new_full((), 0.43)
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        value = evaluate(t, leaf.clone())
        if not is_velocity(value, x) or not value.requires_grad:
            return
        for centre in ((0,) * len(grid), tuple(size // 2 for size in grid)):
            (row,) = torch.autograd.grad(
                value[(slice(None), slice(None), *centre)].sum(), leaf, retain_graph=True, allow_unused=True
            )
            if row is None:
                continue
            sites = row.abs().amax((0, 1)).nonzero()
            distance = (sites - torch.tensor(centre, device=x.device)).abs()
            if periodic:
                distance = torch.minimum(distance, torch.tensor(grid, device=x.device) - distance)
            farthest = int(distance.max()) if len(sites) else 0
            if farthest > radius:
                around = torch.minimum(distance, torch.tensor(grid, device=x.device) - distance)
                if int(around.max()) <= radius:
                    raise InvalidValueError(
                        f"the field {name} states receptive_radius = {radius}, and sites at opposite edges see each "
                        "other, as in a layer with circular padding, so that Probing would miss a part of the "
                        "divergence; state periodic = True beside it, or choose Exact() or Hutchinson()"
                    )
                raise InvalidValueError(
                    f"the field {name} states receptive_radius = {radius}, and its velocity at one site depends on a "
                    f"site {farthest} sites away, so that Probing would miss a part of the divergence; state at least "
                    f"{farthest}, or choose Exact() or Hutchinson()"
                )


def _apart(a: Tensor, b: Tensor, relative: float) -> bool:
    scale = torch.maximum(a.abs().max(), b.abs().max()).clamp_min(1e-6)
    return bool((a - b).abs().max() > relative * scale)


def _is_scripted(field: Any) -> bool:
    kinds = (torch.jit.ScriptModule, torch.jit.ScriptFunction)
    modules = field.modules() if isinstance(field, nn.Module) else ()
    return any(
        isinstance(module, kinds) or any(isinstance(value, kinds) for value in module.__dict__.values())
        for module in modules
    )
