"""What is solved: the dynamics that the user writes, and the right-hand side that the methods see."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from flows.errors import InvalidValueError

ADJOINT = "adjoint of "  # prefix of a component's name for its adjoint
PARAMETERS = "gradient of a parameter"  # name of the components of an adjoint solve that belong to parameters

State = tuple[Tensor, ...]
Dynamics = Callable[[Tensor, State], State]  # (t, state) -> time derivative of each component


class RightHandSide:
    """Dynamics that count their evaluations and return derivatives in the dtype of the state.

    Args:
        dynamics: as passed to `flows.ODESolver.solve`.
        like: a state with the shapes, dtype and device to expect.
        count: called once per evaluation.
    """

    def __init__(self, dynamics: Dynamics, like: State, count: Callable[[], None]) -> None:
        self.dynamics = dynamics
        self.shapes = [tuple(component.shape) for component in like]
        self.dtype, self.device = like[0].dtype, like[0].device
        self.count = count

    def __call__(self, t: float | Tensor, state: State) -> State:
        self.count()
        is_tensor = isinstance(t, Tensor)
        time = t.to(self.dtype) if is_tensor else torch.full((), t, dtype=self.dtype, device=self.device)
        derivatives = self.dynamics(time, state)
        shapes = [tuple(derivative.shape) for derivative in derivatives]
        if shapes != self.shapes:
            raise InvalidValueError(f"the dynamics must return derivatives of shapes {self.shapes}, got {shapes}")
        return tuple(derivative.to(self.dtype) for derivative in derivatives)

    def fresh(self) -> RightHandSide:
        """The same function for a new graph, without tensors that the dynamics cached in earlier evaluations."""
        renew = getattr(self.dynamics, "fresh", None)
        renewed = copy.copy(self)
        renewed.dynamics = self.dynamics if renew is None else renew()
        return renewed


def component_names(dynamics: Dynamics, state: State) -> tuple[str, ...]:
    """The names of the components: `dynamics.component_names` if given, otherwise "state" and numbers."""
    names = getattr(dynamics, "component_names", None)
    if names is None:
        return "state", *(f"component {i}" for i in range(1, len(state)))
    if len(names) != len(state):
        raise InvalidValueError(
            f"component_names must name each of the {len(state)} components of the state, got {tuple(names)}"
        )
    return tuple(names)


def batch_size_of(state: State) -> int:
    """The first dimension of the first component."""
    return len(state[0]) if state[0].ndim else 1


def mean_by_sample(
    component: Tensor,  # (B, *event) if its batch dimension comes first, else (*, B)
    batch_size: int,
    batch_first: bool,
) -> Tensor:  # (B,)
    """The mean over all dimensions but the batch. Without a batch dimension, all samples have the same mean."""
    if batch_first and component.ndim > 0:
        return component if component.ndim == 1 else component.flatten(1).mean(1)
    if component.ndim > 0 and component.shape[-1] == batch_size:
        return component if component.ndim == 1 else component.reshape(-1, batch_size).mean(0)
    return component.mean().expand(batch_size)


def all_finite(*components: Tensor) -> bool:
    """Whether no value is NaN or infinite. Waits for the device once."""
    return bool(torch.stack([component.isfinite().all() for component in components]).all())
