"""Which errors drive the step size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flows.arguments import checked
from flows.checks import check_number
from flows.errors import InvalidValueError
from flows.shares import Share
from flows.solvers.problem import ADJOINT, Dynamics, State, mean_by_sample


@checked
@dataclass(frozen=True)
class ErrorControl:
    """Weights of the parts of the state whose errors drive the step size of an adaptive method.

    Let e_c be the error estimate of component c in a step, y_c the component before the step and y′_c after it. The
    step is accepted when

        max_c w_c ‖e_c / (atol + rtol · max(|y_c|, |y′_c|))‖ ≤ 1,

    and the same number sets the size of the next step. By default positions and log-density have weight 1, and path
    costs (regularisers) have weight 0, so that a noisy cost cannot make the solve expensive. NaN or infinite values in
    any component reject the step, whatever its weight.

    The norm is the root mean square over batch and event. A hard sample can hide among easy ones: its error may exceed
    the tolerance by a factor of up to the root of the batch size. With `per_sample=True` the norm is the largest of the
    samples' root mean squares, so that every sample meets the tolerance. It takes more steps.

    Args:
        state: weight of the first component, the positions.
        log_density: weight of the component named "log_density".
        path_costs: weight of every other component of dynamics with `component_names`. Components without names have
            the weight of the state.
        per_sample: see above. The batch is the first dimension of the first component and the last of the others.

    Raises:
        InvalidValueError: a weight is negative or infinite, or all weights are 0.

    Example:
        ```python
        import flows
        from flows.solvers import ErrorControl

        every_sample = flows.ODESolver(error_control=ErrorControl(per_sample=True))
        ```
    """

    state: float = 1.0
    log_density: float = 1.0
    path_costs: float = 0.0
    per_sample: bool = False

    def __post_init__(self) -> None:
        for name in ("state", "log_density", "path_costs"):
            check_number(f"the weight {name} of error_control", getattr(self, name), at_least=0)
        if self.state == self.log_density == self.path_costs == 0:
            raise InvalidValueError("error_control needs at least one positive weight, got 0 for all")
        if not isinstance(self.per_sample, bool):
            raise InvalidValueError(f"per_sample of error_control must be true or false, got {self.per_sample!r}")

    def weights(self, dynamics: Dynamics, names: Sequence[str]) -> tuple[float, ...]:
        """The weight of each component.

        Raises:
            InvalidValueError: all weights are 0.
        """
        if getattr(dynamics, "component_names", None) is None:
            weights = (self.state,) * len(names)
        else:
            known = {names[0]: self.state, "log_density": self.log_density}
            weights = tuple(known.get(name, self.path_costs) for name in names)
        if not any(weights):
            raise InvalidValueError(
                f"error_control gives weight 0 to every component of this solve ({', '.join(names)}), so no error "
                "would ever be too large; give one of them a positive weight"
            )
        return weights


@dataclass(frozen=True)
class ErrorNorm:
    """The weighted norms of the components in one solve, and the worst sample of each.

    Args:
        names, weights: of the components that count. The state may have more components after them.
        rtol, atol: tolerances.
        batch_size: B.
        per_sample: see `ErrorControl`.
        share: of this process, where several solve a batch together and take the same steps.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    rtol: float
    atol: float
    batch_size: int
    per_sample: bool = False
    share: Share | None = None

    def __call__(
        self, error: State, before: State, after: State, moving_share: float = 1.0
    ) -> tuple[list[float], list[int]]:
        """For each component, the weighted error over tolerance and the index of the worst sample.

        The mean is over the samples that move; those that have ended have no error.
        """
        return self.read(self.measure(error, before, after, moving_share), moving_share)

    @torch.no_grad()
    def measure(
        self, error: State, before: State, after: State, moving_share: float | Tensor = 1.0
    ) -> Tensor:  # (2, C), for `read`
        """The errors and the worst samples of all components in one tensor."""
        return self.reduced(self.squares(error, before, after), moving_share)

    @torch.no_grad()
    def squares(self, error: State, before: State, after: State) -> Tensor:  # (C, B)
        """The weighted errors over tolerance of all samples, squared."""
        rows = []
        for name, weight, e, a, b in zip(self.names, self.weights, error, before, after, strict=False):
            tolerance = torch.maximum(a.abs(), b.abs()).mul_(self.rtol).add_(self.atol)
            batch_first = name.removeprefix(ADJOINT) == self.names[0]
            rows.append(mean_by_sample((weight * e / tolerance).square(), self.batch_size, batch_first))
        return torch.stack(rows)

    @torch.no_grad()
    def reduced(self, squares: Tensor, moving_share: float | Tensor = 1.0) -> Tensor:  # (2, C)
        """What `measure` returns, from `squares`."""
        ratios = (squares.amax(1) if self.per_sample else squares.mean(1) / moving_share).sqrt()
        worst = squares.argmax(1)
        exact = torch.promote_types(ratios.dtype, torch.float32)  # bfloat16 cannot represent 257
        return torch.stack([ratios.to(exact), worst.to(exact)])

    def read(self, measured: Tensor, moving_share: float = 1.0) -> tuple[list[float], list[int]]:
        """Errors and samples from what `measure` found, over all processes that share the batch."""
        if self.share is not None:
            measured = self._together(measured, moving_share, self.share)
        ratios, worst = measured.tolist()  # waits for the device once
        return ratios, [int(index) for index in worst]

    def anywhere(self, found: bool, device: torch.device) -> bool:
        """Whether it is so in any process that shares the batch; all of them must call this."""
        if self.share is None:
            return found
        return bool(self.share.gather(torch.tensor([float(found)], device=device)).any())

    def worst(self, error: State, before: State, after: State, moving_share: float = 1.0) -> tuple[float, str, int]:
        """The largest error over tolerance with its component and sample. NaN counts as the largest."""
        return self.worst_of(self.measure(error, before, after, moving_share), moving_share)

    def worst_of(self, measured: Tensor, moving_share: float = 1.0) -> tuple[float, str, int]:
        """The same from what `measure` found."""
        ratios, samples = self.read(measured, moving_share)
        i = max(range(len(ratios)), key=lambda i: math.inf if math.isnan(ratios[i]) else ratios[i])
        return ratios[i], self.names[i], samples[i]

    def _together(self, measured: Tensor, moving_share: float, share: Share) -> Tensor:  # (2, C)
        """The same for the whole batch; the worst sample is that of the process with the largest error."""
        count = measured.shape[1]
        numbers = [measured.new_full((1, count), size) for size in (self.batch_size, moving_share * self.batch_size)]
        ratios, worst, sizes, moving = share.gather(torch.cat([measured, *numbers])).unbind(1)  # (count, C) each
        ratios = ratios.where(moving > 0, 0.0)  # where all samples of a process have ended, their mean is 0/0
        mean = ((ratios.square() * moving).sum(0) / moving.sum(0)).sqrt()
        together = ratios.amax(0) if self.per_sample else mean
        process = ratios.nan_to_num(nan=math.inf).argmax(0, keepdim=True)
        place = worst + sizes.cumsum(0) - sizes
        return torch.stack([together, place.gather(0, process)[0]])
