"""Compiled code for the step of a Runge-Kutta method, and the account of what was compiled."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import traceback
import types
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flows.promises.plain_values import changed_names, plain_values
from flows.promises.regime import regime_of
from flows.promises.specimen import TRACING
from flows.solvers.problem import Compilable, NotCompilableError
from flows.solvers.replay import random_state, same_random_state

LOG = logging.getLogger("flows")
PROGRESS = logging.getLogger("flows.compilations")  # programs show its messages above their bars
LONG_SECONDS = 2.0  # from which on a compilation is told
MAX_SIZES = 4  # batch sizes for which the steps of one model are compiled; others run uncompiled
MAX_STATES = 4  # of a model, such as training and evaluation mode; in others its steps run uncompiled
MAX_COMPUTATIONS = 24  # kinds of steps of one model
LAYERS = "layers, modes and hooks"
NO_COMPILER = (
    "torch.compile needs a C++ compiler and finds none that works; install one, such as g++, or use compile=False "
    "(solver.compile=false)"
)

HOUSES = [Path(torch.__file__).parent, Path(__file__).parents[1]]  # whose code is not the user's
CAUSES = {  # why the compiler cannot follow a field, by its words
    "data-dependent": "reads values of tensors in Python",
    "pending unbacked": "has tensors whose shapes depend on values",
    "convert all tensors to faketensors": (
        "uses a tensor that is neither a parameter nor a buffer of its modules; keep it by register_buffer"
    ),
    "the tensor has a non-zero number of elements": "reads memory of tensors, as numpy does",
}

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
        layouts = tuple(map(_layout, self.tensors))
        self.key = (self.given, tuple(place for *_, place in self.slots), self.parameters, layouts)

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


def _layout(y: Tensor) -> Hashable:
    """What compiled code supposes of an argument beside its shape."""
    return y.requires_grad, y.is_inference(), y.stride() if y.layout is torch.strided else None


Function = Callable[..., tuple[Tensor, ...]]
Values = tuple[Sequence[Tensor], Sequence[Tensor]]  # of a function, and gradients


class Program:
    """A function of tensors that is compiled at its first call, for tensors of these shapes.

    The first call also runs the function uncompiled and compares the two, with their gradients. It refuses to compile
    what draws random numbers, because compiled code would draw others.

    Args:
        name: of the field.
        compared: how many of the values are compared; `None`: all. Estimates of errors are differences that rounding
            dominates where steps are short.
    """

    def __init__(self, name: str, compared: int | None = None) -> None:
        self.name = name
        self.compared = compared
        self.refused = False
        self._code: Function | None = None
        self._source: Function | None = None  # while it is traced
        self._failure: Exception | None = None  # of the source while it is traced, which the compiler words anew
        self._place = ""  # of the failure

    @property
    def is_ready(self) -> bool:
        """Whether calls run code that is there, and touch no model."""
        return self._code is not None

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
                self._code = self._compiled(function, arguments, forward_mode)
            found = self._code(*arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self.refused, self._code = True, None
            COMPILATIONS.refuse(_reason(self._failure or error, self.name, self._place))
            self._failure = None
            return None
        # A captured CUDA graph writes its outputs to the same memory each time.
        return tuple(tensor.clone() for tensor in found) if found[0].is_cuda else found

    def _compiled(self, function: Function, arguments: Sequence[Tensor], forward_mode: bool) -> Function:
        started = time.perf_counter()
        if not COMPILATIONS.count:
            PROGRESS.info("compiling solver steps, each once: up to a minute, or seconds where an earlier run did so")
        device = arguments[0].device
        for _ in range(2):  # another thread may have drawn in between
            before = random_state(device)
            expected = _with_gradients(function, arguments)
            if same_random_state(before, random_state(device)):
                break
        else:
            raise NotCompilableError(f"the field {self.name} draws random numbers, as dropout does")
        try:
            code, found = self._attempt(function, arguments, careful=forward_mode)
        except RuntimeError as error:
            if forward_mode or "ZeroTensors" not in str(error):
                raise
            code, found = self._attempt(function, arguments, careful=True)
        _compare(found, expected, self.compared)
        COMPILATIONS.count += 1
        seconds = time.perf_counter() - started
        COMPILATIONS.seconds += seconds
        PROGRESS.log(logging.INFO if seconds > LONG_SECONDS else logging.DEBUG, "compiled a step in %.1f s", seconds)
        return code

    def _attempt(self, function: Function, arguments: Sequence[Tensor], careful: bool) -> tuple[Function, Values]:
        options: dict[str, Any] = {}
        if careful:  # forward mode writes zeros that cannot be written to again; reusing their memory would
            options["allow_buffer_reuse"] = False
        if arguments[0].is_cuda:
            options["triton.cudagraphs"] = True
        else:  # its patterns find nothing here, and some are wrong (torch 2.13): see `flows.fields.activations.tanh`
            options["pattern_matcher"] = False
        code: Function = torch.compile(_entry(self), fullgraph=True, dynamic=False, options=options or None)
        self._source, self._failure, self._place = function, None, ""
        TRACING.add(threading.get_ident())
        try:
            return code, _with_gradients(code, arguments)
        finally:
            TRACING.discard(threading.get_ident())
            self._source = None  # holds the model

    def trace(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        """Called by the compiler, which follows tensors only and sees the model's code through them."""
        if self._source is None:
            self._failure = NotCompilableError("the compiler asks to compile a step again, and would do so without end")
            raise self._failure
        try:
            return self._source(*arguments)
        except Exception as error:
            self._failure, self._place = error, _place(error)
            raise


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


