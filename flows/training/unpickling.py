"""Reads the pickle in a checkpoint as data: nothing in it can name a function to call or a class to build.

Only what `torch.save` writes for nested dicts, lists and tuples of tensors, numbers and text is understood. Each tensor
must own all numbers of a storage of its own, so that all tensors together are no larger than the file.
"""

from __future__ import annotations

import math
import struct
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
}
DTYPES = {
    name: getattr(torch, name)
    for name in ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
}
# Tensors that are no plain ones: they are recognised, so that the message can name where they are.
OTHER_TENSORS = {
    "_rebuild_device_tensor_from_cpu_tensor": "a tensor of another device",
    "_rebuild_device_tensor_from_numpy": "a tensor of another device",
    "_rebuild_meta_tensor_no_storage": "a meta tensor, without values",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_qtensor": "a quantised tensor",
    "_rebuild_sparse_csr_tensor": "a sparse tensor",
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_wrapper_subclass": "an instance of a subclass of Tensor",
}
MAX_MEMO = 1 << 28
MAX_STACK = 100_000  # values that wait to be put into a container
MAX_TUPLES = 60  # one directly in the other


class ForeignObjectError(Exception):
    """A pickle asks for objects other than data."""


@dataclass(frozen=True)
class Unsuitable:
    """Stands for a tensor that no checkpoint holds, and says what it is."""

    what: str


