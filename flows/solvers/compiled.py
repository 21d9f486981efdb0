"""Steps of a Runge-Kutta method by compiled code."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flows.errors import ComputationError
from flows.promises.specimen import is_transformed
from flows.solvers.control import ErrorNorm
from flows.solvers.problem import Compilable, NotCompilableError, RightHandSide, State, batch_size_of
from flows.solvers.programs import COMPILATIONS, Lifted, Program, Programs
from flows.solvers.runge_kutta import Step, combination, stage_times, take_step
from flows.solvers.tableaux import RungeKutta

NUM_SETTINGS = 4  # numbers before the times of the stages: dt, share of moving samples, rtol, atol


@dataclass(frozen=True)
class _Kind:
    """Which of a solve's programs a step needs."""

    records: bool  # autograd
    evaluates_first: bool  # the slope at the start is not known
    evaluates_next: bool  # the slope at the end is wanted, and is no stage
    stops: bool  # some samples do not move
    in_pieces: bool  # large batches, whose errors are measured together
    modes: Hashable  # of torch


class CompiledSteps:
    """Takes the steps of one solve by compiled code: all stages and the norm of the error in one call.

    Programs are kept with the model. Times, step size and tolerances are numbers that they read, weights are arguments,
    so nothing is compiled again when they change.

    Args:
        function: the right-hand side.
        method: coefficients.
        norm: of the error.
        interpolates: whether all stages are wanted.
    """

    def __init__(self, function: RightHandSide, method: RungeKutta, norm: ErrorNorm, interpolates: bool) -> None:
        self.compilable: Compilable = function.compilable()
        self.method = method
        self.norm = norm
        self.interpolates = interpolates
        self._all = Programs.of(self.compilable.module)
        self.lock = self._all.lock
        with self.lock:  # the model holds its own tensors, and not those of a compiler
            self.lifted = Lifted(self.compilable)
            state = self._all.state(self.compilable.module)
        self.needs_gradients = any(tensor.requires_grad for tensor in self.lifted.tensors)
        kind = replace(norm, rtol=0.0, atol=0.0, batch_size=0, share=None)  # these are read, or follow from shapes
        self.key = (self.compilable.key, state, method, kind, interpolates, self.lifted.key)
        self._programs: dict[_Kind, Program | None] = {}

    def take(
        self, function: RightHandSide, t0: float, t1: float, start: State, slope: State | None, with_next_slope: bool
    ) -> Step | None:
        """The step that `take_step` takes; `None` if it cannot be compiled."""
        method = self.method
        known = () if slope is None else slope
        records = torch.is_grad_enabled() and (self.needs_gradients or any(y.requires_grad for y in (*start, *known)))
        wants_next = (method.is_adaptive or with_next_slope) and not method.next_is_a_stage
        piece = self.compilable.piece
        in_pieces = bool(piece) and not records and start[0].is_cpu and len(start[0]) >= piece
        stops = function.moving is not None
        kind = _Kind(records, slope is None, wants_next, stops, in_pieces, _modes(start[0].device.type))
        if kind not in self._programs:
            first = rows_in(start, slice(piece)) if in_pieces else start
            shapes = tuple((tuple(y.shape), y.dtype, y.device) for y in (*first, *self.lifted.tensors))
            compared = -1 if method.is_adaptive else None  # all but the measure of the error
            self._programs[kind] = self._all.program((self.key, kind), shapes, compared)
        program = self._programs[kind]
        if program is None or program.refused:
            return None
        times = [function.bounded(t) for t in stage_times(method, t0, t1)]
        settings = [t1 - t0, function.moving_share(t0), self.norm.rtol, self.norm.atol, *times]
        numbers = torch.tensor(settings, dtype=start[0].dtype, device=start[0].device)
        masks = () if function.moving is None else (function.moving,)
        call = self._in_pieces if in_pieces else self._whole
        with contextlib.nullcontext() if program.is_ready else self._all.compiling(self.compilable.module):
            found = call(program, kind, numbers, start, known, masks)
        if found is None:
            return None
        function.count_evaluations(len(method.nodes) + kind.evaluates_first + kind.evaluates_next)
        return self._step(kind, t0, t1, start, slope, found)

    def _whole(
        self, program: Program, kind: _Kind, numbers: Tensor, start: State, slope: State, masks: State
    ) -> tuple[Tensor, ...] | None:
        """What the program finds for all samples."""
        given = [*start, *slope]
        if kind.records:  # as all states but the first of a solve do: one program less
            given = [y if y.requires_grad else y.detach().requires_grad_() for y in given]
        mode = torch.is_inference_mode_enabled()  # whose first state may come from elsewhere, unlike those that follow
        given = [y.contiguous() if y.is_inference() is mode else y.clone().contiguous() for y in given]
        arguments = [numbers, *given, *masks, *self.lifted.tensors]

        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            return self._run(kind, len(start), tensors)

        with torch.set_grad_enabled(kind.records):
            found = program(run, arguments, self.compilable.forward_mode)
        # On the nodes of the graph, which a derivative by the state itself, as of a divergence, does not run.
        for node in {y.grad_fn for y in found or () if y.grad_fn is not None}:
            node.register_prehook(_refuse_other_backward_passes)
        return found

    def _in_pieces(
        self, program: Program, kind: _Kind, numbers: Tensor, start: State, slope: State, masks: State
    ) -> tuple[Tensor, ...] | None:
        """The same from pieces of equal size, so that one program serves all large batches.

        The last piece overlaps the one before it, and only the rest of it counts.
        """
        size, piece = len(start[0]), self.compilable.piece
        pieces: list[list[Tensor]] = []
        axes: list[int] = []  # of the samples
        for begin in range(0, size, piece):
            at = min(begin, size - piece)
            rows = slice(at, at + piece)
            own = tuple(mask[rows] for mask in masks)
            found = self._whole(program, kind, numbers, rows_in(start, rows), rows_in(slope, rows), own)
            if found is None:
                return None
            states = len(found) - self.method.is_adaptive  # the last one holds errors
            axes = [0 if i < states and i % len(start) == 0 else -1 for i in range(len(found))]
            skipped = begin - at
            pieces.append([y.narrow(axis, skipped, piece - skipped) for y, axis in zip(found, axes, strict=True)])
        joined = [torch.cat(parts, axis) for parts, axis in zip(zip(*pieces, strict=True), axes, strict=True)]
        if self.method.is_adaptive:
            joined[-1] = self.norm.reduced(joined[-1], numbers[1])
        return tuple(joined)

    def _run(self, kind: _Kind, count: int, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The step as a function of tensors alone; see `_step` for what it returns."""
        method = self.method
        numbers, *rest = tensors
        start, rest = tuple(rest[:count]), rest[count:]
        slope = None
        if not kind.evaluates_first:
            slope, rest = tuple(rest[:count]), rest[count:]
        moving = None
        if kind.stops:
            moving, *rest = rest
        lifted = list(rest)
        for place in self.lifted.parameters:
            lifted[place] = lifted[place].detach().requires_grad_()
        dt, share, rtol, atol = numbers[:NUM_SETTINGS].unbind()
        times = numbers[NUM_SETTINGS:].unbind()
        with self.lifted.replaced(lifted):
            given = [lifted[place] for place in self.lifted.given]
            parameters = [lifted[place] for place in self.lifted.parameters]
            function = self.compilable.rebuild(given, parameters, start)
            function.moving = moving
            function.compiles = True
            step = take_step(method, function, 0.0, 0.0, start, slope, kind.evaluates_next, (times, dt))
        found = [*step.end]
        for stage in self._kept(kind):
            found += step.slopes[stage]
        if kind.evaluates_next:
            assert step.next_slope is not None
            found += step.next_slope
        if method.is_adaptive:
            with torch.no_grad():
                error = combination(step.slopes, method.error, dt)
                norm = replace(self.norm, rtol=rtol, atol=atol, batch_size=batch_size_of(start))  # pyright: ignore[reportArgumentType]
                squares = norm.squares(error, start, step.end)
                found.append(squares if kind.in_pieces else norm.reduced(squares, share))
        return tuple(found)

    def _kept(self, kind: _Kind) -> list[int]:
        """The stages that a program returns."""
        last = len(self.method.nodes)
        first = 0 if kind.evaluates_first else 1
        if self.interpolates:
            return [stage for stage in range(first, last + 1) if stage not in self.method.silent]
        kept = [] if first else [0]
        return [*kept, last] if self.method.next_is_a_stage and last not in kept else kept

    def _step(
        self, kind: _Kind, t0: float, t1: float, start: State, slope: State | None, found: tuple[Tensor, ...]
    ) -> Step:
        count, method = len(start), self.method
        states = [found[i : i + count] for i in range(0, len(found) - count + 1, count)]
        end, *rest = states
        kept = dict(zip(self._kept(kind), rest, strict=False))
        if slope is not None:
            kept[0] = slope
        next_slope = kept[len(method.nodes)] if method.next_is_a_stage else None
        if kind.evaluates_next:
            next_slope = rest[len(self._kept(kind))]
        stages = range(len(method.nodes) + 1) if self.interpolates else (0,)
        slopes = tuple(kept.get(stage, ()) for stage in stages)  # nobody uses silent ones
        return Step(t0, t1, start, end, slopes, next_slope, found[-1] if method.is_adaptive else None)


def rows_in(state: State, rows: slice) -> State:
    """The state of a range of samples, whose strides follow from its shape."""
    parts = (y[rows] if i == 0 else y[..., rows] for i, y in enumerate(state))
    return tuple(part.clone(memory_format=torch.contiguous_format) for part in parts)


def _refuse_other_backward_passes(_: Sequence[Tensor]) -> None:
    """Say what a second derivative or another backward pass would need, in the place of the compiler's error."""
    if torch.is_grad_enabled() or getattr(torch._C, "_autograd")._get_current_graph_task_keep_graph():  # noqa: B009
        raise ComputationError(
            "compiled steps are differentiated once, and create_graph=True and retain_graph=True ask for more; use "
            "ODESolver(compile=False) (solver.compile=false)"
        )


def _modes(device: str) -> Hashable:
    """What else compiled code depends on."""
    return (
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
        torch.is_inference_mode_enabled(),
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.get_float32_matmul_precision(),
    )


def compiled_steps(
    function: RightHandSide, method: RungeKutta | None, norm: ErrorNorm, interpolates: bool, only_pieces: bool = False
) -> CompiledSteps | None:
    """The compiled steps of a solve; `None`, which is said once, where the right-hand side does not allow them.

    Args:
        only_pieces: compile large batches alone, which one program serves whatever their sizes are.
    """
    if method is None or is_transformed():
        return None
    try:
        steps = CompiledSteps(function, method, norm, interpolates)
        piece = steps.compilable.piece
        return None if only_pieces and not (piece and function.shapes[0][:1] >= (piece,)) else steps
    except NotCompilableError as reason:
        COMPILATIONS.refuse(str(reason))
        return None
