"""What the settings in a file may ask for: classes that describe a model, in amounts that a model needs."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flows import equations
from flows.arguments import checked
from flows.bases import Base
from flows.datasets import Dataset, Density, Energy
from flows.divergence import DivergenceEstimator, ProbeFamily
from flows.encoders import Encoder
from flows.evaluation import Evaluator, SampleMetric
from flows.fields import Activation, Field
from flows.models.cnf import CNF
from flows.models.neural_ode import NeuralODE
from flows.objectives import Coupling, Objective, ProbabilityPath
from flows.path_costs import PathCost
from flows.solvers import ErrorControl, ODESolver
from flows.training.callbacks import Reporting
from flows.training.checkpoint import CheckpointError
from flows.training.fabric import Hardware
from flows.training.stage import Optimization, Stage
from flows.transforms import DequantisationNoise, Transform

OPTIMIZERS = tuple(getattr(torch.optim, name) for name in ("Adam", "AdamW", "SGD", "RMSprop", "NAdam", "RAdam"))
LAYERS = tuple(
    getattr(nn, name) for name in ("ELU", "GELU", "Identity", "Mish", "ReLU", "Sigmoid", "SiLU", "Softplus", "Tanh")
)
DISTRIBUTIONS = tuple(
    getattr(torch.distributions, name)
    for name in (
        "Beta",
        "Categorical",
        "Cauchy",
        "Chi2",
        "Dirichlet",
        "Exponential",
        "Gamma",
        "Gumbel",
        "HalfCauchy",
        "HalfNormal",
        "Independent",
        "InverseGamma",
        "Laplace",
        "LogNormal",
        "LowRankMultivariateNormal",
        "MixtureSameFamily",
        "MultivariateNormal",
        "Normal",
        "StudentT",
        "Uniform",
        "VonMises",
        "Weibull",
    )
)
FROM_TORCH = {
    f"torch.{home}.{kind.__name__}": kind
    for home, kinds in (("optim", OPTIMIZERS), ("nn", LAYERS), ("distributions", DISTRIBUTIONS))
    for kind in kinds
}
SAFE_NAMES = set(FROM_TORCH)
SAFE_KEYS = {"_target_", "_partial_"}
# Modules that may be imported to look for a class. Those of the programs do things when they are imported.
MODULES = (
    "bases",
    "datasets",
    "divergence",
    "encoders",
    "equations",
    "evaluation",
    "fields",
    "models",
    "objectives",
    "path_costs",
    "solvers",
    "training",
    "transforms",
)
MAX_DEPTH = 40
MAX_AMOUNT = 2_000_000  # of points, features, probes, ... that a file may ask for
AMOUNTS_IN = (
    "base",
    "data",
    "divergence",
    "encoder",
    "evaluation",
    "field",
    "model",
    "objective",
    "solver",
    "transform",
)
NO_AMOUNTS = ("seed", "steps", "seconds", "levels", "max_")  # in the names of numbers that cost nothing by themselves
OWN = "flows"  # trust in this package itself lifts the limits of amounts, and opens the network to data


class UntrustedConfigError(CheckpointError):
    """Settings from a file ask for something that might run code."""


@dataclass(frozen=True)
class _Part:
    """Which classes a part of the settings may name: itself, and in its arguments."""

    kinds: tuple[type, ...]
    inside: tuple[type, ...] = ()


SOLVES = (DivergenceEstimator, ProbeFamily, ODESolver, ErrorControl)
FLOW = (CNF, Field, Activation, Transform, DequantisationNoise, Base, Encoder, *SOLVES, *LAYERS)  # of a flow as a base
PARTS = {
    "base": _Part((Base,), (Dataset, *DISTRIBUTIONS, *FLOW)),
    "data": _Part((Dataset,), (Dataset,)),
    "divergence": _Part((DivergenceEstimator,), (DivergenceEstimator, ProbeFamily)),
    "encoder": _Part((Encoder,), (Encoder, *LAYERS)),
    "evaluation": _Part((Evaluator,), (SampleMetric, *SOLVES)),
    "field": _Part((Field,), (Field, Activation, *LAYERS)),
    "hardware": _Part((Hardware,)),
    "model": _Part((CNF, NeuralODE)),
    "objective": _Part(
        (Stage,),
        (Objective, Coupling, ProbabilityPath, PathCost, Energy, Density, *SOLVES, *OPTIMIZERS),
    ),
    "optimization": _Part((Optimization,), OPTIMIZERS),
    "optimizer": _Part(OPTIMIZERS),
    "posterior": _Part((), DISTRIBUTIONS),  # its prior
    "reporting": _Part((Reporting,)),
    "solver": _Part((ODESolver,), (ErrorControl,)),
    "transform": _Part((Transform,), (Transform, DequantisationNoise, Field, Activation)),
}


@checked
def check_trusted(config: Any, trust: Sequence[str] = (), where: str = "") -> None:
    """Check that building `config` runs no foreign code, and asks for no more than a model needs.

    Each part, such as `field`, may only name classes of that part, which this package *defines*
    (`flows.datasets.tables.readers.os.system` is none), and those that its arguments may be. Trusted packages may be
    named anywhere. Interpolations and other special keys are refused, and so are amounts beyond `MAX_AMOUNT`.

    Args:
        trust: names of packages whose classes and functions may be called.
        where: the place of `config` in the file, for messages.

    Raises:
        UntrustedConfigError: names the place, and says how to allow the call.

    Example:
        ```python
        import flows

        flows.training.check_trusted({"field": {"_target_": "flows.fields.MLP"}})  # an error if it named foreign code
        ```
    """
    _check(config, tuple(trust), where, where.partition(".")[0].partition("[")[0], set(), 0)


def may_download(chosen: Any, trust: Sequence[str]) -> bool:
    """Whether data may be downloaded, where `chosen` are the user's own settings beside those in a file."""
    return OWN in trust or (isinstance(chosen, Mapping) and not {"_target_", "source"}.isdisjoint(chosen))


