"""Compiled code for the step of a Runge-Kutta method, and the account of what was compiled."""

from __future__ import annotations

import contextlib
import logging
import time
import types
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flows.solvers.problem import Compilable, NotCompilableError
from flows.solvers.replay import random_state, same_random_state

LOG = logging.getLogger("flows")
MAX_SIZES = 4  # batch sizes for which the steps of one model are compiled; others run uncompiled
NO_COMPILER = (
    "torch.compile needs a C++ compiler and finds none that works; install one, such as g++, or use compile=False "
    "(solver.compile=false)"
)

_MANY_SOLVES: ContextVar[bool] = ContextVar("many solves", default=False)


@dataclass
class Compilations:
    """What this process has compiled.

    Example:
        ```python
        from flows.solvers import compilations

        before = compilations()
        before.count, before.seconds, before.reasons
        ```
    """

    count: int = 0
    seconds: float = 0.0
    reasons: list[str] = field(default_factory=list)  # why some steps ran uncompiled, each once

    def __str__(self) -> str:
        found = [f"{self.count} programs of solver steps in {self.seconds:.1f} s"] if self.count else []
        return "; ".join(found + [f"uncompiled: {reason}" for reason in self.reasons])

    def since(self, before: Compilations) -> Compilations:
        """What has come after an earlier account."""
        reasons = [reason for reason in self.reasons if reason not in before.reasons]
        return Compilations(self.count - before.count, self.seconds - before.seconds, reasons)

    def refuse(self, reason: str) -> None:
        """Say once why steps run uncompiled."""
        if reason not in self.reasons:
            self.reasons.append(reason)
            LOG.warning("solver steps run uncompiled: %s", reason)


COMPILATIONS = Compilations()


def compilations() -> Compilations:
    """How often this process has compiled solver steps, how long that took, and why some were not.

    Example:
        ```python
        from flows.solvers import compilations

        before = compilations()
        before.count, before.seconds, before.reasons
        ```
    """
    return COMPILATIONS


@contextlib.contextmanager
def many_solves(expected: bool = True) -> Iterator[None]:
    """Let solvers with `compile="auto"` compile inside the context, because many solves will follow.

    Example:
        ```python
        import torch

        import flows
        from flows.solvers import many_solves

        flow = flows.CNF(flows.fields.MLP((2,)), solver=flows.ODESolver(compile="auto"))
        with many_solves(False), torch.no_grad():
            flow.log_prob(torch.randn(10, 2))  # not compiled: one solve would not win it back
        ```
    """
    token = _MANY_SOLVES.set(expected)
    try:
        yield
    finally:
        _MANY_SOLVES.reset(token)


def expects_many_solves() -> bool:
    """Whether this runs in the context of `many_solves`."""
    return _MANY_SOLVES.get()


