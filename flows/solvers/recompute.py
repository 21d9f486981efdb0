"""Exact gradients of a solve from the states at some of its steps (checkpoints)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flows.solvers.problem import State
from flows.solvers.products import reached_gradients
from flows.solvers.replay import (
    random_state,
    refuse_second_derivative,
    restored_random_state,
    same_random_state,
    set_random_state,
)
from flows.solvers.runge_kutta import take_step
from flows.solvers.tableaux import RungeKutta
from flows.solvers.task import Task

MAX_CHECKPOINTS_PER_STEP = 32  # of a segment; when there are more checkpoints, segments get twice as long
MIN_SEGMENT_EVALUATIONS = 6  # shorter segments would save little memory and lose time in starting again


def solve_with_checkpoints(task: Task, method: RungeKutta, state: State, parameters: tuple[Tensor, ...]) -> State:
    """The states at all outputs; the backward pass solves one segment after another again, on the same steps.

    The forward pass keeps no graph. With n steps there are at most √(32 n) checkpoints (a state and its slope), and a
    segment has at most √(n/8) steps, or as many as six evaluations make. Only one segment has a graph at a time. The
    two numbers differ because a state is much smaller than the graph of a step.

    Random numbers from torch's global generators, as dropout draws them, are drawn again alike. Those from generators
    of the dynamics' own are not.
    """
    return _Checkpointed.apply(_Record(task, method), len(state), *state, *parameters)  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class _Checkpoint:
    step: int  # index of the step that starts here
    state: State
    slope: State | None  # None: to be evaluated


@dataclass(frozen=True)
class _RecordedStep:
    t0: float
    t1: float
    first_output: int  # index of the first output in the step
    num_outputs: int
    random: tuple[Tensor, ...]  # the states of the generators at its start


class _Record:
    """What the forward pass leaves: the accepted steps, and the state at some of them."""

    def __init__(self, task: Task, method: RungeKutta) -> None:
        self.task = task
        self.method = method
        self.steps: list[_RecordedStep] = []
        self.checkpoints: list[_Checkpoint] = []
        self.segment = math.ceil(MIN_SEGMENT_EVALUATIONS / method.evaluations)  # steps between checkpoints
        self.interpolates = not task.outputs.stops  # also between the ends of fixed steps
        self.draws = False  # whether the dynamics draw random numbers
        self.random: tuple[Tensor, ...] = ()  # the states of the generators at the start
        self._random: tuple[Tensor, ...] = ()

    def run(self, state: State) -> State:
        """Solve, and record what `segments` needs."""
        task, method, device = self.task, self.method, state[0].device
        outputs, found = task.outputs, 0
        pieces: list[State] = []
        self.random = self._random = random_state(device)
        slope = None
        log = task.forward_log(begin=lambda: self._note_random(device))
        for step in task.forward.steps(method, task.forward_function(state), state, outputs, log):
            inside = outputs.count(step.t1, found)
            self._keep(step.start, slope)
            self.steps.append(_RecordedStep(step.t0, step.t1, found, inside, self._random))
            pieces += outputs.within(method, step, found, inside)
            found += inside
            slope = step.next_slope
        self._note_random(device)
        self.draws = self._random is not self.random
        return outputs.join(pieces)

    def segments(self) -> Iterator[tuple[_Checkpoint, list[_RecordedStep]]]:
        """Each checkpoint with the steps up to the next one, the last first."""
        end = len(self.steps)
        for checkpoint in reversed(self.checkpoints):
            yield checkpoint, self.steps[checkpoint.step : end]
            end = checkpoint.step

    def _keep(self, state: State, slope: State | None) -> None:
        position = len(self.steps)
        if position % self.segment == 0:
            self.checkpoints.append(_Checkpoint(position, state, slope))
        if len(self.checkpoints) > MAX_CHECKPOINTS_PER_STEP * self.segment:
            self.segment *= 2
            self.checkpoints = [kept for kept in self.checkpoints if kept.step % self.segment == 0]

    def _note_random(self, device: torch.device) -> None:
        """Keep the same object as long as nothing was drawn."""
        now = random_state(device)
        if not same_random_state(now, self._random):
            self._random = now


class _Checkpointed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, record: _Record, count: int, *tensors: Tensor) -> State:
        with record.task.precision():
            states = record.run(tensors[:count])
        ctx.record, ctx.count = record, count
        ctx.save_for_backward(*tensors)  # autograd refuses the backward pass if one of them changes before it
        ctx.set_materialize_grads(False)
        return states

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("checkpoint")
        record, count = ctx.record, ctx.count
        state, parameters = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        adjoint: list[Tensor | None] = [None] * count
        slope_adjoint: list[Tensor | None] = [None] * count
        totals: list[Tensor | None] = [None] * len(parameters)
        device = state[0].device
        with restored_random_state(device) if record.draws else nullcontext(), record.task.precision():
            for checkpoint, steps in record.segments():
                graph = _Segment(record, checkpoint, steps, device)
                products = graph.products(parameters, gradients, adjoint, slope_adjoint)
                adjoint, slope_adjoint = products[:count], products[count : 2 * count]
                totals = [_sum(total, more) for total, more in zip(totals, products[2 * count :], strict=True)]
        return None, None, *adjoint, *totals


class _Segment:
    """Some steps, solved again with their graph."""

    def __init__(
        self, record: _Record, checkpoint: _Checkpoint, steps: list[_RecordedStep], device: torch.device
    ) -> None:
        task, method = record.task, record.method
        function = task.recompute_function(checkpoint.state)
        self.outputs: list[tuple[int | slice, State]] = []  # where among the outputs, and the states there
        with torch.enable_grad():
            state = self.state = _leaves(checkpoint.state)
            slope = self.slope = None if checkpoint.slope is None else _leaves(checkpoint.slope)
            if slope is None and (method.is_adaptive or record.interpolates):
                if record.draws:
                    set_random_state(record.random, device)
                slope = function.between(steps[0].t0, steps[0].t1)(steps[0].t0, state)
            for step in steps:
                if record.draws:
                    set_random_state(step.random, device)
                moving = function.in_step(step.t0, step.t1)
                at_a_jump = step is not record.steps[0] and function.restarts(step.t0)
                slope = None if slope is None or at_a_jump else moving.stop(slope)
                taken = take_step(method, moving, step.t0, step.t1, state, slope, record.interpolates)
                inside = step.first_output, step.num_outputs
                found = task.outputs.within(method, taken, *inside)
                self.outputs += zip(task.outputs.indices(*inside), found, strict=True)
                state, slope = taken.end, taken.next_slope
        self.end, self.end_slope = state, slope

    def products(
        self,
        parameters: tuple[Tensor, ...],
        gradients: tuple[Tensor | None, ...],  # of the outputs, a tensor (outputs, *component) each
        adjoint: list[Tensor | None],  # of the end
        slope_adjoint: list[Tensor | None],
    ) -> list[Tensor | None]:
        """The gradients of the state and the slope at the start, and of the parameters."""
        candidates = [*zip(self.end, adjoint, strict=True)]
        if self.end_slope is not None:
            candidates += zip(self.end_slope, slope_adjoint, strict=True)
        for i, state in self.outputs:
            candidates += [(c, None if g is None else g[i]) for c, g in zip(state, gradients, strict=True)]
        pairs = [(value, cotangent) for value, cotangent in candidates if cotangent is not None and value.requires_grad]
        slope = self.slope or ()
        inputs = (*self.state, *slope, *parameters)
        found: list[Tensor | None] = [None] * len(inputs)
        if pairs:
            values, cotangents = zip(*pairs, strict=True)
            found = reached_gradients(values, inputs, cotangents)
        at = len(self.state)
        slopes = found[at : at + len(slope)] or [None] * at
        return [*found[:at], *slopes, *found[at + len(slope) :]]


def _leaves(components: State) -> State:
    return tuple(component.detach().requires_grad_() for component in components)


def _sum(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    if total is None or more is None:
        return more if total is None else total
    return total + more
