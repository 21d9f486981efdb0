"""What the settings in a file may call, so that a stranger's file cannot run code."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flows.arguments import checked
from flows.training.checkpoint import CheckpointError

# Settings from a file may call what these parts of the package define, and a few other classes by name.
SAFE_PARTS = (
    "bases",
    "datasets",
    "divergence",
    "evaluation",
    "fields",
    "models",
    "objectives",
    "path_costs",
    "solvers",
    "transforms",
)
SAFE_NAMES = {
    *(f"flows.training.{name}" for name in ("Hardware", "Optimization", "Reporting", "Stage")),
    *(f"torch.optim.{name}" for name in ("Adam", "AdamW", "SGD", "RMSprop", "NAdam", "RAdam")),
    *(
        f"torch.nn.{name}"
        for name in ("ELU", "GELU", "Identity", "Mish", "ReLU", "Sigmoid", "SiLU", "Softplus", "Tanh")
    ),
}
SAFE_KEYS = {"_target_", "_partial_"}


class UntrustedConfigError(CheckpointError):
    """Settings from a file ask for something that might run code."""


@checked
def check_trusted(config: Any, trust: Sequence[str] = (), where: str = "") -> None:
    """Check that building `config` runs no foreign code.

    A `_target_` must be a class or function that a part of this package *defines* (`flows.datasets.readers.os.system`
    is none), one of a few classes of torch, or belong to a trusted package. Interpolations and other special keys are
    refused.

    Args:
        trust: names of packages whose classes and functions may be called.
        where: the place of `config` in the file, for messages.

    Raises:
        UntrustedConfigError: names the place, and says how to allow the call.
    """
    if isinstance(config, Mapping):
        if "_target_" in config:
            _check_target(config["_target_"], trust, where)
        for key, value in config.items():
            if not isinstance(key, str) or "${" in key:
                raise UntrustedConfigError(f"the settings have the key {key!r} at {where or 'the top'}; refused")
            if key.startswith("_") and key.endswith("_") and key not in SAFE_KEYS:
                raise UntrustedConfigError(f"the settings use the special key {key} at {where or 'the top'}; refused")
            check_trusted(value, trust, f"{where}.{key}" if where else key)
    elif isinstance(config, (list, tuple)):
        for i, value in enumerate(config):
            check_trusted(value, trust, f"{where}[{i}]")
    elif isinstance(config, str) and "${" in config:
        raise UntrustedConfigError(f"the settings hold an interpolation at {where}: {config!r}; refused")


def foreign_packages(config: Any) -> list[str]:
    """The packages to pass as `trust=` when these settings are loaded from a file."""
    packages = {target.split(".")[0] for target in _targets(config) if target not in SAFE_NAMES}
    return sorted(packages - {"flows"})


def _targets(config: Any) -> Iterator[str]:
    if isinstance(config, Mapping):
        if isinstance(config.get("_target_"), str):
            yield config["_target_"]
        config = list(config.values())
    if isinstance(config, (list, tuple)):
        for value in config:
            yield from _targets(value)


def _check_target(target: Any, trust: Sequence[str], where: str) -> None:
    package = target.split(".")[0] if isinstance(target, str) else None
    if package is not None and (package in trust or target in SAFE_NAMES):
        return
    if package == "flows":
        found = _find(target)
        home = (getattr(found, "__module__", None) or "").split(".")
        if (inspect.isclass(found) or inspect.isfunction(found)) and home[0] == "flows" and home[1:2][0] in SAFE_PARTS:
            return
    advice = f"; if you trust that package, pass trust=[{package}]" if package and package != "flows" else ""
    raise UntrustedConfigError(
        f"the settings call {target!r} at {where or 'the top'}, which is no class or function of flows that "
        f"describes a model, and might run anything{advice}"
    )


def _find(target: str) -> Any:
    """The object with that import path; `None` if there is none. Only modules of this package are imported."""
    found: Any = importlib.import_module("flows")
    path = "flows"
    for name in target.split(".")[1:]:
        path = f"{path}.{name}"
        if not hasattr(found, name) and inspect.ismodule(found) and found.__name__ == path.rpartition(".")[0]:
            try:
                importlib.import_module(path)
            except ModuleNotFoundError:
                return None
        found = getattr(found, name, None)
    return found