class Lifted:
    """All tensors that some dynamics depend on, each once, as arguments of a program.

    Args:
        compilable: states them.
    """

    def __init__(self, compilable: Compilable) -> None:
        self.tensors: list[Tensor] = []
        self._place: dict[int, int] = {}
        self.given = tuple(self._lift(tensor) for tensor in compilable.tensors)
        self.slots: list[tuple[nn.Module, str, str, int]] = []  # module, its table of tensors, name, place
        for module in compilable.module.modules():
            for table in ("_parameters", "_buffers"):
                for name, tensor in module.__dict__[table].items():
                    if tensor is not None:
                        self.slots.append((module, table, name, self._lift(tensor)))
        self.parameters = tuple(self._find(tensor) for tensor in compilable.parameters)
        # Two models with equal keys may share their weights among layers in different ways.
        self.key = (self.given, tuple(place for *_, place in self.slots), self.parameters)

    def _lift(self, tensor: Tensor) -> int:
        place = self._place.setdefault(id(tensor), len(self.tensors))
        if place == len(self.tensors):
            self.tensors.append(tensor)
        return place

    def _find(self, tensor: Tensor) -> int:
        place = self._place.get(id(tensor))
        if place is None:
            raise NotCompilableError("the field uses tensors that need gradients and are not its parameters")
        return place

    @contextlib.contextmanager
    def replaced(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """While entered, the modules hold these tensors, and calls of theirs run uncompiled."""
        compiled = {
            module: module._compiled_call_impl for module, *_ in self.slots if module._compiled_call_impl is not None
        }
        try:
            for module in compiled:
                module._compiled_call_impl = None
            for module, table, name, place in self.slots:
                module.__dict__[table][name] = tensors[place]
            yield
        finally:
            for module, table, name, place in self.slots:
                module.__dict__[table][name] = self.tensors[place]
            for module, implementation in compiled.items():
                module._compiled_call_impl = implementation


Function = Callable[..., tuple[Tensor, ...]]
Values = tuple[Sequence[Tensor], Sequence[Tensor]]  # of a function, and gradients


class Program:
    """A function of tensors that is compiled at its first call, for tensors of these shapes.

    The first call also runs the function uncompiled and compares the two, with their gradients. It refuses to compile
    what draws random numbers, because compiled code would draw others.

    Args:
        compared: how many of the values are compared; `None`: all. Estimates of errors are differences that rounding
            dominates where steps are short.
    """

    def __init__(self, compared: int | None = None) -> None:
        self.compared = compared
        self.refused = False
        self._code: Function | None = None
        self._source: Function | None = None  # while it is traced

    def __call__(
        self, function: Function, arguments: Sequence[Tensor], forward_mode: bool
    ) -> tuple[Tensor, ...] | None:
        """The values of `function`, by compiled code; `None` if there is none, which is said once.

        Args:
            function: the same in each call.
            arguments: all tensors that it depends on.
            forward_mode: whether it differentiates in forward mode.
        """
        if self.refused:
            return None
        try:
            if self._code is None:
                self._compile(function, arguments, forward_mode)
            assert self._code is not None
            found = self._code(*arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self.refused, self._code = True, None
            COMPILATIONS.refuse(_reason(error))
            return None
        # A captured CUDA graph writes its outputs to the same memory each time.
        return tuple(tensor.clone() for tensor in found) if found[0].is_cuda else found

    def _compile(self, function: Function, arguments: Sequence[Tensor], forward_mode: bool) -> None:
        started = time.perf_counter()
        before = random_state(arguments[0].device)
        expected = _with_gradients(function, arguments)
        if not same_random_state(before, random_state(arguments[0].device)):
            raise NotCompilableError("the field draws random numbers, as dropout does")
        try:
            found = self._attempt(function, arguments, careful=forward_mode)
        except RuntimeError as error:
            if forward_mode or "ZeroTensors" not in str(error):
                raise
            found = self._attempt(function, arguments, careful=True)
        _compare(found, expected, self.compared)
        COMPILATIONS.count += 1
        COMPILATIONS.seconds += time.perf_counter() - started
        LOG.info("compiled a solver step in %.1f s", time.perf_counter() - started)

    def _attempt(self, function: Function, arguments: Sequence[Tensor], careful: bool) -> Values:
        options: dict[str, Any] = {}
        if careful:  # forward mode writes zeros that cannot be written to again; reusing their memory would
            options["allow_buffer_reuse"] = False
        if arguments[0].is_cuda:
            options["triton.cudagraphs"] = True
        else:  # its patterns find nothing here, and some are wrong (torch 2.13): see `flows.fields.activations.tanh`
            options["pattern_matcher"] = False
        self._code = torch.compile(_entry(self), fullgraph=True, dynamic=False, options=options or None)
        self._source = function
        try:
            return _with_gradients(self._code, arguments)
        finally:
            self._source = None  # holds the model

    def trace(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        """Called by the compiler, which follows tensors only and sees the model's code through them."""
        if self._source is None:
            raise NotCompilableError("tensors of other shapes would be compiled again and again")
        return self._source(*arguments)


def _entry(program: Program) -> Function:
    """What `torch.compile` is given: one call of an operation that it does not look into.

    The compiler traces the operation by running it on tensors without values. So it may take derivatives of its own,
    in reverse mode too. Each entry has code of its own, because the compiler counts compilations by code.
    """
    reference = weakref.ref(program)

    def operation(*arguments: Tensor) -> tuple[Tensor, ...]:
        owner = reference()
        assert owner is not None
        return owner.trace(*arguments)

    traced: Function = torch.compiler.allow_in_graph(operation)  # pyright: ignore[reportAssignmentType]

    def entry(*arguments: Tensor) -> tuple[Tensor, ...]:
        return traced(*arguments)

    code = entry.__code__.replace(co_name="solver_step")
    return types.FunctionType(code, entry.__globals__, "solver_step", None, entry.__closure__)


def _with_gradients(function: Function, arguments: Sequence[Tensor]) -> Values:
    """The values of the function and, where autograd records, a product of their derivatives by each argument."""
    # The backward pass ends here. Parameters stay what they are, because the compiler looks at types.
    arguments = [tensor if tensor.is_leaf else tensor.detach().requires_grad_() for tensor in arguments]
    values = function(*arguments)
    if not torch.is_grad_enabled():
        return values, ()
    inputs = [tensor for tensor in arguments if tensor.requires_grad]
    outputs = [value for value in values if value.requires_grad]
    if not inputs or not outputs:
        return values, ()
    cotangents = [torch.ones_like(value) for value in outputs]
    gradients = torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True)
    found = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, gradients, strict=True)]
    return [value.detach() for value in values], found


def _compare(found: Values, expected: Values, number: int | None) -> None:
    """Raise unless compiled code computes what the function does, up to rounding."""
    pairs = [*zip(found[0], expected[0], strict=True)][:number]
    for one, other in [*pairs, *zip(found[1], expected[1], strict=True)]:
        if not bool(other.isfinite().all()) or not one.numel():
            continue
        coarsest = max(torch.finfo(dtype).eps for dtype in {one.dtype, *_autocast_dtypes(one)})
        error, size = float((one - other).abs().max()), float(other.abs().max())
        if not error <= coarsest**0.5 * max(size, 1.0):
            raise NotCompilableError(f"compiled code gave other values, by {error:.2g} where they are up to {size:.2g}")


def _autocast_dtypes(tensor: Tensor) -> set[torch.dtype]:
    kind = tensor.device.type
    return {torch.get_autocast_dtype(kind)} if torch.is_autocast_enabled(kind) else set()


def _reason(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, NotCompilableError):
            return str(cause)
        cause = cause.__cause__
    text = f"{type(error).__name__} {error}".lower()
    if "c++ compiler" in text or "cppcompileerror" in text or "invalidcxxcompiler" in text:
        return NO_COMPILER
    return f"torch.compile cannot follow the field ({type(error).__name__}: {lines[0].strip()[:200]})"


_PROGRAMS: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, dict[Hashable, Program]]] = weakref.WeakKeyDictionary()


def program_for(module: nn.Module, key: Hashable, shapes: Hashable, compared: int | None = None) -> Program | None:
    """The program of a model's step for these shapes; `None` if there are programs for as many others already."""
    sizes = _PROGRAMS.setdefault(module, {}).setdefault(key, {})
    if shapes not in sizes:
        if len(sizes) == MAX_SIZES:
            COMPILATIONS.refuse(f"steps are compiled for {MAX_SIZES} batch sizes of a model; give batches equal sizes")
            return None
        sizes[shapes] = Program(compared)
    return sizes[shapes]