def foreign_packages(config: Any) -> list[str]:
    """The packages to pass as `trust=` when these settings are loaded from a file."""
    packages = {target.split(".")[0] for target in _targets(config) if target not in SAFE_NAMES}
    return sorted(packages - {OWN})


def _check(config: Any, trust: tuple[str, ...], where: str, part: str, seen: set[int], depth: int) -> None:
    if isinstance(config, (Mapping, list, tuple)):
        if id(config) in seen:
            return
        seen.add(id(config))
        if depth > MAX_DEPTH:
            raise UntrustedConfigError(f"the settings are nested too deeply at {where[:200]}; refused")
    if isinstance(config, Mapping):
        if "_target_" in config:
            _check_target(config["_target_"], trust, where, part)
        if not isinstance(config.get("_partial_", False), bool):
            raise UntrustedConfigError(f"the settings have _partial_={config['_partial_']!r} at {where}; refused")
        for key, value in config.items():
            if not isinstance(key, str) or "${" in key:
                raise UntrustedConfigError(f"the settings have the key {key!r} at {where or 'the top'}; refused")
            if key.startswith("_") and key.endswith("_") and key not in SAFE_KEYS:
                raise UntrustedConfigError(f"the settings use the special key {key} at {where or 'the top'}; refused")
            if not where:
                part, seen = key, set()
            _check(value, trust, f"{where}.{key}" if where else key, part, seen, depth + 1)
    elif isinstance(config, (list, tuple)):
        for i, value in enumerate(config):
            _check(value, trust, f"{where}[{i}]", part, seen, depth + 1)
    elif isinstance(config, str) and "${" in config:
        raise UntrustedConfigError(f"the settings hold an interpolation at {where}: {config[:200]!r}; refused")
    elif isinstance(config, (int, float)) and not isinstance(config, bool):
        _check_amount(config, trust, where, part)


def _check_amount(value: float, trust: Sequence[str], where: str, part: str) -> None:
    last = where.rpartition(".")[2]
    if part not in AMOUNTS_IN or any(word in last for word in NO_AMOUNTS):
        return
    if isinstance(value, int) and abs(value) > MAX_AMOUNT and OWN not in trust:
        raise UntrustedConfigError(
            f"the settings ask for {where}={value}, more than the {MAX_AMOUNT:,} that a file may ask for; if you know "
            f"this file, pass trust=[{OWN}]"
        )


def _targets(config: Any) -> Iterator[str]:
    if isinstance(config, Mapping):
        if isinstance(config.get("_target_"), str):
            yield config["_target_"]
        config = list(config.values())
    if isinstance(config, (list, tuple)):
        for value in config:
            yield from _targets(value)


def _check_target(target: Any, trust: Sequence[str], where: str, part: str) -> None:
    package = target.split(".")[0] if isinstance(target, str) else None
    if package is not None and package != OWN and package in trust:
        return
    is_outer = where == part or (part == "objective" and where.count(".") == 1 and "[" not in where)
    allowed = PARTS.get(part, _Part(()))
    kinds = allowed.kinds if is_outer else allowed.inside
    found: Any = _find(target) if package == OWN else None
    if part == "field" and inspect.isfunction(found) and found.__module__ == equations.__name__:
        return
    if isinstance(target, str) and target in SAFE_NAMES:
        found = FROM_TORCH[target]
    if (
        isinstance(found, type)
        and issubclass(found, kinds or ())
        and not (inspect.isabstract(found) or found.__name__.startswith("_"))
        and found.__module__.split(".")[0] in (OWN, "torch")
    ):
        return
    names = ", ".join(dict.fromkeys(kind.__name__ for kind in kinds)) or "nothing at all"
    advice = f"; if you trust that package, pass trust=[{package}]" if package and package != OWN else ""
    raise UntrustedConfigError(
        f"the settings call {str(target)[:200]!r} at {where or 'the top'}, where a file may name classes of flows that "
        f"describe such a part ({names}), and nothing else, since it might run anything{advice}"
    )


def _find(target: str) -> Any:
    """The object with that import path; `None` if there is none. Only modules of this package are imported."""
    words = target.split(".")[1:]
    if any(word.startswith("_") for word in words):
        return None
    found: Any = importlib.import_module(OWN)
    path = OWN
    for i, name in enumerate(words):
        path = f"{path}.{name}"
        if inspect.ismodule(found) and found.__name__ != path.rpartition(".")[0]:
            return None  # a module that one of ours has imported
        if i == 0 and name not in MODULES and not inspect.isclass(getattr(found, name, None)):
            return None
        if not hasattr(found, name) and inspect.ismodule(found):
            try:
                importlib.import_module(path)
            except (ImportError, ValueError):
                return None
        found = getattr(found, name, None)
    return found
