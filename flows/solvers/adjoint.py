"""Gradients by the adjoint ODE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flows.errors import InvalidValueError
from flows.shares import Share
from flows.solvers.problem import Compilable, RightHandSide, State
from flows.solvers.products import reached_gradients
from flows.solvers.replay import random_state, refuse_second_derivative, same_random_state
from flows.solvers.task import Task


def solve_with_adjoint(task: Task, state: State, parameters: tuple[Tensor, ...]) -> State:
    """The states at all outputs, with gradients from a second solve backwards in time.

    With a = ∂L/∂y the second solve is −da/dt = aᵀ ∂f/∂y and dL/dθ = −∫ aᵀ ∂f/∂θ dt. It solves for y again, and starts
    from the stored state at each of the times. a is scaled by its size at the start, so that the tolerances mean the
    same for the sum and for the mean over a batch. Samples with times of their own go back from output to output
    together: each runs through its own interval while a common time goes from 1 to 0.
    [Chen et al. 2018, arXiv:1806.07366]

    Raises:
        InvalidValueError: the dynamics draw from torch's global generators, as dropout does. The second solve would be
            that of another ODE.
    """
    return _Adjoint.apply(task, len(state), *state, *parameters)  # pyright: ignore[reportReturnType]


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, task: Task, count: int, *tensors: Tensor) -> State:
        device = tensors[0].device
        before = random_state(device)
        with task.precision():
            states = task.integrate(tensors[:count])
        if any(ctx.needs_input_grad) and not same_random_state(before, random_state(device)):
            raise InvalidValueError(
                "the dynamics draw random numbers, as dropout does; the adjoint solve would draw others and give the "
                "gradient of another function. Use gradient='checkpoint', which draws the same numbers again, or call "
                "eval() on the field"
            )
        ctx.task, ctx.count = task, count
        ctx.save_for_backward(*tensors[count:], *tensors[:count], *states)
        ctx.set_materialize_grads(False)
        return states

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("adjoint")
        task, count = ctx.task, ctx.count
        parameters = ctx.saved_tensors[: -2 * count]
        start, joined = ctx.saved_tensors[-2 * count : -count], ctx.saved_tensors[-count:]
        states = task.outputs.arrange(start, joined)
        given = task.outputs.spread(gradients, states)
        adjoint = tuple(g[-1] for g in given)
        totals = tuple(torch.zeros_like(parameter) for parameter in parameters)
        for i in range(task.outputs.size - 1, 0, -1):
            y = tuple(s[i] for s in states)
            scale = _size(adjoint, task.backward.norm.share)
            augmented = (*y, *(a / scale for a in adjoint), *(torch.zeros_like(parameter) for parameter in parameters))
            function, times = task.between(y, i)
            with task.precision():
                end = task.integrate_adjoint(_AdjointDynamics(function, parameters, augmented), augmented, *times)
            adjoint = tuple(scale * a + g[i - 1] for a, g in zip(end[count : 2 * count], given, strict=True))
            totals = tuple(total + scale * more for total, more in zip(totals, end[2 * count :], strict=True))
        return None, None, *adjoint, *totals


def _size(adjoint: State, share: Share | None) -> Tensor:
    """The largest root mean square of a component over the whole batch, or 1 if all are 0."""
    squares, count = torch.stack([a.square().mean() for a in adjoint]), len(adjoint[0])
    if share is not None:
        every = share.gather(torch.cat([squares, squares.new_full((1,), count)]))
        squares = (every[:, :-1] * every[:, -1:]).sum(0) / every[:, -1].sum()
    size = squares.max().sqrt()
    return torch.where(size > 0, size, torch.ones_like(size))


class _AdjointDynamics(RightHandSide):
    """d/dt (y, a, ∂L/∂θ) = (f, −aᵀ ∂f/∂y, −aᵀ ∂f/∂θ)."""

    def __init__(self, function: RightHandSide, parameters: tuple[Tensor, ...], like: State) -> None:
        super().__init__(self._derivatives, like, lambda: None, jumps=function.jumps)
        self.function = function
        self.parameters = parameters

    def count_evaluations(self, number: int) -> None:
        self.function.count_evaluations(number)

    def compilable(self) -> Compilable:
        inner, count = self.function.compilable(), len(self.function.shapes)

        def rebuild(tensors: Sequence[Tensor], parameters: Sequence[Tensor], like: State) -> RightHandSide:
            return _AdjointDynamics(inner.rebuild(tensors, (), like[:count]), tuple(parameters), like)

        return replace(inner, key=("adjoint", inner.key), rebuild=rebuild, parameters=self.parameters)

    def _derivatives(self, t: Tensor, state: State) -> State:
        count = len(self.function.shapes)
        with torch.enable_grad():
            y = tuple(component.detach().requires_grad_() for component in state[:count])
            derivatives = self.function.fresh()(t, y)
            pairs = [(d, -a) for d, a in zip(derivatives, state[count : 2 * count], strict=True) if d.requires_grad]
            inputs = (*y, *self.parameters)
            products = [torch.zeros_like(tensor) for tensor in inputs]
            if pairs:
                outputs, cotangents = zip(*pairs, strict=True)
                found = reached_gradients(outputs, inputs, cotangents)
                products = [zero if product is None else product for zero, product in zip(products, found, strict=True)]
        return (*(derivative.detach() for derivative in derivatives), *products)
