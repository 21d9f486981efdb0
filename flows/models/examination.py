"""A flow's field is examined at its first use, unless it is built in; see `flows.promises`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from flows.bases import Base
from flows.divergence import Analytic, Bottleneck, DivergenceEstimator, Probing
from flows.errors import FieldWarning, InvalidValueError, warn
from flows.models.steady import check_steady
from flows.promises import captured_tensors, examine_derivatives, examine_values
from flows.promises.captured import held_tensors
from flows.promises.derivatives import NUM_POINTS, check_receptive_radius
from flows.promises.jumps import in_words, jump_in_space, jumps_in_time
from flows.promises.regime import settings_of
from flows.promises.specimen import FEW, is_transformed
from flows.promises.traits import Traits, remember
from flows.promises.untouched import awake, untouched
from flows.vector_field import BoundField, bind

NEAR = 1e-6  # of the time: a jump that was found is one that the field states
MAX_SPANS = 16  # of solves for which the jumps of a field are kept
NUM_TIMES = 33  # at which tensors are looked for that a field uses a part of the time


def examine(
    base: Base,  # draws a few more points
    field: BoundField,  # bound to the context of `x`
    x: Tensor,  # (B, *event), flow space
    estimator: DivergenceEstimator | None = None,  # bound to the field; None: no divergence is taken
    matching: bool = False,  # no solve
    own_times: str = "",  # why it will be called with one time per sample, if it will
) -> None:
    """Find out at its first use whether a stranger's field suits a solve or matching, and at each solve its layers.

    Raises:
        FlowsError: it does not; the message names the promise and the cure.
    """
    if not matching:
        check_steady(field.field)
    for view in field.strangers:
        traits = view.traits
        if not is_transformed():
            traits.follow(settings_of(view.field))
        _examine(base, view, x, estimator, matching)
        if not matching and traits.refuses_solves:
            raise _refusal(traits, traits.refuses_solves)
        if own_times and traits.refuses_times:
            raise _refusal(
                traits,
                f"{own_times}, and the field {view.name} does not take t of shape (B,): {traits.refuses_times}. Let it "
                "take 0-d and (B,) times alike: `t.reshape(-1, *[1] * (x.ndim - 1))` broadcasts over the samples, and "
                "flows.fields.Adapter(time='column') calls a module with t of shape (B, 1)",
            )


def _refusal(traits: Traits, reason: str) -> InvalidValueError:
    """The error, after which the field is examined anew, for it may have been mended."""
    traits.forget()
    return InvalidValueError(reason)


def _examine(base: Base, view: BoundField, x: Tensor, estimator: DivergenceEstimator | None, matching: bool) -> None:
    inner = getattr(estimator, "estimator", estimator)  # what a compiled one stands for
    second = torch.is_grad_enabled() and inner is not None
    mode = getattr(inner, "mode", None)
    question = "values" if inner is None else f"{type(inner).__name__} {mode} {second}"
    if question in view.traits.examined or x.numel() == 0 or x.device.type == "meta" or is_transformed():
        return
    with torch.inference_mode(False):
        x = x.detach().clone()
        context = None if view.context is None else view.context.detach().clone()
        if _is_lazy(view.field):
            with torch.no_grad():
                bind(view.field, context, view.event_shape)(x.new_full((), 0.4), x)  # gives its weights a shape
        generator = torch.Generator(x.device).manual_seed(0)
        with torch.no_grad():
            few = base.sample((NUM_POINTS,), generator).to(x)
        if "values" not in view.traits.examined:
            view.traits.forget()  # what an examination found that ended in an error
            examine_values(view.field, view.name, view.traits, x, few[:FEW], context)
            view.traits.examined.add("values")
            stated: list[Tensor] = [*view.field.parameters()] if isinstance(view.field, nn.Module) else []
            foreign_tensors(bind(view.field, context, view.event_shape), x, stated, strict=False)
            remember(view.field, view.traits)
        if inner is None or view.traits.refuses_solves:
            return
        if not view.traits.takes_any_batch:
            few = x
        elif context is not None:
            context = context[torch.arange(NUM_POINTS) % len(context)]
        few_bound = bind(view.field, context, view.event_shape)
        closed = few_bound.value_and_divergence if isinstance(inner, Analytic) else None
        if isinstance(inner, Bottleneck):
            _check_pieces(few_bound, few)
        if isinstance(inner, Probing) and few_bound.receptive_radius is not None:
            with untouched(view.field, x.device), awake(view.field):
                check_receptive_radius(few_bound, view.name, few_bound.receptive_radius, few_bound.periodic, few)
        reason = examine_derivatives(few_bound, closed, view.field, view.name, few, mode == "forward", second)
        if second:
            view.traits.refuses_gradients[str(mode)] = reason
        view.traits.examined.add(question)
        rounds = torch.is_autocast_enabled(x.device.type)  # to values that jump a little
        if not matching and not rounds and view.traits.takes_any_batch and "jumps" not in view.traits.examined:
            view.traits.examined.add("jumps")
            _warn_of_jump_in_space(view, few, context)


def foreign_tensors(
    field: BoundField,
    x: Tensor,  # (B, *event)
    known: list[Tensor],
    strict: bool = True,
    span: tuple[float, float] = (0.0, 1.0),
) -> list[Tensor]:
    """The tensors that need gradients and are used by a stranger's field without being its parameters.

    Two evaluations of one point; where the field holds tensors that these do not use, two at each of some times, for it
    may use them later.

    Args:
        field: bound to the context of the points.
        x: the points.
        known: the parameters and what else has been stated.
        strict: whether a tensor that is nowhere to be found is an error.
        span: the times of the solve.

    Raises:
        InvalidValueError: there are such, and they cannot be found; or the field keeps tensors between evaluations.
    """
    found: list[Tensor] = []
    for view in field.strangers:
        for size in (1, len(x)) if x.numel() and not is_transformed() else ():
            points = x.detach()[:size].clone().requires_grad_()
            context = None if view.context is None else view.context.detach()[:size].clone()
            if context is not None and context.is_floating_point():
                context.requires_grad_()
            inputs = [points] if context is None else [points, context]
            times = torch.linspace(*span, NUM_TIMES).to(x)
            stated = [*known, *inputs]
            try:
                with untouched(view.field, x.device):
                    evaluate = partial(_outputs, view, context, points, times[NUM_TIMES // 3 : NUM_TIMES // 3 + 1])
                    used = captured_tensors(evaluate, view.field, view.name, stated, strict)
                    seen = {id(tensor) for tensor in (*stated, *used)}
                    if any(id(tensor) not in seen for tensor in held_tensors(view.field)):
                        evaluate = partial(_outputs, view, context, points, times)
                        used = captured_tensors(evaluate, view.field, view.name, stated, strict)
                found += used
                break
            except InvalidValueError:
                raise
            except Exception:  # a field that takes no other number of points; or the solve itself will fail
                continue
    return found


def look_for_jumps(
    base: Base,  # draws some points
    field: BoundField,
    x: Tensor,  # (B, *event)
    tensors: Sequence[Tensor],  # for which gradients are computed
    span: tuple[float, float] = (0.0, 1.0),
) -> None:
    """Find at its first use where a stranger's field jumps in time, and warn of it.

    Solves step onto the jumps that they know of. Where the field states its own, nothing needs to be said.
    """
    for view in field.strangers:
        traits = view.traits
        if span in traits.jumps or x.numel() == 0 or x.device.type == "meta" or is_transformed():
            continue
        if torch.is_autocast_enabled(x.device.type):  # it rounds to values that jump a little
            continue
        with torch.inference_mode(False):
            points = base.sample((NUM_POINTS,), torch.Generator(x.device).manual_seed(0)).to(x)
            context = None if view.context is None else view.context.detach().clone()
            if not traits.takes_any_batch:
                points = x.detach().clone()
            elif context is not None:
                context = context[torch.zeros(NUM_POINTS, dtype=torch.long)]
            try:
                evaluate = bind(view.field, context, view.event_shape)
                found = jumps_in_time(evaluate, view.field, points, tensors, span)
            except Exception:  # the solve itself will fail, with the caller's own points
                continue
        if len(traits.jumps) >= MAX_SPANS:
            traits.jumps.clear()
        known = torch.as_tensor(view.jumps, dtype=torch.float64).flatten().tolist()
        found = tuple(t for t in found if all(abs(t - stated) > NEAR * (1 + abs(t)) for stated in known))
        traits.jumps[span] = found
        if found:
            warn(
                f"the field {view.name} jumps in time, near t = {in_words(found)}: its value, or its derivative by a "
                "parameter. Solves step onto these times from now on. Let the field state them, as an attribute "
                "`jumps`, so that every solve does, and exactly; a field that changes smoothly needs fewer steps",
                FieldWarning,
            )


def _warn_of_jump_in_space(view: BoundField, x: Tensor, context: Tensor | None) -> None:
    if context is not None:
        context = context[:1]

    def evaluate(t: Tensor, points: Tensor) -> Tensor:
        rows = None if context is None else context.expand(len(points), *context.shape[1:])
        return bind(view.field, rows, view.event_shape)(t, points)

    try:
        found = jump_in_space(evaluate, view.field, x)
    except Exception:  # a field that does not take so many points
        return
    if found is not None:
        point, size = found
        where = f", near x = ({', '.join(f'{value:.4g}' for value in point.tolist())})" if point.numel() <= 3 else ""
        warn(
            f"the field {view.name} jumps in x{where}, by {size:.3g}: mass is lost or counted twice at a jump, and the "
            "divergence and all gradients miss it, so that log-densities are wrong there whatever the tolerances. "
            "Write comparisons, sign, round and argmax as smooth functions, such as sigmoid, tanh and softmax",
            FieldWarning,
        )


def _outputs(view: BoundField, context: Tensor | None, x: Tensor, times: Tensor) -> list[Tensor]:
    field = bind(view.field, context, view.event_shape)  # which keeps no tensors from another evaluation
    outputs = []
    for t in times:
        outputs.append(field(t, x))
        if field.value_and_divergence is not None:
            outputs += field.value_and_divergence(t, x)
    return outputs


def _check_pieces(field: BoundField, x: Tensor) -> None:
    if field.encode is None or field.decode is None:
        return
    t = x.new_full((), 0.4)
    with torch.no_grad():
        joined, value = field.decode(t, field.encode(t, x)), field(t, x)
    scale = float(value.abs().max())
    if joined.shape != value.shape or float((joined - value).abs().max()) > 1e-3 * scale:
        raise InvalidValueError(
            f"decode(t, encode(t, x)) of the field {field.name} is another velocity than its forward, so that "
            "Bottleneck would take the divergence of another field; mend them, or use Exact() or Hutchinson()"
        )


def _is_lazy(field: object) -> bool:
    return isinstance(field, nn.Module) and any(
        isinstance(weights, nn.parameter.UninitializedParameter) for weights in field.parameters()
    )
