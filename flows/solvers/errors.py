"""How a solve fails: where, why, and what to try."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch

from flows.errors import ComputationError
from flows.shares import anywhere, share_of_steps
from flows.solvers.problem import ADJOINT, PARAMETERS, State, batch_size_of, mean_by_sample
from flows.solvers.statistics import Attempt

TRAINING_ADVICE = "while training, a lower learning rate, a smaller gradient_clip or a regulariser"
EXPLOSION_ADVICE = ("a solve that ends before", "a field that grows less fast with the state", TRAINING_ADVICE)
LONGEST_MESSAGE = 2000  # bytes
GROWTH = 1e3  # from which on a state that cannot be followed is said to explode


class SolverError(ComputationError):
    """A solve cannot go on; the message says where, why, and three things to try.

    Args:
        message: the whole message.
        t, dt: time and step size of the failure.
        component: the component that limits the step or has bad values, if known.
        sample: its index in the batch, if known.
    """

    def __init__(
        self,
        message: str,
        t: float,
        dt: float,
        component: str | None = None,
        sample: int | None = None,
    ) -> None:
        super().__init__(message)
        self.t = t
        self.dt = dt
        self.component = component
        self.sample = sample

    def retold(self, message: str) -> SolverError:
        """The same failure with another message."""
        return SolverError(message, self.t, self.dt, self.component, self.sample)


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """A solve that fails in one process fails in all that share its batch, so that none waits for another.

    Adaptive steps fail in all of them anyway. Others may do so where the rows of one process explode.

    Raises:
        SolverError: the solve failed, here or elsewhere.
    """
    share, failed = share_of_steps(), None
    if share is None:
        yield
        return
    try:
        yield
    except SolverError as error:
        failed = error
    if not anywhere(failed is not None):
        return
    codes = torch.zeros(LONGEST_MESSAGE, dtype=torch.uint8)
    text = str(failed or "").encode()[:LONGEST_MESSAGE]
    codes[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
    told = [bytes(row.tolist()).rstrip(b"\0").decode(errors="ignore") for row in share.gather(codes)]
    raise failed or SolverError(f"{next(filter(None, told))} (in another process, for its rows of the batch)", 0.0, 0.0)


def step_limit(
    direction: str,
    max_steps: int,
    t: float,
    dt: float,
    last: Attempt | None = None,
    max_step: float = math.inf,
    growth: str = "",
) -> SolverError:
    """The solve takes too many steps, because the field is stiff or because of `max_step`.

    Args:
        growth: how far the state has grown, if it explodes; see `explosion`.
    """
    if growth:
        cause, advice = f": {growth}", EXPLOSION_ADVICE
    elif abs(dt) < max_step:
        cause = f"{'' if last is None else _limited(last)}: the field is stiff there"
        advice = ("larger rtol and atol", TRAINING_ADVICE, "a larger max_steps")
    else:
        cause = ", which is max_step"
        advice = ("a larger max_step", "no max_step, because rtol and atol limit steps too", "a larger max_steps")
    return SolverError(
        f"the {direction} solve reached t = {t:.6g} after max_steps = {max_steps} steps, the last of size "
        f"{abs(dt):.2g}{cause}. {_advice(*advice)}",
        t,
        dt,
        None if last is None else last.component,
        None if last is None else last.sample,
    )


def underflow(
    direction: str, rtol: float, atol: float, t: float, dt: float, last: Attempt | None, growth: str = ""
) -> SolverError:
    """Steps are too short for times of this dtype."""
    advice = (
        "larger tolerances (float32 resolves about 1e-6) or float64",
        "a fixed-step method such as rk4, if the field jumps in t or x",
        TRAINING_ADVICE,
    )
    cause = f"no step meets rtol = {rtol:g} and atol = {atol:g}{'' if last is None else _limited(last)}"
    return SolverError(
        f"the {direction} solve underflowed at t = {t:.6g}, dt = {dt:.2g}: {growth or cause}. "
        + _advice(*(EXPLOSION_ADVICE if growth else advice)),
        t,
        dt,
        None if last is None else last.component,
        None if last is None else last.sample,
    )


def not_finite(
    direction: str,
    t: float,
    dt: float,
    names: Sequence[str],
    state: State,
    derivatives: State | None = None,
    last: Attempt | None = None,
) -> SolverError:
    """NaN or infinite values in the state, or else in its derivatives, or else at the end of the `last` attempt."""
    found = first_bad(names, state)
    if found is not None:
        name, sample, count = found
        where = f"the {name.replace('_', '-')} of sample {sample}"
        what = f"the state holds NaN or infinite values from the start ({count} of them, the first in {where})"
        advice = ("checking the input", "standardising the data", "float64 if values overflow")
    else:
        advice = (
            "looking for a division, a logarithm or an overflow in the field",
            TRAINING_ADVICE,
            "float64, or a smaller max_step",
        )
        found = None if derivatives is None else first_bad(names, derivatives)
        if found is not None:
            name, sample, count = found
            what = f"{_derivative(name)} has {count} NaN or infinite values there, the first for sample {sample}"
        elif last is None:  # values are finite, but their norm overflows
            name, sample, what = None, None, "steps from there end in NaN or infinite values"
        else:
            name, sample = last.component, last.sample
            blamed = "a component" if name is None else f"the {name.replace('_', '-')} of sample {sample}"
            what = (
                f"a step of size {abs(last.dt):.2g}, the shortest possible, ends in NaN or infinite values, the first "
            )
            what += f"in {blamed}"
    return SolverError(
        f"the {direction} solve failed at t = {t:.6g}, dt = {dt:.2g}: {what}. {_advice(*advice)}", t, dt, name, sample
    )


def blow_up(direction: str, method: str, t: float, dt: float, names: Sequence[str], state: State) -> SolverError:
    """A fixed-step method has reached NaN or infinite values."""
    name, sample, _ = first_bad(names, state) or (PARAMETERS, None, 0)
    return SolverError(
        f"the {direction} solve is not finite at t = {t:.4g} with method {method!r}, dt = {dt:.2g}, the first in the "
        f"{name.replace('_', '-')}{'' if sample is None else f' of sample {sample}'}. "
        + _advice(
            "a smaller step_size",
            "an adaptive method such as 'flow5', which says where the field is stiff",
            "looking for a division, a logarithm or an overflow in the field, or a training run that has diverged",
        ),
        t,
        dt,
        name,
        sample,
    )


def explosion(begin: State, state: State, last: Attempt | None) -> str:
    """Say how far the state that limits steps has grown, if it seems to explode; else nothing."""
    if last is None or last.sample is None or last.sample >= len(state[0]):
        return ""
    before, now = (float(component[0][last.sample].detach().abs().max()) for component in (begin, state))
    usual = float(begin[0].detach().abs().max()) or 1.0
    if not now > GROWTH * max(before, usual):
        return ""
    grown = f"has grown from {before:.2g} to {now:.2g} and seems to explode in finite time"
    return f"the state of sample {last.sample} {grown}"


def gave_up(method: str, t: float, dt: float, last: Attempt) -> SolverError:
    """A solver of scipy has stopped before the end."""
    return SolverError(
        f"method {method!r} stopped at t = {t:.4g}{_limited(last)}. "
        + _advice("larger rtol and atol", "flow5, which says where the field is stiff", TRAINING_ADVICE),
        t,
        dt,
        last.component,
        last.sample,
    )


def first_bad(names: Sequence[str], components: State) -> tuple[str, int, int] | None:
    """The first component with NaN or infinite values, its first such sample, and the number of such values."""
    batch_size = batch_size_of(components)
    for name, component in zip(names, components, strict=False):  # an adjoint solve has more components
        bad = ~component.isfinite()
        if bool(bad.any()):
            samples = mean_by_sample(bad.float(), batch_size, name.removeprefix(ADJOINT) == names[0]) > 0
            return name, int(samples.int().argmax()), int(bad.sum())
    return None


def _advice(first: str, second: str, third: str) -> str:
    return f"Try (1) {first}; (2) {second}; (3) {third}"


def _limited(last: Attempt) -> str:
    if last.component is None:
        return ""
    return f", limited by the {last.component.replace('_', '-')} of sample {last.sample}"


def _derivative(name: str) -> str:
    named = {"state": "the velocity", "log_density": "its divergence"}
    return named.get(name, f"the derivative of {name.replace('_', '-')}")
