"""Reads a pickle of arrays as data: nothing in it can name a function to call or a class to build.

Known are None, booleans, numbers, text, bytes, lists, tuples, dicts and NumPy's arrays and numbers. The opcodes are
interpreted here; `pickle` itself is not used.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")
NUMERIC = ("numpy.core.numeric", "numpy._core.numeric")
KNOWN = frozenset(
    [
        *(f"{module} _reconstruct" for module in MULTIARRAY),
        *(f"{module} scalar" for module in MULTIARRAY),
        *(f"{module} _frombuffer" for module in NUMERIC),
        *("numpy ndarray", "numpy dtype", "_codecs encode", "__builtin__ bytes", "builtins bytes"),
        *("__builtin__ bytearray", "builtins bytearray"),
    ]
)
MAX_SHOWN = 100  # characters of a name in a message
KINDS = "biufSU"  # of numbers and of fixed text


class ForeignObjectError(Exception):
    """A pickle names something other than arrays."""


@dataclass(frozen=True)
class _Name:
    text: str


class _Mark:
    pass


@dataclass
class _Array:
    """An array whose numbers come later."""

    value: np.ndarray | None = None


@dataclass
class _Kind:
    """A dtype whose order of bytes comes later."""

    code: str
    order: str = "="


def read_pickle(content: bytes) -> Any:
    """Return what a pickle holds.

    Raises:
        ForeignObjectError: it holds anything but data; the message is its name.
        ValueError: it is damaged.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name == "STOP":
                return _finished(machine.pop())
            handler = HANDLERS.get(opcode.name)
            if handler is None:
                raise ForeignObjectError(f"the opcode {opcode.name}")
            handler(machine, argument)
    except (IndexError, KeyError, AttributeError, TypeError, OverflowError, UnicodeError, MemoryError) as error:
        raise ValueError(f"it is damaged: {type(error).__name__} {error}") from error
    except RecursionError as error:
        raise ValueError("its lists are nested too deeply") from error
    raise ValueError("it ends too early")


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        value = self.stack.pop()
        if isinstance(value, _Mark):
            raise ValueError("it takes what it has not put down")
        return value

    def to_mark(self) -> list[Any]:
        start = max(i for i, value in enumerate(self.stack) if isinstance(value, _Mark))
        items = self.stack[start + 1 :]
        del self.stack[start:]
        return items

    def top(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise ValueError("it fills what it has not made")
        return self.stack[-1]

    def set_items(self, items: list[Any]) -> None:
        target = self.top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_finished(key)] = value

    def name(self, text: str) -> None:
        if text not in KNOWN:
            raise ForeignObjectError(".".join(text.split())[:MAX_SHOWN])
        self.push(_Name(text))

    def stack_name(self) -> None:
        name, module = self.pop(), self.pop()
        self.name(f"{module} {name}")

    def call(self) -> None:
        arguments, function = self.pop(), self.pop()
        if type(function) is not _Name or type(arguments) is not tuple:
            raise ForeignObjectError("a call")
        self.push(_called(function.text, arguments))

    def build(self) -> None:
        state, target = self.pop(), self.stack[-1]
        if type(target) is _Kind and type(state) is tuple and len(state) >= 2:
            if len(state) > 3 and (state[2] is not None or state[3] is not None):
                raise ForeignObjectError("an array of records")
            order = _text(state[1])
            target.order = order if order in ("<", ">", "=", "|") else "="
        elif type(target) is _Array and type(state) is tuple and len(state) == 5:
            _, shape, kind, fortran, numbers = state
            target.value = _array(kind, shape, "F" if fortran else "C", numbers)
        else:
            raise ForeignObjectError("an object with a state of its own")


def _called(name: str, arguments: tuple[Any, ...]) -> Any:
    function = name.partition(" ")[2]
    if function == "_reconstruct":
        return _Array()
    if function == "dtype" and arguments:
        code = _text(arguments[0])
        if code[:1] == "O":
            raise ForeignObjectError("an array of objects")
        return _Kind(code)
    if function == "scalar" and len(arguments) == 2:
        return _array(arguments[0], (), "C", arguments[1])[()]
    if function == "_frombuffer" and len(arguments) == 4:
        numbers, kind, shape, order = arguments
        return _array(kind, shape, _text(order), numbers)
    if function == "encode" and len(arguments) == 2 and arguments[1] in ("latin1", "latin-1"):
        return arguments[0].encode("latin1")
    if function in ("bytes", "bytearray") and not arguments:
        return b""
    raise ForeignObjectError(name.replace(" ", "."))


