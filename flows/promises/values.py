"""The examination of a field's values."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from flows.errors import InvalidValueError
from flows.promises.specimen import FEW, Specimen, attempt, differs, specimen_of, suitable_time, tolerance, uncompiled
from flows.promises.traits import Traits
from flows.promises.untouched import awake, untouched

NEW_OBJECTS = 32
MAX_BUFFERS = 4  # that a field may return in turn


def examine_values(
    field: Any,
    name: str,
    traits: Traits,
    x: Tensor,  # (B, *event), the caller's
    few: Tensor,  # (FEW, *event), points of the base
    context: Tensor | None,  # (B, *context)
) -> None:
    """Find what the field does beside returning one function of its arguments, and write it to `traits`.

    About twenty evaluations of three points. They leave no trace in random numbers, buffers, attributes and modes.

    Raises:
        InvalidValueError: a promise is broken that nothing can heal; the message names it and the cure.
    """
    with untouched(field, x.device), awake(field):
        subject = specimen_of(field, name, x, few, context)
        if subject is None:
            return
        traits.takes_any_batch = not subject.whole
        with torch.no_grad():
            _look_for_side_effects(subject, traits)
            if _look_for_state(subject, traits):
                return
            value = _look_at_times(subject, traits)
            _look_at_rows(subject, traits, value)
            _look_at_batch(subject, traits, x.detach(), context)


def _look_for_side_effects(subject: Specimen, traits: Traits) -> None:
    """In the arguments, in earlier outputs, in the grad mode and in the random numbers."""
    t, x, field = suitable_time(subject), subject.x, uncompiled(subject.field)
    context = subject.context
    given = [part.clone() for part in (t, x, context) if part is not None]
    if given[0].ndim:
        given[0] = given[0].contiguous()
    before = [part.clone() for part in given]
    counts = [part._version for part in given]
    for record in (False, True):  # writing to some tensors fails where autograd records
        with torch.set_grad_enabled(record):
            try:
                first = field(*given)
            except Exception:
                continue
            if torch.is_grad_enabled() != record:
                raise InvalidValueError(
                    f"the field {subject.name} changes autograd's mode and leaves it so, by torch.set_grad_enabled or "
                    "the like, which would drop gradients; use `with torch.no_grad():` or `with torch.enable_grad():`"
                )
            if not isinstance(first, Tensor):
                continue
            kept = first.detach().clone()
            changed = [a._version != n or not torch.equal(a, b) for a, n, b in zip(given, counts, before, strict=True)]
            if any(changed):
                traits.copies_inputs = True
                given = [part.clone() for part in before]
                counts = [part._version for part in given]
                kept = first = None
            others = [before[0], torch.flip(before[1], (0,)) * 0.7 + 0.1, *before[2:]]
            if kept is None or first is None:
                continue
            for _ in range(MAX_BUFFERS):
                try:
                    field(*(part.clone() for part in others))
                except Exception:
                    break
                if not torch.equal(first.detach(), kept):
                    traits.copies_output = True
                    break
    _look_for_seeds(subject, t, x)


def _look_for_seeds(subject: Specimen, t: Tensor, x: Tensor) -> None:
    after = []
    for seed in (1, 2):
        torch.default_generator.manual_seed(seed)
        before = torch.get_rng_state()
        subject(t, x)
        after.append(torch.get_rng_state())
    if torch.equal(*after) and not torch.equal(after[1], before):
        raise InvalidValueError(
            f"the field {subject.name} seeds torch's random numbers at each evaluation, so that all other draws of the "
            "program repeat; draw once, in __init__, or from a torch.Generator of its own"
        )


def _look_for_state(subject: Specimen, traits: Traits) -> bool:
    """Whether the field is no function of its arguments; then nothing else can be told."""
    t, x, name = suitable_time(subject), subject.x, subject.name
    module = subject.field if isinstance(subject.field, nn.Module) else nn.Module()
    named = dict(module.named_buffers())
    counts = {key: buffer._version for key, buffer in named.items()}
    state = _random_state(x.device)
    values = _repeated(subject, t)
    drew = not torch.equal(state, _random_state(x.device))
    precision = tolerance(x) / 10
    if not all(torch.isfinite(value).all() for value in values):
        return True
    written = [key for key, buffer in dict(module.named_buffers()).items() if buffer._version != counts.get(key, -1)]
    frozen = [key for key in written if _depends_on(subject, t, x, named.get(key), precision)]
    if frozen:
        if isinstance(module, torch.jit.ScriptModule):
            traits.refuses_solves = (
                f"the field {name} changes its buffers {', '.join(frozen)} at each evaluation, so that a solve would "
                "follow another ODE at each step; call eval() on it"
            )
            return True
        traits.frozen_buffers = tuple(frozen)
        subject.frozen = {key: named[key].clone() for key in frozen}
        values = _repeated(subject, t)
    moving = any(differs(values[0], value, precision) for value in values[1:])
    if not moving:
        try:
            moving = differs(values[0], subject(t, x, record=False), precision)
        except Exception:
            moving = False
        if moving:
            raise InvalidValueError(
                f"the field {name} returns another value where autograd does not record, so that samples and gradients "
                "would belong to different flows; let its value not depend on torch.is_grad_enabled()"
            )
        if not _remembers(subject, traits, t, values[0], precision):
            return False
    if drew:
        reason = "it draws random numbers, as dropout and noise do; call eval() on it, or remove the noise"
    else:
        reason = (
            "it keeps state between calls (a counter, a cache by time, numpy's or its own random numbers); "
            "let forward depend on t, x, context and parameters alone"
        )
    traits.refuses_solves = (
        f"the field {name} returned different values at the same t and x, so that it is no vector field and a solve "
        f"means nothing: {reason}"
    )
    return True


def _remembers(subject: Specimen, traits: Traits, t: Tensor, value: Tensor, precision: float) -> bool:
    """Whether a value is that of other points, which the field was given at the same time or in the same memory."""
    other = 0.7 * torch.flip(subject.x, (0,)) + 0.1
    again, _ = attempt(subject, t, other)
    nearby, _ = attempt(subject, t * (1 + 64 * torch.finfo(t.dtype).eps), other)
    if again is None or nearby is None:
        return False
    if differs(again, nearby, 10 * precision):
        return True
    if torch.equal(again, value):  # keyed by rounded times, unless the field depends on t alone
        second, third = attempt(subject, t + 0.01, other)[0], attempt(subject, t + 0.02, subject.x)[0]
        if second is not None and third is not None and differs(second, value, 0.02):
            return not differs(third, value, 0.3 * float((second - value).abs().max() / value.abs().max()))
    if subject.frozen is not None or traits.copies_inputs:
        return False
    context = () if subject.context is None else (subject.context.clone(),)
    alive = [t.clone() for _ in range(NEW_OBJECTS)]  # the last of them have identities that were not there before
    time, place = alive[-1], subject.x.clone()
    try:
        with torch.set_grad_enabled(subject.record):
            call = uncompiled(subject.field)
            call(time, subject.x.clone(), *context)
            in_place_of_time = call(time, other.clone(), *context).detach().clone()
            again = call(alive[-2], other.clone(), *context).detach().clone()
            call(alive[-3], place, *context)
        with torch.no_grad():
            place.copy_(other)
        with torch.set_grad_enabled(subject.record):
            in_place_of_points = call(alive[-4], place, *context).detach().clone()
    except Exception:  # whatever a stranger raises
        return False
    return differs(in_place_of_time, again, precision) or differs(in_place_of_points, again, precision)


def _repeated(subject: Specimen, t: Tensor) -> list[Tensor]:
    """The value three times, with other evaluations in between, which a memory of the field would keep."""
    values = []
    for k in range(3):
        values.append(subject(t, subject.x))
        attempt(subject, t + 0.1 * (k + 1), 0.7 * torch.flip(subject.x, (0,)) + 0.1)
    return values


def _random_state(device: torch.device) -> Tensor:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)


def _depends_on(subject: Specimen, t: Tensor, x: Tensor, buffer: Tensor | None, precision: float) -> bool:
    """Whether the value depends on a buffer that evaluations write."""
    if buffer is None:
        return False
    kept = buffer.clone()
    values = []
    for shift in (0, 1):
        with torch.no_grad():
            if buffer.is_floating_point():
                buffer.copy_(torch.linspace(0.3, 1 + shift, buffer.numel()).view_as(buffer))
            else:
                buffer.copy_(kept + (5 * shift if buffer.dtype != torch.bool else 0))
        value, _ = attempt(subject, t, x)
        values.append(value)
    buffer.copy_(kept)
    if values[0] is None or values[1] is None:
        return values[0] is not values[1]
    return differs(values[0], values[1], precision)


def _look_at_times(subject: Specimen, traits: Traits) -> Tensor:
    """Which shapes of t the field takes; returns the value at one time."""
    x, size = subject.x, len(subject.x)
    times = subject.times(size)
    t = times[0]
    scalar, _ = attempt(subject, t, x)
    batch, why_batch = attempt(subject, t.repeat(size), x)
    precision = tolerance(x)
    if scalar is None or batch is None:
        traits.expands_time = scalar is None
        value = batch if scalar is None else scalar
        assert value is not None  # as for `_specimen`
        if batch is None:
            traits.refuses_times = f"with t of shape ({size},) it fails ({why_batch})"
    elif differs(scalar, batch, precision):
        alone = [attempt(subject, t, x[i : i + 1], _row(subject.context, i))[0] for i in range(size)]
        value = scalar
        if not subject.whole and all(one is not None for one in alone):
            truth = torch.cat([one for one in alone if one is not None])
            if differs(truth, scalar, precision):
                value, traits.expands_time = batch, True
                if differs(truth, batch, precision):
                    _refuse_rows(subject, traits)
        if not traits.expands_time:
            traits.refuses_times = (
                f"t of shape ({size},) gives another value than the same time as a scalar, because it broadcasts along "
                "another dimension than the batch"
            )
    else:
        value = scalar
    # The statistics of a batch depend on all its times; `_look_at_rows` tells that.
    if not traits.refuses_times and size > 1 and not _normalises_the_batch(subject.field):
        mixed, why = attempt(subject, times, x)
        for i in range(min(size, FEW)):
            one = attempt(subject, times[i].expand(size) if traits.expands_time else times[i], x)[0]
            if mixed is None or one is None or differs(mixed[i], one[i], precision):
                traits.refuses_times = why or "with different times, samples do not get their own time"
    return value


def _row(context: Tensor | None, i: int) -> Tensor | None:
    return None if context is None else context[i : i + 1]


def _look_at_rows(subject: Specimen, traits: Traits, value: Tensor) -> None:
    """Whether each sample's velocity is its own."""
    x, context, size = subject.x, subject.context, len(subject.x)
    if size < 2 or traits.refuses_solves:
        return
    t = subject.times(1)[0]

    def others(rows: slice, x: Tensor, context: Tensor | None = None) -> bool:
        """Whether these rows have other velocities among other samples."""
        found, _ = attempt(subject, t.repeat(len(x)) if traits.expands_time else t, x, context)
        return found is not None and differs(found[: len(value[rows])], value[rows], tolerance(x))

    if others(slice(-1), torch.cat([x[:-1], 0.6 * x[-1:] - 0.3])):
        _refuse_rows(subject, traits)
    elif not subject.whole:
        for rows in (slice(-1), slice(1, None), *(slice(i, i + 1) for i in range(size))):
            if others(rows, x[rows], None if context is None else context[rows]):
                _refuse_rows(subject, traits)


