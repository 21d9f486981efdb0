"""Neural ODEs and continuous normalizing flows with pluggable divergence estimators."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flows import bases, divergence, fields, path_costs, solvers, transforms
from flows.errors import FlowsError
from flows.models.cnf import CNF
from flows.models.distribution import FlowDistribution
from flows.models.neural_ode import NeuralODE
from flows.models.results import LogProbEstimate, Sample, Trajectory, Transport
from flows.solvers import ODESolver, Solution, SolverError, SolverStatistics

if TYPE_CHECKING:
    from flows import compare, datasets, evaluation, objectives, plots, training
    from flows.training import Trainer
    from flows.training.runs import load_flow as load

__version__ = "0.1.0"

__all__ = [
    "CNF",
    "FlowDistribution",
    "FlowsError",
    "LogProbEstimate",
    "NeuralODE",
    "ODESolver",
    "Sample",
    "Solution",
    "SolverError",
    "SolverStatistics",
    "Trainer",
    "Trajectory",
    "Transport",
    "bases",
    "compare",
    "datasets",
    "divergence",
    "evaluation",
    "fields",
    "load",
    "objectives",
    "path_costs",
    "plots",
    "solvers",
    "training",
    "transforms",
]

# Loaded at first use, because they import scipy, matplotlib and others, which would make `import flows` slow.
_LATE_MODULES = ("compare", "datasets", "evaluation", "objectives", "plots", "training")
_LATE_NAMES = {  # name: (module, name there)
    "Trainer": ("flows.training", "Trainer"),
    "load": ("flows.training.runs", "load_flow"),
}


def __getattr__(name: str) -> Any:
    if name in _LATE_MODULES:
        return import_module(f"flows.{name}")
    if name in _LATE_NAMES:
        module, attribute = _LATE_NAMES[name]
        return getattr(import_module(module), attribute)
    raise AttributeError(f"module 'flows' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