def _array(kind: Any, shape: Any, order: str, numbers: Any) -> np.ndarray:
    if type(kind) is not _Kind or type(shape) is not tuple or order not in ("C", "F"):
        raise ValueError("it describes no array")
    if isinstance(numbers, str):  # of Python 2
        numbers = numbers.encode("latin1")
    if not isinstance(numbers, bytes | bytearray):
        raise ForeignObjectError("an array of objects")
    dtype = np.dtype(kind.code)
    if dtype.kind not in KINDS or dtype.hasobject:
        raise ForeignObjectError(f"an array of {kind.code}")
    if kind.order in ("<", ">"):
        dtype = dtype.newbyteorder(kind.order)
    if any(type(length) is not int or length < 0 for length in shape):
        raise ValueError("it describes no array")
    if math.prod(shape) * dtype.itemsize != len(numbers):
        raise ValueError(f"an array of the shape {shape} has {len(numbers):,} bytes")
    return np.frombuffer(bytes(numbers), dtype).reshape(shape, order=order)


def _finished(value: Any, known: dict[int, Any] | None = None) -> Any:
    """Return a value with the arrays that were announced before they came."""
    known = {} if known is None else known  # what is there many times is finished once
    if type(value) is _Array:
        if value.value is None:
            raise ValueError("it announces an array without its numbers")
        return value.value
    if type(value) in (_Name, _Kind, _Mark):
        raise ForeignObjectError("a name without a value")
    if type(value) not in (list, tuple, dict):
        return value
    if id(value) not in known:
        if type(value) is dict:
            known[id(value)] = {key: _finished(entry, known) for key, entry in value.items()}
        elif all(type(entry) in PLAIN for entry in value):
            known[id(value)] = value
        else:
            known[id(value)] = type(value)(_finished(entry, known) for entry in value)
    return known[id(value)]


PLAIN = (int, str, bytes, float, bool)


def _text(value: Any) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


def _constant(value: Any) -> Callable[[_Machine, Any], None]:
    return lambda machine, argument: machine.push(value)


def _argument(machine: _Machine, argument: Any) -> None:
    machine.push(argument)


def _tuple(count: int) -> Callable[[_Machine, Any], None]:
    return lambda machine, argument: machine.push(tuple([machine.pop() for _ in range(count)][::-1]))


def _remember(machine: _Machine, index: int) -> None:
    machine.memo[index] = machine.stack[-1]


def _append(machine: _Machine, argument: Any) -> None:
    value = machine.pop()
    machine.top(list).append(value)


def _extend(machine: _Machine, argument: Any) -> None:
    values = machine.to_mark()
    machine.top(list).extend(values)


def _set_item(machine: _Machine, argument: Any) -> None:
    value, key = machine.pop(), machine.pop()
    machine.set_items([key, value])


def _set_items(machine: _Machine, argument: Any) -> None:
    items = machine.to_mark()
    machine.set_items(items)


def _dict(machine: _Machine, argument: Any) -> None:
    items = machine.to_mark()
    machine.push({})
    machine.set_items(items)


HANDLERS: dict[str, Callable[[_Machine, Any], Any]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda machine, argument: None),
    **dict.fromkeys(("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"), _argument),
    **dict.fromkeys(("STRING", "BINSTRING", "SHORT_BINSTRING"), _argument),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"), _argument),
    **dict.fromkeys(("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"), _argument),
    "NONE": _constant(None),
    "NEWTRUE": _constant(True),
    "NEWFALSE": _constant(False),
    "EMPTY_LIST": lambda machine, argument: machine.push([]),
    "EMPTY_DICT": lambda machine, argument: machine.push({}),
    "EMPTY_TUPLE": _constant(()),
    "MARK": lambda machine, argument: machine.push(_Mark()),
    "APPEND": _append,
    "APPENDS": _extend,
    "LIST": lambda machine, argument: machine.push(machine.to_mark()),
    "SETITEM": _set_item,
    "SETITEMS": _set_items,
    "DICT": _dict,
    "TUPLE": lambda machine, argument: machine.push(tuple(machine.to_mark())),
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _remember),
    "MEMOIZE": lambda machine, argument: _remember(machine, len(machine.memo)),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda machine, index: machine.push(machine.memo[index])),
    "POP": lambda machine, argument: machine.stack.pop(),
    "DUP": lambda machine, argument: machine.push(machine.stack[-1]),
    "GLOBAL": lambda machine, name: machine.name(name),
    "STACK_GLOBAL": lambda machine, argument: machine.stack_name(),
    "REDUCE": lambda machine, argument: machine.call(),
    "BUILD": lambda machine, argument: machine.build(),
}