def _reason(error: Exception, name: str, place: str) -> str:
    """Why the steps of a field cannot be compiled."""
    if isinstance(error, NotCompilableError):
        return str(error)
    text = f"{type(error).__name__} {error}".lower()
    if "c++ compiler" in text or "cppcompileerror" in text or "invalidcxxcompiler" in text:
        return NO_COMPILER
    for words, reason in CAUSES.items():
        if words in text:
            return f"the field {name} {reason}{place}"
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"torch.compile cannot follow the field {name} ({type(error).__name__}: {first[:200]}){place}"


def _place(error: Exception) -> str:
    """The last line of the user's code that led to an error, if there is one."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not any(Path(frame.filename).is_relative_to(house) for house in HOUSES)]
    return f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""


class Programs:
    """The programs of a model's steps, few enough that nothing is compiled without end."""

    _OF: ClassVar[weakref.WeakKeyDictionary[nn.Module, Programs]] = weakref.WeakKeyDictionary()

    def __init__(self, name: str) -> None:
        self.name = name
        self.lock = threading.RLock()  # held while the model's tensors are replaced, and while others evaluate it
        self._states: list[dict[str, Hashable]] = []
        self._counters: set[str] = set()  # values that evaluations change
        self._found: dict[Hashable, dict[Hashable, Program]] = {}

    @classmethod
    def of(cls, module: nn.Module) -> Programs:
        """Those of a model."""
        return cls._OF.setdefault(module, cls(type(module).__name__))

    def state(self, module: nn.Module) -> int:
        """The number of the state that the model is in: its layers, modes and hooks, and its values beside tensors.

        Raises:
            NotCompilableError: it has been in as many others already.
        """
        found = {LAYERS: regime_of(module), **plain_values(module)}
        changed: set[str] = set()
        for number, state in enumerate(self._states):
            differ = set(changed_names(state, found)) - self._counters
            if not differ:
                return number
            changed |= differ
        if len(self._states) == MAX_STATES:
            raise NotCompilableError(
                f"the field {self.name} changes between solves, and its steps are compiled for {MAX_STATES} states. "
                f"What changes: {', '.join(sorted(changed)[:MAX_STATES])}. Keep a number that changes in a buffer "
                "(register_buffer), which compiled steps read anew"
            )
        self._states.append(found)
        return len(self._states) - 1

    @contextlib.contextmanager
    def compiling(self, module: nn.Module) -> Iterator[None]:
        """While entered, a step is compiled: what evaluations change is a counter, since no value depends on it.

        A field whose values depend on what evaluations change is refused before; see `flows.promises`.
        """
        with self.lock:
            before = plain_values(module)
            yield
            counters = set(changed_names(before, plain_values(module))) - self._counters
            self._counters |= counters
            if counters:
                LOG.warning(
                    "compiled steps do not run the Python code of the field %s, so that these values stay what they "
                    "are: %s",
                    self.name,
                    ", ".join(sorted(counters)),
                )

    def program(self, key: Hashable, shapes: Hashable, compared: int | None = None) -> Program | None:
        """The program of a step for these shapes; `None` if there are as many others already."""
        if key not in self._found and len(self._found) == MAX_COMPUTATIONS:
            COMPILATIONS.refuse(
                f"{MAX_COMPUTATIONS} kinds of steps of the field {self.name} are compiled, by estimator and path "
                "costs; more run uncompiled"
            )
            return None
        sizes = self._found.setdefault(key, {})
        if shapes not in sizes:
            if len(sizes) == MAX_SIZES:
                COMPILATIONS.refuse(
                    f"steps are compiled for {MAX_SIZES} batch sizes of a model; give batches equal sizes"
                )
                return None
            sizes[shapes] = Program(self.name, compared)
        return sizes[shapes]
