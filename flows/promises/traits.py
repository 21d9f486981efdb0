"""What is known of a field: whether it is built in, and how evaluations heal its habits."""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from flows.promises.regime import HOOKS, identity_of, regime_of

# Layers without state or randomness, from which the fields of this package are built.
PLAIN_LAYERS = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Identity,
    nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict,
)  # fmt: skip
MAX_REGIMES = 16  # of a field, of which the traits are kept
MAX_CHANGES = 4  # of a setting that makes examine again: more often changes what the field counts itself


@dataclass
class Traits:
    """What an evaluation of a field has to do for it, as the examination found.

    Layers, modes and hooks can change the habits of a field, so each `regime_of` it has traits of its own. Those of a
    regime are forgotten when a setting changes (`follow`), and when the field is refused, for it may be mended.
    """

    built_in: bool = False  # keeps all promises by construction
    copies_inputs: bool = False  # the field writes into its arguments: give it copies
    copies_output: bool = False  # the field returns memory that it uses again: copy it
    expands_time: bool = False  # the field needs one time per sample
    frozen_buffers: tuple[str, ...] = ()  # those that an evaluation changes and depends on: fixed during a solve
    refuses_times: str = ""  # why the field cannot take one time per sample
    refuses_solves: str = ""  # why its values are no ODE
    refuses_gradients: dict[str, str] = field(default_factory=dict)  # why not, by the mode of the divergence's products
    jumps: dict[tuple[float, float], tuple[float, ...]] = field(default_factory=dict)  # in time, by the span of solves
    takes_any_batch: bool = True  # not only that of the caller, as with a tensor captured for it
    examined: set[str] = field(default_factory=set)  # what has been looked at
    parts: list[weakref.ref[Any]] = field(default_factory=list)  # of a function: what it calls
    settings: dict[tuple[int, str], Hashable] | None = None  # of the field, when it was examined
    changes: dict[tuple[int, str], int] = field(default_factory=dict)  # how often each of them has changed

    def forget(self) -> None:
        """Let the next use of the field examine it anew."""
        for name, value in vars(
            Traits(self.built_in, parts=self.parts, settings=self.settings, changes=self.changes)
        ).items():
            setattr(self, name, value)

    def follow(self, settings: dict[tuple[int, str], Hashable]) -> None:
        """Forget what was found under other settings of the field."""
        before, self.settings = self.settings, settings
        if before is None or before == settings:
            return
        changed = {
            key for key in before.keys() | settings.keys() if before.get(key, MISSING) != settings.get(key, MISSING)
        }
        for key in changed:
            self.changes[key] = self.changes.get(key, 0) + 1
        if any(self.changes[key] <= MAX_CHANGES for key in changed):
            self.forget()


MISSING = object()
_KNOWN: WeakKeyDictionary[Any, dict[Hashable, Traits]] = WeakKeyDictionary()


def traits_of(field: Any) -> Traits:
    """The traits of a field as it stands. Before an examination, nothing is known of a stranger.

    Functions are known by their code and by what they call, so that a lambda in a loop is one function.
    """
    anchor, parts = identity_of(field)
    try:
        regimes = _KNOWN.get(anchor)
        if regimes is None:
            regimes = _KNOWN[anchor] = {}
    except TypeError:  # no weak reference, or not hashable
        return Traits()
    regime = (regime_of(field), *map(id, parts))
    traits = regimes.get(regime)
    if traits is None or any(reference() is None for reference in traits.parts):
        traits = Traits(built_in=is_built_in(field), parts=[weakref.ref(part) for part in parts])
        _keep(regimes, regime, traits)
    return traits


def remember(field: Any, traits: Traits) -> None:
    """Keep the traits also for the regime that an examination has left, as of lazy layers."""
    try:
        anchor, parts = identity_of(field)
        regimes = _KNOWN.get(anchor)
    except TypeError:
        return
    if regimes is not None:
        _keep(regimes, (regime_of(field), *map(id, parts)), traits)


def _keep(regimes: dict[Hashable, Traits], regime: Hashable, traits: Traits) -> None:
    regimes[regime] = traits
    while len(regimes) > MAX_REGIMES:
        del regimes[next(iter(regimes))]


def is_built_in(field: Any) -> bool:
    """Whether a field is made of nothing but the fields of this package and plain layers, without hooks."""
    if not isinstance(field, nn.Module) or not type(field).__module__.startswith("flows.fields."):
        return False
    return all(_is_plain(module) for module in field.modules())


def _is_plain(module: nn.Module) -> bool:
    kind, own = type(module), module.__dict__
    own_code = kind.__module__.startswith("flows.") and not getattr(module, "runs_foreign_code", False)
    known = kind in PLAIN_LAYERS or own_code
    changed = any(own.get(hooks) for hooks in HOOKS) or "forward" in own
    return known and not changed and not any(isinstance(value, Tensor) for value in own.values())