def _look_at_batch(subject: Specimen, traits: Traits, x: Tensor, context: Tensor | None) -> None:
    """Whether samples have other velocities in the caller's batch than among a few."""
    if subject.whole or len(x) <= FEW or traits.refuses_solves or subject.frozen is not None:
        return
    t, parts, given = subject.times(1)[0], [], x.clone()
    with suppress(Exception):  # the comparison below says what happens
        uncompiled(subject.field)(t.expand(len(x)).clone(), given, *(() if context is None else (context.clone(),)))
    if not torch.equal(given, x):
        return  # it writes into large batches, as the solve will say
    for number in (len(x), FEW):
        rows = None if context is None else context.detach()[:number]
        parts.append(attempt(subject, t.expand(number) if traits.expands_time else t, x[:number], rows)[0])
    whole, few = parts
    if whole is not None and few is not None and differs(whole[:FEW], few, tolerance(x)):
        _refuse_rows(subject, traits)


def _refuse_rows(subject: Specimen, traits: Traits) -> None:
    reason = (
        f"the field {subject.name} mixes the samples of a batch: the velocity of a point changes with the other points "
        "beside it, so that its density depends on the batch. Let each row of the output depend on the same row of x, "
        "t and context alone: check sums and means over dimension 0, reshapes and broadcasting; put normalisation over "
        "the batch into eval()"
    )
    if not _normalises_the_batch(subject.field):
        raise InvalidValueError(reason)
    traits.refuses_solves = reason  # flow matching may train it


def _normalises_the_batch(field: Any) -> bool:
    modules = field.modules() if isinstance(field, nn.Module) else ()
    return any(isinstance(module, _BatchNorm) and module.training for module in modules)
