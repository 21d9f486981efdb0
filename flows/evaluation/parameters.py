"""Parameters of known equations with their standard errors."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from flows.arguments import checked
from flows.datasets import SeriesBatch
from flows.errors import InvalidValueError
from flows.evaluation.evaluator import Report
from flows.fields import Physics
from flows.models.neural_ode import NeuralODE
from flows.objectives.trajectories import in_field_space
from flows.solvers import SolverError

STEP = 1e-4  # of an unbounded number, for central differences
TOLERANCE = 1e-9  # of their solves


@checked
@dataclass(frozen=True)
class ParameterEstimate:
    """A fitted parameter.

    Example:
        ```python
        from flows.evaluation import ParameterEstimate

        estimate = ParameterEstimate(value=0.150, standard_error=0.002)
        ```
    """

    value: float
    standard_error: float | None = None  # None where it is not known

    def __str__(self) -> str:
        return f"{self.value:.6g}" if self.standard_error is None else f"{self.value:.6g} ± {self.standard_error:.2g}"


@checked
def fitted_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of known equations in a model, by name, 0-d and detached; none without `Physics`.

    Entries of a list of numbers are called `name[0]`, and so on. With several `Physics`, names begin with their place.

    Example:
        ```python
        import flows
        from flows.equations import pendulum
        from flows.evaluation import fitted_parameters

        field = flows.fields.Physics(pendulum, event_shape=(2,), parameters={"stiffness": 0.8})
        fitted_parameters(flows.NeuralODE(field))  # {"stiffness": tensor(0.8000)}
        ```
    """
    found = {place: module for place, module in model.named_modules() if isinstance(module, Physics)}
    values: dict[str, Tensor] = {}
    for place, module in found.items():
        prefix = f"{place}." if len(found) > 1 else ""
        for name, value in module.values().items():
            if value.ndim == 0:
                values[prefix + name] = value.detach()
            else:
                values |= {f"{prefix}{name}[{i}]": one for i, one in enumerate(value.detach().flatten())}
    return values


def with_parameters(report: Report, model: nn.Module, series: SeriesBatch | None = None) -> Report:
    """The report with the parameters of known equations, `parameter_NAME`, and their standard errors if they are known.

    Args:
        series: what a `NeuralODE` was fitted to.
    """
    values = fitted_parameters(model)
    if not values:
        return report
    estimates: Mapping[str, ParameterEstimate] = {k: ParameterEstimate(float(v)) for k, v in values.items()}
    if series is not None and isinstance(model, NeuralODE):
        with contextlib.suppress(SolverError):  # then the errors are unknown
            estimates = parameter_estimates(model, series)
    metrics = dict(report.metrics)
    for name, one in estimates.items():
        metrics |= {f"parameter_{name}": one.value, f"parameter_{name}_se": one.standard_error}
    rows = [*report.rows, *((name, str(one)) for name, one in estimates.items())]
    return replace(report, metrics=metrics, rows=rows)


