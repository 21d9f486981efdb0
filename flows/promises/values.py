"""The examination of a field's values."""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from flows.errors import FlowsError, InvalidValueError
from flows.promises.failures import explained
from flows.promises.traits import Traits

FEW = 3  # points of an examination
MAX_BUFFERS = 4  # that a field may return in turn
REGISTERED = {"_parameters", "_buffers", "_modules"}  # attributes of a module that hold what it has registered
OF_TORCH = set(vars(nn.Module()))  # attributes of every module, among them its hooks
MAX_ENTRIES = 10_000  # of a container whose contents are put back
TIMES = (0.37, 0.61, 0.18)
ADAPTER = "`t.reshape(-1, *[1] * (x.ndim - 1))` suits both, and flows.fields.Adapter(time='column') hands it on so"


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
            return _call(self.field)(*given)
        copies = {name: buffer.clone() for name, buffer in self.frozen.items()}
        return torch.func.functional_call(self.field, copies, given)

    def times(self, number: int) -> Tensor:
        """Different times, (number,)."""
        return torch.tensor(TIMES, dtype=self.x.dtype, device=self.x.device).repeat(number // FEW + 1)[:number]


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


def _call(field: Any) -> Callable[..., Any]:
    """The field without compilation, which would compile once more for each question."""
    if getattr(field, "_orig_mod", None) is not None:
        return field._orig_mod
    if isinstance(field, nn.Module) and field.__dict__.get("_compiled_call_impl") is not None:
        return field._call_impl
    return field


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
        subject = _specimen(field, name, x, few, context)
        if subject is None:
            return
        traits.takes_any_batch = not subject.whole
        with torch.no_grad():
            _look_for_side_effects(subject, traits)
            if _look_for_state(subject, traits):
                return
            value = _look_at_times(subject, traits)
            _look_at_rows(subject, traits, value)


def _specimen(field: Any, name: str, x: Tensor, few: Tensor, context: Tensor | None) -> Specimen | None:
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


def _attempt(subject: Specimen, t: Tensor, x: Tensor, context: Tensor | None = None) -> tuple[Tensor | None, str]:
    """The value, or why there is none."""
    try:
        value = subject(t, x, context)
    except Exception as error:
        return None, _told(error)
    if not is_velocity(value, x):
        return None, f"it returns {tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__}"
    return value, ""


def _suitable_time(subject: Specimen) -> Tensor:
    """A time of the first shape that the field takes."""
    t = subject.times(1)[0]
    return t if _attempt(subject, t, subject.x)[0] is not None else t.expand(len(subject.x))


def _look_for_side_effects(subject: Specimen, traits: Traits) -> None:
    """In the arguments, in earlier outputs, in the grad mode and in the random numbers."""
    t, x, field = _suitable_time(subject), subject.x, _call(subject.field)
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
    t, x, name = _suitable_time(subject), subject.x, subject.name
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
        return False
    if drew:
        reason = "it draws random numbers, as dropout and noise do; call eval() on it, or remove the noise"
    else:
        reason = (
            "it keeps state between calls (a counter, a cache, numpy's or its own random numbers); let forward depend "
            "on t, x, context and parameters alone"
        )
    traits.refuses_solves = (
        f"the field {name} returned different values at the same t and x, so that it is no vector field and a solve "
        f"means nothing: {reason}"
    )
    return True


def _repeated(subject: Specimen, t: Tensor) -> list[Tensor]:
    """The value three times, with other evaluations in between, which a memory of the field would keep."""
    values = []
    for k in range(3):
        values.append(subject(t, subject.x))
        _attempt(subject, t + 0.1 * (k + 1), 0.7 * torch.flip(subject.x, (0,)) + 0.1)
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
        value, _ = _attempt(subject, t, x)
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
    scalar, _ = _attempt(subject, t, x)
    batch, why_batch = _attempt(subject, t.repeat(size), x)
    precision = tolerance(x)
    if scalar is None or batch is None:
        traits.expands_time = scalar is None
        value = batch if scalar is None else scalar
        assert value is not None  # as for `_specimen`
        if batch is None:
            traits.refuses_times = f"with t of shape ({size},) it fails ({why_batch})"
    elif differs(scalar, batch, precision):
        alone = [_attempt(subject, t, x[i : i + 1], _row(subject.context, i))[0] for i in range(size)]
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
        mixed, why = _attempt(subject, times, x)
        for i in range(min(size, FEW)):
            one = _attempt(subject, times[i].expand(size) if traits.expands_time else times[i], x)[0]
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
        found, _ = _attempt(subject, t.repeat(len(x)) if traits.expands_time else t, x, context)
        return found is not None and differs(found[: len(value[rows])], value[rows], tolerance(x))

    if others(slice(-1), torch.cat([x[:-1], 0.6 * x[-1:] - 0.3])):
        _refuse_rows(subject, traits)
    elif not subject.whole:
        for rows in (slice(-1), slice(1, None)):
            if others(rows, x[rows], None if context is None else context[rows]):
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


@contextmanager
def awake(field: Any) -> Iterator[None]:
    """Give parameters that are zero other values for a while: a field that starts at zero shows nothing."""
    asleep: list[tuple[Tensor, Tensor]] = []
    if isinstance(field, nn.Module):
        with torch.no_grad():
            for weights in field.parameters():
                plain = weights.is_floating_point() and not isinstance(weights, nn.parameter.UninitializedParameter)
                if plain and weights.numel() and weights.device.type != "meta" and not bool(weights.any()):
                    asleep.append((weights, weights.data))
                    ramp = torch.linspace(0.1, 0.6, weights.numel(), dtype=weights.dtype, device=weights.device)
                    weights.data = ramp[torch.randperm(len(ramp), generator=torch.Generator().manual_seed(0))].view_as(
                        weights
                    )
    try:
        yield
    finally:
        for weights, data in asleep:
            weights.data = data


@contextmanager
def untouched(field: Any, device: torch.device) -> Iterator[None]:
    """Put random numbers, buffers, attributes and modes back."""
    modules = list(field.modules()) if isinstance(field, nn.Module) else []
    buffers = [(buffer, buffer.detach().clone(), buffer._version) for module in modules for buffer in _own(module)]
    attributes = [(module.__dict__, _attributes(module)) for module in modules]
    generators = torch.get_rng_state(), random.getstate()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    numpy = sys.modules.get("numpy")
    numpy_state = None if numpy is None else numpy.random.get_state()
    recording, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    precision = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    try:
        if precision is None:
            yield
        else:  # autocast would keep weights that were converted without gradients
            with torch.autocast(device.type, dtype=precision, cache_enabled=False):
                yield
    finally:
        torch.set_grad_enabled(recording)
        torch.set_default_dtype(dtype)
        torch.set_rng_state(generators[0])
        random.setstate(generators[1])
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
        for own, (plain, containers) in attributes:
            for key in own.keys() - plain.keys() - REGISTERED:
                del own[key]
            own.update(plain)
            for container, content in containers:
                _refill(container, content)
        with torch.no_grad():
            for buffer, content, count in buffers:
                if buffer._version != count:
                    buffer.detach().copy_(content)


def _own(module: nn.Module) -> list[Tensor]:
    return [buffer for buffer in module._buffers.values() if buffer is not None and not buffer.is_inference()]


def _attributes(module: nn.Module) -> tuple[dict[str, Any], list[tuple[Any, Any]]]:
    """The values of a module's own attributes, and the contents of its containers."""
    plain = {key: value for key, value in module.__dict__.items() if key not in REGISTERED}
    containers = [pair for key, value in plain.items() if key not in OF_TORCH for pair in _containers(value)]
    return plain, containers


def _containers(value: Any, depth: int = 3) -> Iterator[tuple[Any, Any]]:
    """A container with its contents, and those within it."""
    if isinstance(value, list | dict | set | deque) and len(value) <= MAX_ENTRIES:
        yield value, dict(value) if isinstance(value, dict) else list(value)
        for part in value.values() if isinstance(value, dict) else value:
            yield from _containers(part, depth - 1) if depth else ()


def _refill(container: Any, content: Any) -> None:
    container.clear()
    container.extend(content) if isinstance(container, list | deque) else container.update(content)
