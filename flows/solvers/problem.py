"""What is solved: the dynamics as the user writes them, and as the solvers see them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from flows.errors import ComputationError, InvalidValueError

ADJOINT = "adjoint of "  # before the name of a component, for what is solved beside it backwards

State = tuple[Tensor, ...]
Dynamics = Callable[[Tensor, State], State]  # (t, state) -> time derivative of each component


class RightHandSide:
    """Dynamics that count their evaluations and answer in the dtype of the state.

    Args:
        dynamics: as given to :meth:`flows.ODESolver.solve`.
        like: the initial state.
        count: called once an evaluation.
    """

    def __init__(self, dynamics: Dynamics, like: State, count: Callable[[], None]) -> None:
        self.dynamics = dynamics
        self.shapes = [tuple(component.shape) for component in like]
        self.dtype, self.device = like[0].dtype, like[0].device
        self.count = count

    def __call__(self, t: float | Tensor, state: State) -> State:
        self.count()
        time = torch.full((), t, dtype=self.dtype, device=self.device) if isinstance(t, float) else t.to(self.dtype)
        derivatives = self.dynamics(time, state)
        shapes = [tuple(derivative.shape) for derivative in derivatives]
        if shapes != self.shapes:
            raise InvalidValueError(f"the dynamics must return derivatives of shapes {self.shapes}, got {shapes}")
        return tuple(derivative.to(self.dtype) for derivative in derivatives)

    def fresh(self) -> RightHandSide:
        """The same for a new graph: with ``dynamics.fresh()`` where the dynamics keep tensors between evaluations."""
        renew = getattr(self.dynamics, "fresh", None)
        renewed = copy.copy(self)
        renewed.dynamics = self.dynamics if renew is None else renew()
        return renewed


def component_names(dynamics: Dynamics, state: State) -> tuple[str, ...]:
    """What the components are called: ``dynamics.component_names``, else "state" and numbers."""
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


def by_sample(
    component: Tensor,  # (B, *event) if its batch dimension comes first, else (*, B)
    batch_size: int,
    batch_first: bool,
) -> Tensor:  # (B,)
    """The mean over all but the batch; over everything for a component without a batch dimension."""
    if batch_first and component.ndim > 0:
        return component if component.ndim == 1 else component.flatten(1).mean(1)
    if component.ndim > 0 and component.shape[-1] == batch_size:
        return component if component.ndim == 1 else component.reshape(-1, batch_size).mean(0)
    return component.mean().expand(batch_size)


def all_finite(*components: Tensor) -> bool:
    """Whether no value is NaN or infinite; one wait for the device."""
    return bool(torch.stack([component.isfinite().all() for component in components]).all())


def random_state(device: torch.device) -> tuple[Tensor, ...]:
    """Of torch's global generators that dynamics on this device may draw from."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return tuple(states)


def same_random_state(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    """Whether nothing was drawn between the two."""
    return all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


def refuse_second_derivative(gradient: str) -> None:
    """Raise in a backward pass of which autograd would keep a graph: it would silently lack the solve."""
    if torch.is_grad_enabled():
        raise ComputationError(
            f"gradient={gradient!r} has first derivatives only, and create_graph=True asks for more; use "
            "gradient='backprop'"
        )


class Precision:
    """The autocast setting of the thread, to be restored where autograd evaluates the dynamics again.

    Without its cache of converted weights: what is cached without gradients would be used where they are needed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device_type = device.type
        self.enabled = torch.is_autocast_enabled(device.type)
        self.dtype = torch.get_autocast_dtype(device.type) if self.enabled else None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        if not self.enabled:
            yield
            return
        with torch.autocast(self.device_type, dtype=self.dtype, cache_enabled=False):
            yield