@dataclass(frozen=True)
class _Name:
    """A class or function that the pickle names; it is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass
class _Storage:
    values: Tensor  # (n,)
    shared: bool  # another tensor has taken it before


def read_pickle(data: bytes, read_storage: Callable[[str, torch.dtype, int], Tensor]) -> Any:
    """Read the pickle of an archive of `torch.save`.

    Args:
        data: the pickle.
        read_storage: returns that many numbers of a dtype by the name of their entry.

    Raises:
        ForeignObjectError: it asks for anything but data.
        ValueError, LookupError, struct.error: it is damaged.
    """
    return _Machine(data, read_storage).run()


class _Machine:
    def __init__(self, data: bytes, read_storage: Callable[[str, torch.dtype, int], Tensor]) -> None:
        self.data = data
        self.at = 0
        self.read_storage = read_storage
        self.storages: dict[str, _Storage] = {}
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.chain, self.chain_end = 0, 0  # tuples directly in each other, and where the last one was made

    def run(self) -> Any:
        data, handlers = self.data, _HANDLERS
        while True:
            opcode = data[self.at]
            self.at += 1
            if opcode == _STOP:
                if self.at != len(data) or len(self.stack) != 1 or self.marks:
                    raise ValueError("its pickle does not end where it should")
                return self.stack[0]
            handler = handlers[opcode]
            if handler is None:
                raise ForeignObjectError(f"the opcode {opcode:#04x}")
            handler(self)

    def take(self, count: int) -> bytes:
        end = self.at + count
        if count < 0 or end > len(self.data):
            raise ValueError("its pickle ends too early")
        taken = self.data[self.at : end]
        self.at = end
        return taken

    def number(self, form: struct.Struct) -> Any:
        (value,) = form.unpack_from(self.data, self.at)
        self.at += form.size
        return value

    def line(self) -> str:
        end = self.data.index(b"\n", self.at)
        text = self.data[self.at : end].decode()
        self.at = end + 1
        return text

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise ValueError("its pickle takes what it has not put down")
        return self.stack.pop()

    def top(self, kind: type) -> Any:
        if not self.stack or type(self.stack[-1]) not in (kind, OrderedDict if kind is dict else kind):
            raise ValueError("its pickle fills what it has not made")
        return self.stack[-1]

    def pop_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def container(self, kind: type) -> Any:
        if len(self.stack) > MAX_STACK:
            raise ValueError("its pickle is nested too deeply")
        return kind()

    def tuple_of(self, count: int) -> tuple[Any, ...]:
        self.chain = self.chain + 1 if self.at - self.chain_end <= 3 else 0
        self.chain_end = self.at
        if self.chain > MAX_TUPLES:
            raise ValueError("its pickle is nested too deeply")
        return tuple([self.pop() for _ in range(count)][::-1])

    def set_items(self, items: list[Any]) -> None:
        target = self.top(dict)
        if len(items) % 2:
            raise ValueError("its pickle has a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int):
                raise ForeignObjectError(f"a dict with a key of the type {type(key).__name__}")
            target[key] = value

    def find(self) -> None:
        name = _Name(self.line(), self.line())
        if not _is_known(name):
            raise ForeignObjectError(str(name))
        self.stack.append(name)

    def call(self) -> None:
        arguments, function = self.pop(), self.pop()
        if type(arguments) is not tuple or type(function) is not _Name:
            raise ForeignObjectError("a call")
        self.stack.append(self.result(function, arguments))

    def result(self, function: _Name, arguments: tuple[Any, ...]) -> Any:
        what = str(function)
        if what == "collections.OrderedDict" and not arguments:
            return OrderedDict()
        if what == "torch._utils._rebuild_tensor_v2" and len(arguments) >= 6:
            return _tensor(*arguments[:4], dtype=None)
        if what == "torch._utils._rebuild_tensor_v3" and len(arguments) >= 7 and type(arguments[6]) is _Name:
            return _tensor(*arguments[:4], dtype=DTYPES.get(arguments[6].name))
        if what == "torch._utils._rebuild_parameter" and arguments:
            return arguments[0]
        if what == "__builtin__.bytes" and not arguments:
            return b""
        if what == "_codecs.encode" and len(arguments) == 2 and arguments[1] == "latin1":
            return arguments[0].encode("latin1")
        if function.module == "torch._utils" and function.name in OTHER_TENSORS:
            return Unsuitable(OTHER_TENSORS[function.name])
        if function.module.startswith("torch"):
            return Unsuitable(f"a {what}")
        raise ForeignObjectError(what)

    def set_state(self) -> None:
        state, target = self.pop(), self.stack[-1]
        if isinstance(target, Unsuitable):
            return
        if type(target) is not OrderedDict or type(state) is not dict or list(state) != ["_metadata"]:
            raise ForeignObjectError("an object with a state of its own")
        target._metadata = state["_metadata"]  # type: ignore[attr-defined]  # versions of modules

    def find_storage(self) -> None:
        identity = self.pop()
        if type(identity) is not tuple or len(identity) != 5 or identity[0] != "storage":
            raise ForeignObjectError("an object from elsewhere")
        _, kind, key, _, count = identity
        if type(kind) is not _Name or type(key) is not str or type(count) is not int or count < 0:
            raise ValueError("its pickle announces no numbers")
        if key in self.storages:
            self.storages[key].shared = True
        else:
            dtype = torch.uint8 if kind.name == "UntypedStorage" else STORAGES.get(kind.name)
            if dtype is None:
                raise ForeignObjectError(f"numbers of the kind {kind}")
            self.storages[key] = _Storage(self.read_storage(key, dtype, count), shared=False)
        self.stack.append(self.storages[key])

    def remember(self, index: int) -> None:
        if index > MAX_MEMO or not self.stack:
            raise ValueError("its pickle remembers nothing")
        self.memo[index] = self.stack[-1]


def _is_known(name: _Name) -> bool:
    if name.module in ("torch", "torch.storage"):
        known = name.name in STORAGES or name.name in DTYPES or name.name == "UntypedStorage"
        return known or name.name in ("Size", "device", "sparse_coo", "float32", "float64")
    if name.module == "torch._utils":
        return name.name in OTHER_TENSORS or name.name in (
            "_rebuild_tensor_v2",
            "_rebuild_tensor_v3",
            "_rebuild_parameter",
        )
    return str(name) in (
        "collections.OrderedDict",
        "_codecs.encode",
        "__builtin__.bytes",
        "torch.serialization._get_layout",
    )


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, dtype: torch.dtype | None) -> Tensor | Unsuitable:
    """The tensor, if it owns all numbers of its storage in their order."""
    if type(storage) is not _Storage or type(size) is not tuple or type(stride) is not tuple:
        raise ValueError("its pickle describes no tensor")
    if len(size) != len(stride) or len(size) > 64 or not all(type(n) is int and n >= 0 for n in (*size, *stride)):
        raise ValueError("its pickle describes no tensor")
    if storage.shared:
        return Unsuitable("a tensor that shares its numbers with another one")
    values = storage.values if dtype is None else storage.values.view(dtype)
    expected, contiguous = 1, True
    for length, step in zip(reversed(size), reversed(stride), strict=True):
        contiguous = contiguous and (length <= 1 or step == expected)
        expected *= max(length, 1)
    count = math.prod(size)
    if offset != 0 or count != len(values) or (count and not contiguous):
        return Unsuitable(f"a view of shape {size} of {len(values):,} numbers")
    storage.shared = True
    return values.view(size)


_STOP = ord(".")
_U8, _U16, _U32, _I32, _F64 = (struct.Struct(form) for form in ("<B", "<H", "<I", "<i", ">d"))
_HANDLERS: list[Callable[[_Machine], Any] | None] = [None] * 256


def _opcode(code: bytes) -> Callable[[Callable[[_Machine], Any]], Callable[[_Machine], Any]]:
    def register(handler: Callable[[_Machine], Any]) -> Callable[[_Machine], Any]:
        _HANDLERS[code[0]] = handler
        return handler

    return register


def _push(code: bytes, make: Callable[[_Machine], Any]) -> None:
    _HANDLERS[code[0]] = lambda machine: machine.stack.append(make(machine))


_push(b"N", lambda machine: None)
_push(b"\x88", lambda machine: True)
_push(b"\x89", lambda machine: False)
_push(b"}", lambda machine: machine.container(dict))
_push(b"]", lambda machine: machine.container(list))
_push(b")", lambda machine: ())
_push(b"K", lambda machine: machine.number(_U8))
_push(b"M", lambda machine: machine.number(_U16))
_push(b"J", lambda machine: machine.number(_I32))
_push(b"G", lambda machine: machine.number(_F64))
_push(b"\x8a", lambda machine: int.from_bytes(machine.take(machine.number(_U8)), "little", signed=True))
_push(b"\x8b", lambda machine: int.from_bytes(machine.take(machine.number(_I32)), "little", signed=True))
_push(b"X", lambda machine: machine.take(machine.number(_U32)).decode("utf-8", "surrogatepass"))
_push(b"t", lambda machine: tuple(machine.pop_mark()))
_push(b"\x85", lambda machine: machine.tuple_of(1))
_push(b"\x86", lambda machine: machine.tuple_of(2))
_push(b"\x87", lambda machine: machine.tuple_of(3))
_push(b"h", lambda machine: machine.memo[machine.number(_U8)])
_push(b"j", lambda machine: machine.memo[machine.number(_U32)])


@_opcode(b"\x80")
def _protocol(machine: _Machine) -> None:
    if machine.at != 1 or machine.number(_U8) != 2:
        raise ValueError("its pickle has another protocol than 2")


@_opcode(b"(")
def _mark(machine: _Machine) -> None:
    machine.marks.append(len(machine.stack))


@_opcode(b"a")
def _append(machine: _Machine) -> None:
    value = machine.pop()
    machine.top(list).append(value)


@_opcode(b"e")
def _extend(machine: _Machine) -> None:
    values = machine.pop_mark()
    machine.top(list).extend(values)


@_opcode(b"s")
def _set_item(machine: _Machine) -> None:
    value, key = machine.pop(), machine.pop()
    machine.set_items([key, value])


@_opcode(b"u")
def _set_items(machine: _Machine) -> None:
    machine.set_items(machine.pop_mark())


@_opcode(b"q")
def _remember(machine: _Machine) -> None:
    machine.remember(machine.number(_U8))


@_opcode(b"r")
def _remember_long(machine: _Machine) -> None:
    machine.remember(machine.number(_U32))


for _code, _method in (
    (b"c", _Machine.find),
    (b"R", _Machine.call),
    (b"\x81", _Machine.call),
    (b"b", _Machine.set_state),
    (b"Q", _Machine.find_storage),
):
    _HANDLERS[_code[0]] = _method
