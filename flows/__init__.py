"""Neural ODEs and continuous normalizing flows with pluggable divergence estimators."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flows import (
        bases,
        compare,
        datasets,
        divergence,
        encoders,
        equations,
        evaluation,
        fields,
        inference,
        objectives,
        path_costs,
        plots,
        restoration,
        solvers,
        training,
        transforms,
    )
    from flows.density_estimator import DensityEstimator
    from flows.errors import FlowsError
    from flows.exporting import export
    from flows.inference import Posterior, infer
    from flows.models.cnf import CNF
    from flows.models.distribution import FlowDistribution
    from flows.models.few_steps import fit_grid
    from flows.models.interpolation import interpolate
    from flows.models.neural_ode import NeuralODE
    from flows.models.results import LogProbEstimate, Sample, Trajectory, Transport
    from flows.sharing import from_hub, load, save, to_hub
    from flows.solvers import ODESolver, Solution, SolverError, SolverStatistics
    from flows.training import Trainer

__version__ = "0.2.0"

__all__ = [
    "CNF",
    "DensityEstimator",
    "FlowDistribution",
    "FlowsError",
    "LogProbEstimate",
    "NeuralODE",
    "ODESolver",
    "Posterior",
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
    "encoders",
    "equations",
    "evaluation",
    "export",
    "fields",
    "fit_grid",
    "from_hub",
    "infer",
    "inference",
    "interpolate",
    "load",
    "objectives",
    "path_costs",
    "plots",
    "restoration",
    "save",
    "solvers",
    "to_hub",
    "training",
    "transforms",
]

# Everything is loaded at first use: torch, scipy and matplotlib take seconds to import, in which a program should
# already listen to Ctrl-C, and most uses need few of them.
_HOMES = {
    "CNF": "flows.models.cnf",
    "DensityEstimator": "flows.density_estimator",
    "FlowDistribution": "flows.models.distribution",
    "FlowsError": "flows.errors",
    "LogProbEstimate": "flows.models.results",
    "NeuralODE": "flows.models.neural_ode",
    "ODESolver": "flows.solvers",
    "Posterior": "flows.inference",
    "Sample": "flows.models.results",
    "Solution": "flows.solvers",
    "SolverError": "flows.solvers",
    "SolverStatistics": "flows.solvers",
    "Trainer": "flows.training",
    "Trajectory": "flows.models.results",
    "Transport": "flows.models.results",
    "export": "flows.exporting",
    "fit_grid": "flows.models.few_steps",
    "interpolate": "flows.models.interpolation",
    "from_hub": "flows.sharing",
    "infer": "flows.inference",
    "load": "flows.sharing",
    "save": "flows.sharing",
    "to_hub": "flows.sharing",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        found = getattr(import_module(_HOMES[name]), name)
    elif name in __all__:
        found = import_module(f"flows.{name}")
    else:
        raise AttributeError(f"module 'flows' has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
