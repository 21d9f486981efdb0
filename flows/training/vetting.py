"""What the settings of a file may call, so that a file from a stranger cannot run code."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flows.training.checkpoint import CheckpointError

# What settings may call: what these parts of the package define, and a few classes of torch by name.
SAFE_PARTS = ("datasets", "divergence", "fields", "models", "objectives", "path_costs", "solvers", "transforms")
SAFE_NAMES = {
    "flows.training.Stage",
    *(f"torch.optim.{name}" for name in ("Adam", "AdamW", "SGD", "RMSprop", "NAdam", "RAdam")),
    *(
        f"torch.nn.{name}"
        for name in ("ELU", "GELU", "Identity", "Mish", "ReLU", "Sigmoid", "SiLU", "Softplus", "Tanh")
    ),
}
SAFE_KEYS = {"_target_", "_partial_", "_convert_", "_args_"}


class UntrustedConfigError(CheckpointError):
    """Settings ask for something that settings from a file may not do."""


def vet(config: Any, trust: Sequence[str] = (), where: str = "") -> None:
    """Check that instantiating ``config`` can only build what is known to be harmless.

    Every ``_target_`` must be a class or function that the parts of this package which describe a model
    *define* (``flows.datasets.readers.os.system`` is not), one of a few torch classes, or belong to a trusted
    package. Interpolations and other special keys of Hydra are refused.

    Raises:
        UntrustedConfigError: with the place in the settings, and how to allow it.
    """
    if isinstance(config, Mapping):
        for key, value in config.items():
            if not isinstance(key, str) or "${" in key:
                raise UntrustedConfigError(f"the settings have the key {key!r} at {where or 'the top'}; refused")
            if key.startswith("_") and key.endswith("_") and key not in SAFE_KEYS:
                raise UntrustedConfigError(
                    f"the settings use Hydra's special key {key} at {where or 'the top'}; refused"
                )
            vet(value, trust, f"{where}.{key}" if where else key)
        if "_target_" in config:
            _vet_target(config["_target_"], tuple(trust), where)
    elif isinstance(config, (list, tuple)):
        for i, value in enumerate(config):
            vet(value, trust, f"{where}[{i}]")
    elif isinstance(config, str) and "${" in config:
        raise UntrustedConfigError(f"the settings hold an interpolation at {where}: {config!r}; refused")


def foreign_packages(config: Any) -> list[str]:
    """The packages to trust for these settings to be taken from a file: those of their targets, without this one."""
    tops = {target.split(".")[0] for target in _targets(config) if target not in SAFE_NAMES}
    return sorted(tops - {"flows"})


def _targets(config: Any) -> Iterator[str]:
    if isinstance(config, Mapping):
        if isinstance(config.get("_target_"), str):
            yield config["_target_"]
        config = list(config.values())
    if isinstance(config, (list, tuple)):
        for value in config:
            yield from _targets(value)


def _vet_target(target: Any, trust: tuple[str, ...], where: str) -> None:
    known = SAFE_NAMES | ({"flows.training.Trainer"} if where == "trainer" else set())
    top = target.split(".")[0] if isinstance(target, str) else None
    if top is not None and (top in trust or target in known):
        return
    if top == "flows":
        found = _resolve(target)
        home = (getattr(found, "__module__", None) or "").split(".")
        if (inspect.isclass(found) or inspect.isfunction(found)) and home[0] == "flows" and home[1:2][0] in SAFE_PARTS:
            return
    advice = f"; if you trust that package, pass trust=[{top}]" if top and top != "flows" else ""
    raise UntrustedConfigError(
        f"the settings call {target!r} at {where or 'the top'}, which is no class or function of flows that "
        f"describes a model, and might run anything{advice}"
    )


def _resolve(target: str) -> Any:
    """The object of that name; only modules inside this package are imported for it."""
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