@checked
def parameter_estimates(model: NeuralODE, series: SeriesBatch) -> Mapping[str, ParameterEstimate]:
    r"""The fitted parameters of `Physics` with their standard errors, from the series that they were fitted to.

    Let y = transform(x), and let J_ij = ∂y_i/∂θ_j be the sensitivities of all predicted values that were observed, by
    central differences in float64 at tolerances of 1e-9. With H = JᵀJ, the matrix

        C = H⁻¹ (Σ_e σ_e² J_eᵀJ_e) H⁻¹,   σ_e² = RSS_e / (n_e (1 − p/n)),

    is the covariance of the least-squares fit to first order in the noise. The sum runs over the entries e of a state,
    each with noise of its own variance; RSS_e is the sum of its n_e squared residuals, n their number in all, and p the
    number of parameters. For equations that are linear in θ and states of one entry this is linear regression,
    exactly. Noise is taken to be independent, the initial states as exact, and the fit as converged.

    A network beside the equations is held fixed, so that the errors would say too little; then they are `None`. They
    are also `None` where the data do not tell the parameters apart.

    Args:
        model: fitted by least squares on whole series (`TrajectoryMatching`).
        series: what it was fitted to, such as `dataset.part("train")`.

    Raises:
        InvalidValueError: there is no `Physics` in the model.

    Example:
        ```python
        import flows
        from flows.evaluation import parameter_estimates

        data = flows.datasets.LotkaVolterra(num_series=10, noise=0.01)
        ode = flows.NeuralODE(flows.fields.Physics(flows.equations.lotka_volterra, event_shape=(2,)))
        parameter_estimates(ode, data.part("train"))["alpha"].standard_error
        ```
    """
    values = fitted_parameters(model)
    if not values:
        raise InvalidValueError("the model has no Physics, whose parameters could be reported")
    numbers = {name: float(value) for name, value in values.items()}
    exact = copy.deepcopy(model).double()
    parts = [module for module in exact.modules() if isinstance(module, Physics)]
    raws = [parameter for part in parts for name, parameter in part.named_parameters() if name.startswith("raw_")]
    free = sum(parameter.numel() for parameter in raws)
    others = sum(p.numel() for p in exact.field.parameters() if p.requires_grad) - free
    unknown = {name: ParameterEstimate(value) for name, value in numbers.items()}
    if others or not free:
        return unknown
    if exact.solver.controls_error:
        exact.solver = replace(exact.solver, rtol=TOLERANCE, atol=TOLERANCE, max_steps=10 * exact.solver.max_steps)
    covariance = _covariance(exact, series, raws)
    if covariance is None:
        return unknown
    errors = dict.fromkeys(numbers)
    fitted = [name for name, free in zip(numbers, _is_fitted(exact), strict=True) if free]
    for name, variance in zip(fitted, covariance.diagonal().tolist(), strict=True):
        errors[name] = math.sqrt(max(variance, 0.0))
    return {name: ParameterEstimate(value, errors[name]) for name, value in numbers.items()}


@torch.no_grad()
def _covariance(model: NeuralODE, series: SeriesBatch, raws: list[nn.Parameter]) -> Tensor | None:
    """C of the fitted values; `None` if the data do not tell them apart."""
    device = next(model.parameters()).device
    series = series.to(device, torch.float64)
    counts = series.observed.clone()
    counts[:, 0] = False  # where predictions start

    def predicted() -> tuple[Tensor, Tensor]:  # observed values (n,), and fitted parameters (p,)
        path = model.trajectory(series.x[:, 0], series.times, series.context, series.mask, solver_error=False)
        values = torch.stack(list(fitted_parameters(model).values()))
        return in_field_space(model, path.states)[counts], values[_is_fitted(model)]

    columns = []
    for raw in raws:
        flat = raw.view(-1)
        for i in range(len(flat)):
            step = STEP * (1 + float(flat[i].abs()))
            flat[i] += step
            above, value_above = predicted()
            flat[i] -= 2 * step
            below, value_below = predicted()
            flat[i] += step
            columns.append((above - below) / (value_above - value_below).sum())
    jacobian = torch.stack(columns, 1)  # (n, p)
    residuals = (in_field_space(model, series.x)[counts] - predicted()[0]).square()
    number, size = jacobian.shape
    scale = jacobian.norm(dim=0)
    if number <= size or not bool((scale > 0).all()):
        return None
    unit = jacobian / scale  # so that the size of a parameter does not matter
    information = unit.T @ unit
    if float(torch.linalg.cond(information)) > 1e12:
        return None
    entry = (
        torch.arange(math.prod(model.event_shape), device=device).view(model.event_shape).expand_as(series.x)[counts]
    )
    middle = torch.zeros_like(information)
    for e in entry.unique():
        rows = entry == e
        variance = residuals[rows].sum() / (rows.sum() * (1 - size / number))
        middle += variance * unit[rows].T @ unit[rows]
    inverse = torch.linalg.inv(information)
    return inverse @ middle @ inverse / (scale[:, None] * scale)


def _is_fitted(model: nn.Module) -> list[bool]:
    """Which of `fitted_parameters` are not fixed."""
    return [
        not coefficient.fixed
        for module in model.modules()
        if isinstance(module, Physics)
        for name, coefficient in module.coefficients.items()
        for _ in range(getattr(module, f"raw_{name}").numel())
    ]
