"""How a solve fails: where, because of what, and what to try."""

from __future__ import annotations

import math
from collections.abc import Sequence

from flows.errors import ComputationError
from flows.solvers.problem import ADJOINT, State, batch_size_of, by_sample
from flows.solvers.statistics import Attempt

_TRAINING = "while training, a lower learning rate, a smaller gradient_clip or a regulariser"


class SolverError(ComputationError):
    """A solve that cannot go on; the message says where, because of what, and three things to try."""

    def __init__(
        self,
        message: str,
        t: float,
        dt: float,
        component: str | None = None,  # of the state
        sample: int | None = None,  # its index in the batch
    ) -> None:
        super().__init__(message)
        self.t = t
        self.dt = dt
        self.component = component
        self.sample = sample

    def retold(self, message: str) -> SolverError:
        """The same failure in other words."""
        return SolverError(message, self.t, self.dt, self.component, self.sample)


def step_limit(
    direction: str,
    max_steps: int,
    t: float,
    dt: float,
    last: Attempt | None = None,
    max_step: float = math.inf,
) -> SolverError:
    """No end in sight, since steps are short, be it that ``max_step`` keeps them so."""
    if abs(dt) < max_step:
        cause = f"{'' if last is None else _limited(last)}: the field is stiff there"
        advice = ("larger rtol and atol", _TRAINING, "a larger max_steps")
    else:
        cause = ", which is max_step"
        advice = ("a larger max_step", "none at all, since rtol and atol limit steps as well", "a larger max_steps")
    return SolverError(
        f"the {direction} solve reached t = {t:.6g} after max_steps = {max_steps} steps, the last of size "
        f"{abs(dt):.2g}{cause}. {_advice(*advice)}",
        t,
        dt,
        None if last is None else last.component,
        None if last is None else last.sample,
    )


def underflow(direction: str, rtol: float, atol: float, t: float, dt: float, last: Attempt | None) -> SolverError:
    """Steps too short for the clock."""
    return SolverError(
        f"the {direction} solve underflowed at t = {t:.6g}, dt = {dt:.2g}: no step meets rtol = {rtol:g} and "
        f"atol = {atol:g}{'' if last is None else _limited(last)}. "
        + _advice(
            "larger tolerances (float32 resolves about 1e-6) or float64",
            "a fixed-step method such as rk4, since a field with jumps in t or x cannot be solved adaptively",
            _TRAINING,
        ),
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
    """NaN or infinite values, in the state if it has any, else in its derivatives, else in ``last``, from there."""
    found = first_bad(names, state)
    if found is not None:
        name, sample, count = found
        where = f"the {name.replace('_', '-')} of sample {sample}"
        what = f"the state holds NaN or infinite values from the start ({count} of them, the first in {where})"
        advice = ("to check the input", "to standardise the data", "float64 if the values have overflowed")
    else:
        advice = (
            "to look for a division, a logarithm or an overflow in the field",
            _TRAINING,
            "float64, or steps that are shorter from the start",
        )
        found = None if derivatives is None else first_bad(names, derivatives)
        if found is not None:
            name, sample, count = found
            what = f"{_derivative(name)} has {count} NaN or infinite values there, the first for sample {sample}"
        elif last is None:  # the norm of values that are finite overflows
            name, sample, what = None, None, "steps from there end in NaN or infinite values"
        else:
            name, sample = last.component, last.sample
            what = f"a step from there of size {abs(last.dt):.2g}, the shortest that may be, ends in NaN or infinite "
            what += f"values, the first in the {name.replace('_', '-')} of sample {sample}"
    return SolverError(
        f"the {direction} solve failed at t = {t:.6g}, dt = {dt:.2g}: {what}. {_advice(*advice)}", t, dt, name, sample
    )


def blow_up(direction: str, method: str, t: float, dt: float, names: Sequence[str], state: State) -> SolverError:
    """A fixed-step method has arrived at NaN or infinite values; what has no name is the gradient of a parameter."""
    name, sample, _ = first_bad(names, state) or ("gradient of a parameter", None, 0)
    return SolverError(
        f"the {direction} solve is not finite at t = {t:.4g} with method {method!r}, dt = {dt:.2g}, the first in the "
        f"{name.replace('_', '-')}{'' if sample is None else f' of sample {sample}'}. "
        + _advice(
            "a smaller step_size",
            "an adaptive method such as 'dopri5', which says where the field gets stiff",
            "to look for a division, a logarithm or an overflow in the field, or a training run that has diverged",
        ),
        t,
        dt,
        name,
        sample,
    )


def gave_up(method: str, t: float, dt: float, last: Attempt) -> SolverError:
    """A solver of scipy has stopped on its way."""
    return SolverError(
        f"method {method!r} has stopped at t = {t:.4g}{_limited(last)}. "
        + _advice("larger rtol and atol", "dopri5, which says where the field gets stiff", _TRAINING),
        t,
        dt,
        last.component,
        last.sample,
    )


def first_bad(names: Sequence[str], components: State) -> tuple[str, int, int] | None:
    """The first component with NaN or infinite values, its first such sample, and how many values."""
    batch_size = batch_size_of(components)
    for name, component in zip(names, components, strict=False):  # an adjoint solve has more
        bad = ~component.isfinite()
        if bool(bad.any()):
            samples = by_sample(bad.float(), batch_size, name.removeprefix(ADJOINT) == names[0]) > 0
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
