"""What is known of a field: whether it is built in, and how evaluations heal its habits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

# Layers without state or randomness, from which the fields of this package are built.
PLAIN_LAYERS = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Identity,
    nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict,
)  # fmt: skip
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass
class Traits:
    """What an evaluation of a field has to do for it, as the examination found.

    The training mode of a field can change its habits, so each mode has traits of its own.
    """

    built_in: bool = False  # keeps all promises by construction
    copies_inputs: bool = False  # the field writes into its arguments: give it copies
    copies_output: bool = False  # the field returns memory that it uses again: copy it
    expands_time: bool = False  # the field needs one time per sample
    frozen_buffers: tuple[str, ...] = ()  # those that an evaluation changes and depends on: fixed during a solve
    refuses_times: str = ""  # why the field cannot take one time per sample
    refuses_solves: str = ""  # why its values are no ODE
    refuses_gradients: dict[str, str] = field(default_factory=dict)  # why not, by the mode of the divergence's products
    takes_any_batch: bool = True  # not only that of the caller, as with a tensor captured for it
    examined: set[str] = field(default_factory=set)  # what has been looked at


_KNOWN: WeakKeyDictionary[Any, dict[bool, Traits]] = WeakKeyDictionary()


def traits_of(field: Any) -> Traits:
    """The traits of a field in its present training mode. Before an examination, nothing is known of a stranger."""
    try:
        modes = _KNOWN.get(field)
        if modes is None:
            modes = _KNOWN[field] = {}
    except TypeError:  # no weak reference, or not hashable
        return Traits()
    training = bool(getattr(field, "training", False))
    traits = modes.get(training)
    if traits is None:
        traits = modes[training] = Traits(built_in=is_built_in(field))
    return traits


def is_built_in(field: Any) -> bool:
    """Whether a field is made of nothing but the fields of this package and plain layers, without hooks."""
    if not isinstance(field, nn.Module) or not type(field).__module__.startswith("flows.fields."):
        return False
    return all(_is_plain(module) for module in field.modules())


def _is_plain(module: nn.Module) -> bool:
    kind, own = type(module), module.__dict__
    known = kind in PLAIN_LAYERS or (kind.__module__.startswith("flows.") and kind.__name__ != "Adapter")
    changed = any(own.get(hooks) for hooks in HOOKS) or "forward" in own
    return known and not changed and not any(isinstance(value, Tensor) for value in own.values())
