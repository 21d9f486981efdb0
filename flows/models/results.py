"""Results of a flow, with their errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flows.solvers import SolverStatistics


@dataclass(frozen=True)
class DataNames:
    """What the data of a model are called; a file that the model is saved to keeps it."""

    name: str = "model"  # of the data set
    columns: Sequence[str] | None = None  # of the entries of a point
    class_names: Sequence[str] | None = None  # where the context is a class
    num_classes: int | None = None

    @classmethod
    def of(cls, description: Mapping[str, Any]) -> DataNames:
        """Those in the description of a data set."""
        columns, classes = description.get("columns"), description.get("class_names")
        return cls(
            str(description.get("name", "model")),
            None if columns is None else tuple(map(str, columns)),
            None if classes is None else tuple(map(str, classes)),
            description.get("num_classes"),
        )


@dataclass(frozen=True)
class LogProbEstimate:
    """log p(x) in nats, with its errors.

    Example:
        ```python
        import torch

        import flows

        flow = flows.CNF(flows.fields.MLP((2,)), divergence=flows.divergence.Hutchinson(num_probes=4))
        with torch.no_grad():
            estimate = flow.estimate_log_prob(torch.randn(10, 2))
        low, high = estimate.value - 2 * estimate.standard_error, estimate.value + 2 * estimate.standard_error
        ```
    """

    value: Tensor  # (*batch), the mean over probes
    standard_error: Tensor  # (*batch), from the spread of the probes; 0 if exact, NaN with a single probe
    solver_error: Tensor | None  # (*batch), |value − value of a much tighter solve|, if asked for
    nfe: int  # evaluations of the field for the value (not for its solver error)
    statistics: SolverStatistics  # of the same solve; its backward count grows with the gradient
    terms: Mapping[
        str, Tensor
    ]  # (*batch) each, "model" (the log-density in flow space) and the transform's; sum: value
    path_costs: Mapping[str, Tensor]  # (*batch) each, the integrals of the path costs that were asked for


@dataclass(frozen=True)
class Transport:
    """Points of flow space carried along the ODE.

    Example:
        ```python
        import torch

        import flows

        flow = flows.CNF(flows.fields.MLP((2,)))
        with torch.no_grad():
            there = flow.transport(torch.randn(10, 2), (0.0, 1.0))
        there.x  # (10, 2)
        ```
    """

    x: Tensor  # (T, *batch, *event) if several times were asked for, else (*batch, *event)
    log_density_change: Tensor | None  # (T, *batch) or (*batch): log p at x minus log p at the start
    statistics: SolverStatistics


@dataclass(frozen=True)
class Sample:
    """Points drawn from a flow, with their log-density in nats.

    Example:
        ```python
        import torch

        import flows

        flow = flows.CNF(flows.fields.MLP((2,)))
        with torch.no_grad():
            sample = flow.draw((100,))
        sample.x, sample.log_prob  # (100, 2), (100,)
        ```
    """

    x: Tensor  # (*batch, *event), data space
    log_prob: Tensor  # (*batch), the mean over probes
    standard_error: Tensor  # (*batch), of log_prob from the spread of the probes; 0 if exact, NaN with a single probe
    path_costs: Mapping[str, Tensor]  # (*batch) each, the integrals of the path costs that were asked for
    statistics: SolverStatistics


@dataclass(frozen=True)
class Trajectory:
    """States along the solutions of an ODE, with their errors.

    Example:
        ```python
        import torch

        import flows

        ode = flows.NeuralODE(flows.fields.MLP((2,)))
        path = ode.trajectory(torch.randn(5, 2), torch.linspace(0, 1, 11))
        path.states, path.nfe  # (5, 11, 2)
        ```
    """

    times: Tensor  # (T,) or (*batch, T)
    states: Tensor  # (*batch, T, *event)
    solver_error: Tensor | None  # (*batch, T, *event), see `NeuralODE.trajectory`, if asked for
    nfe: int  # evaluations of the field for the states (not for their solver error)
    statistics: SolverStatistics  # of the same solve; its backward count grows with the gradient
    path_costs: Mapping[str, Tensor]  # (*batch) each, the integrals of the path costs that were asked for
    mask: Tensor | None = None  # (*batch, T), False: no state was asked for, and the one before is repeated
