"""What drives the step size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from flows.errors import InvalidValueError
from flows.solvers.problem import ADJOINT, Dynamics, State, by_sample


@dataclass(frozen=True)
class ErrorControl:
    r"""Which parts of the state drive the step size of an adaptive method, and how much each.

    A step with the error estimate e_c of component c, y_c before and y′_c after it, is accepted when

        max_c w_c ‖e_c / (atol + rtol · max(|y_c|, |y′_c|))‖ ≤ 1,

    and the size of the next step follows from the same number. By default the positions and their log-density
    count alike and path costs (regularisers) do not: they are integrated along, and a noisy one cannot make the
    solve expensive. A component that ends in NaN or infinite values rejects the step whatever its weight.

    The norm is the root mean square over batch and event, so that a hard sample hides among easy ones; its error
    may exceed the tolerance by the root of the batch size. With ``per_sample=True`` it is the largest of the root
    mean squares of the samples: every sample meets the tolerance, and what a sample gets depends on its neighbours
    no more than that. It takes more steps.

    Args:
        state: weight of the first component, the positions.
        log_density: weight of the component called "log_density".
        path_costs: weight of every other component of dynamics that name theirs (``component_names``). Components
            without names weigh as much as the state.
        per_sample: see above. The batch is the first dimension of the first component, and the last of the others.

    Raises:
        ValueError: a weight is negative, or all are 0.
    """

    state: float = 1.0
    log_density: float = 1.0
    path_costs: float = 0.0
    per_sample: bool = False

    def __post_init__(self) -> None:
        for name in ("state", "log_density", "path_costs"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise InvalidValueError(f"the weight {name} of error_control must be >= 0, got {value}")
        if self.state == self.log_density == self.path_costs == 0:
            raise InvalidValueError(
                "error_control must give some component a weight > 0, or no error would ever be too large"
            )

    def weights(self, dynamics: Dynamics, names: Sequence[str]) -> tuple[float, ...]:
        """The weight of each component.

        Raises:
            ValueError: all are 0.
        """
        if getattr(dynamics, "component_names", None) is None:
            weights = (self.state,) * len(names)
        else:
            known = {names[0]: self.state, "log_density": self.log_density}
            weights = tuple(known.get(name, self.path_costs) for name in names)
        if not any(weights):
            raise InvalidValueError(
                f"error_control gives weight 0 to all that is solved for here ({', '.join(names)}), so that no error "
                "would be too large; give one of them a weight > 0"
            )
        return weights


@dataclass(frozen=True)
class ErrorNorm:
    """The norms of the components of one solve, and the sample that is worst in each.

    Args:
        names, weights: of the components that count; the state may hold more of them behind.
        rtol, atol: tolerances.
        batch_size: B.
        per_sample: see :class:`ErrorControl`.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    rtol: float
    atol: float
    batch_size: int
    per_sample: bool = False

    @torch.no_grad()
    def __call__(self, error: State, before: State, after: State) -> tuple[list[float], list[int]]:
        """Weighted error over tolerance of each component, and the index of its worst sample."""
        rows = []
        for name, weight, e, a, b in zip(self.names, self.weights, error, before, after, strict=False):
            tolerance = torch.maximum(a.abs(), b.abs()).mul_(self.rtol).add_(self.atol)
            batch_first = name.removeprefix(ADJOINT) == self.names[0]
            rows.append(by_sample((weight * e / tolerance).square(), self.batch_size, batch_first))
        squares = torch.stack(rows)  # (C, B)
        ratios = (squares.amax(1) if self.per_sample else squares.mean(1)).sqrt()
        worst = squares.argmax(1)
        exact = torch.promote_types(ratios.dtype, torch.float32)  # bfloat16 has no 257
        ratios, worst = torch.stack([ratios.to(exact), worst.to(exact)]).tolist()  # the one wait for the device
        return ratios, [int(index) for index in worst]

    def worst(self, error: State, before: State, after: State) -> tuple[float, str, int]:
        """The largest error over tolerance, NaN if there is one, with its component and sample."""
        ratios, samples = self(error, before, after)
        i = max(range(len(ratios)), key=lambda i: math.inf if math.isnan(ratios[i]) else ratios[i])
        return ratios[i], self.names[i], samples[i]

    def extended(self, name: str, size: int) -> ErrorNorm:
        """With further components up to ``size``, all of that name."""
        more = size - len(self.names)
        return replace(self, names=(*self.names, *[name] * more), weights=(*self.weights, *[1.0] * more))
