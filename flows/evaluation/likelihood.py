"""The likelihood of points, with its error bars."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flows.arguments import checked
from flows.checks import FASTEST_STEP, can_be_finished
from flows.datasets import Batch, Dataset
from flows.errors import InvalidTypeError, InvalidValueError
from flows.evaluation.evaluator import known, set_apart
from flows.evaluation.metrics import BitsPerDim
from flows.expectations import refusal
from flows.models.cnf import CNF
from flows.models.mass import Mass
from flows.models.resolution import TOLERANCE, bound_fault, solver_fault
from flows.progress import new_bar
from flows.shares import current_share
from flows.solvers import ODESolver, SolverStatistics

FIGURES = ("nll", "gap", "bits_per_dim", "bits_per_dim_parts")  # those that a fault takes back


@dataclass(frozen=True)
class Likelihood:
    """The mean negative log-likelihood of points, in nats an example in data space.

    For discrete data it is an upper bound, the mean of −log((1/K) Σ_k p(x + u_k)/q(u_k | x)) over K draws of the
    dequantisation noise. [Burda et al. 2016, arXiv:1509.00519]

    Example:
        ```python
        import flows
        from flows.evaluation import likelihood

        data, flow = flows.datasets.Moons(num_test=200), flows.CNF(flows.fields.MLP((2,), hidden=(8,)))
        result = likelihood(flow, data.test_batches(100))
        result.nll, result.standard_error  # nats
        ```
    """

    nll: float
    standard_error: float  # sd / sqrt(n) over the points; NaN for a single point
    num_points: int
    probe_standard_error: float | None  # the part due to the probes; 0 if exact, None if one probe hides it
    solver_error: float | None  # mean |log p − log p of a much tighter solve|; None if not asked, NaN if that failed
    solver_error_points: int  # the first points, on which the solver error was computed
    nfe: float  # evaluations of the field, the mean over the solves
    values: Tensor = field(repr=False, compare=False)  # (n,), the NLL of each point, in float64 on the CPU
    standard_errors: Tensor | None = field(default=None, repr=False, compare=False)  # (n,), by probes and draws
    solver_errors: Tensor | None = field(default=None, repr=False, compare=False)  # (n,); both NaN where unknown
    bits_per_dim: BitsPerDim | None = None  # None for continuous data
    num_draws: int = 1  # K
    draw_standard_error: float | None = None  # the part due to the draws, for K > 1
    probe_bias: float | None = 0.0  # how much probe noise flatters a bound of K > 1 draws; None where unknown
    statistics: SolverStatistics | None = field(default=None, repr=False, compare=False)  # of the largest solve
    solver: ODESolver | None = field(default=None, repr=False)  # with which it was computed
    mass: Mass | None = None  # of the density, which makes 1; None where it was not computed

    def unresolved(self, entropy: float | None = None) -> str | None:
        """Say why these figures are no result, and what to change; None if nothing speaks against them.

        The solver error may be as large as the standard error, or 0.05 nats. The gap to the `entropy` of the data may
        be four standard errors below zero, the mass 2 % off, and the bias from the probes as large as the solver error.
        """
        solver, error = self.solver or ODESolver(), self.standard_error
        fault = solver_fault(self.solver_error, error, solver)
        if fault is None and self.mass is not None:
            fault = self.mass.fault
        if fault is None and entropy is not None:
            exact = self.probe_standard_error == 0
            fault = bound_fault("gap", self.nll - entropy, error, self.num_points, solver, exact)
        if fault is None and (self.probe_bias or 0.0) > max(TOLERANCE, known(error) or 0.0):
            fault = (
                f"noise of the probes flatters the bound by about {self.probe_bias:.2g} nats; take an exact "
                "divergence, more probes, or num_draws=1"
            )
        return fault

    def metrics(self, entropy: float | None = None) -> dict[str, Any]:
        """Return plain values for JSON, with the gap to the `entropy` of the data; None where unknown."""
        bits, fault = self.bits_per_dim, self.unresolved(entropy)
        metrics = {
            "nll": self.nll,
            "nll_se": known(self.standard_error),
            "points": self.num_points,
            "bits_per_dim": bits and bits.value,
            "bits_per_dim_se": bits and known(bits.standard_error),
            "bits_per_dim_parts": bits and dict(bits.parts),
            "entropy": entropy,
            "gap": None if entropy is None else self.nll - entropy,
            "probe_se": self.probe_standard_error,
            "probe_bias": self.probe_bias,
            "num_draws": self.num_draws,
            "draw_se": self.draw_standard_error,
            "solver_error": known(self.solver_error),
            "solver_error_points": self.solver_error_points,
            "mass": None if self.mass is None else self.mass.total,
            "mass_se": None if self.mass is None else self.mass.standard_error,
            "nfe": self.nfe,
            "unresolved": fault,
        }
        return metrics if fault is None else set_apart(metrics, FIGURES)

    def table(self, entropy: float | None = None) -> list[tuple[str, str]]:
        """Return names and values for a reader, with the gap to the `entropy` of the data where it is known.

        Figures that are no result read "unresolved"; the last row but one says why.
        """
        error = "" if math.isnan(self.standard_error) else f" ± {self.standard_error:.4f}"
        fault = self.unresolved(entropy)
        value, gap, bits = f"{self.nll:.4f}{error} nats", "", str(self.bits_per_dim)
        if entropy is not None:
            gap = f"{self.nll - entropy:.4f}{error} nats"
        if fault is not None:
            value = gap = bits = "unresolved"
        points = "point" if self.num_points == 1 else "points"
        rows = [("NLL", f"{value} ({self.num_points:,} {points})")]
        if self.bits_per_dim is not None:
            draws = "one draw" if self.num_draws == 1 else f"{self.num_draws} draws"
            rows += [("bits/dim", bits), ("bound", f"of {draws} of the dequantisation noise")]
        if self.draw_standard_error is not None:
            rows.append(("draw error", f"{self.draw_standard_error:.1e} nats"))
        if entropy is not None:
            rows += [("entropy", f"{entropy:.4f} nats"), ("gap", gap)]
        if self.probe_standard_error is None:
            rows.append(("probe error", "unknown with one probe; take two or more"))
        elif self.probe_standard_error > 0:
            rows.append(("probe error", f"{self.probe_standard_error:.1e} nats, part of the ±"))
        if self.probe_bias:
            rows.append(("probe bias", f"{self.probe_bias:.1e} nats, by which the bound looks better than it is"))
        if self.solver_error is not None:
            failed = math.isnan(self.solver_error)
            rows.append(("solver error", "unknown" if failed else f"{self.solver_error:.1e} nats"))
        if self.mass is not None and self.mass.fault is not None:
            rows.append(("mass", f"{self.mass.total:.3f} ± {self.mass.standard_error:.3f}"))
        if fault is not None:
            rows.append(("unresolved", fault))
        return [*rows, ("NFE", f"{self.nfe:.0f}")]


@checked(own=("flow",))
def part_batches(
    flow: CNF, dataset: Dataset, part: str, batch_size: int, most_points: int | None = None
) -> tuple[Iterable[Batch], int]:
    """Return the batches of the part `"validation"` or `"test"`, and its number of points.

    They come on the device and in the dtype of the flow. With `most_points` only the first points come.

    Example:
        ```python
        import flows
        from flows.evaluation import part_batches

        data, flow = flows.datasets.Moons(num_test=200), flows.CNF(flows.fields.MLP((2,)))
        batches, num_points = part_batches(flow, data, "test", batch_size=100)
        ```
    """
    _require(flow, "device", "dtype")
    place = {"device": flow.device, "dtype": flow.dtype}
    if part == "test":
        batches, num_points = dataset.test_batches(batch_size, **place), dataset.num_test
    elif part == "validation":
        batches, num_points = dataset.validation_batches(batch_size, **place), dataset.num_validation
    else:
        raise InvalidValueError(f"part must be test or validation, got {part!r}")
    if most_points is None or most_points >= num_points:
        return batches, num_points
    return _first(batches, most_points), most_points


def _require(flow: Any, *names: str) -> None:
    """Require a flow, or a model with the attributes of one that are used."""
    if inspect.isclass(flow) or not all(hasattr(flow, name) for name in names):
        raise InvalidTypeError(refusal("flow", flow, CNF))


def _first(batches: Iterable[Batch], num_points: int) -> Iterator[Batch]:
    for batch in batches:
        yield Batch(batch.x[:num_points], None if batch.context is None else batch.context[:num_points])
        num_points -= len(batch)
        if num_points <= 0:
            return


@checked(own=("flow",))
def likelihood(
    flow: CNF,
    batches: Iterable[Batch],
    generator: torch.Generator | None = None,  # of dequantisation noise and probes
    solver_error_points: int = 0,
    progress: str | None = None,
    num_points: int | None = None,
    num_draws: int = 1,
    may_be_infinite: bool = False,
) -> Likelihood:
    """Evaluate −mean log p over all points, without recording gradients.

    The estimator is the flow's own.

    Args:
        batches: of any sizes, one solve each; they are moved to the device and dtype of the flow.
        generator: makes noise and probes repeatable.
        solver_error_points: the first points, which are solved again at much tighter tolerances. That costs more than
            the evaluation itself. Where a single probe hides its error, they are solved twice more with other probes.
        progress: title of a progress bar; None: no bar.
        num_points: number of points to come, for the bar.
        num_draws: K, draws of the dequantisation noise, one solve each; more than one for discrete data only.
        may_be_infinite: keep points where the density is 0, as outliers may be. Their NLL and the mean are infinite
            then, and the errors are those of the other points. Default: such a point is an error.

    Raises:
        ValueError: there is no point, a point is not finite, its density is NaN or infinite, or `num_draws` does not
            suit the data.

    Example:
        ```python
        import flows
        from flows.evaluation import likelihood

        data, flow = flows.datasets.Moons(num_test=200), flows.CNF(flows.fields.MLP((2,), hidden=(8,)))
        result = likelihood(flow, data.test_batches(100))
        result.nll, result.standard_error  # nats
        ```
    """
    _require(flow, "estimate_log_prob", "transform", "event_shape")
    points = list(pointwise(flow, batches, generator, solver_error_points, progress, num_points, num_draws))
    if not points:
        raise InvalidValueError("there is no point to evaluate: the batches are empty")
    nll = -torch.cat([batch.value for batch in points])
    finite = nll.isfinite()
    bad = ~(finite | (nll == math.inf)) if may_be_infinite else ~finite
    if bad.any():
        raise InvalidValueError(
            f"{int(bad.sum())} of {len(nll)} points have a log-density that is NaN or infinite, the first at index "
            f"{int(bad.nonzero()[0])}; check that they lie where the transform is defined, and try "
            "tighter solver tolerances"
        )
    known_nll = nll[finite]
    standard_error = float(known_nll.std() / math.sqrt(len(known_nll))) if len(known_nll) > 1 else math.nan
    solver_errors = [error[batch.value.isfinite()] for batch in points if (error := batch.solver_error) is not None]
    probe_variance = _mean_of_known([batch.probe_variance for batch in points])
    draw_variance = _mean_of_known([batch.draw_variance for batch in points])
    bits = None
    if flow.transform.num_levels is not None and finite.all():
        terms = {name: float(torch.cat([batch.terms[name] for batch in points]).mean()) for name in points[0].terms}
        bits = BitsPerDim.from_log_prob(terms, flow.event_shape, standard_error)
    return Likelihood(
        nll=float(nll.mean()),
        standard_error=standard_error,
        num_points=len(nll),
        probe_standard_error=None if probe_variance is None else math.sqrt(probe_variance / len(nll)),
        solver_error=float(torch.cat(solver_errors).mean()) if any(map(len, solver_errors)) else None,
        solver_error_points=sum(map(len, solver_errors)),
        nfe=sum(len(batch.value) * batch.nfe for batch in points) / len(nll),
        values=nll,
        standard_errors=torch.cat([batch.variance for batch in points]).sqrt(),
        solver_errors=torch.cat([_or_nan(batch.solver_error, batch.value) for batch in points]),
        bits_per_dim=bits,
        num_draws=num_draws,
        draw_standard_error=None if draw_variance is None else math.sqrt(draw_variance / len(nll)),
        probe_bias=_mean_of_known([batch.probe_bias for batch in points]),
        statistics=max((batch.statistics for batch in points), key=lambda solve: solve.nfe_forward),
        solver=getattr(flow, "solver", None),  # another density may have none
    )


@dataclass(frozen=True)
class PointLikelihoods:
    """log p of the points of one batch, in float64 on the CPU; NaN where unknown."""

    value: Tensor  # (B,), of all draws together
    terms: Mapping[str, Tensor]  # (B,) each; they add up to the value
    probe_variance: Tensor  # (B,), of the value
    probe_bias: Tensor  # (B,), of the value
    draw_variance: Tensor  # (B,), of the value
    solver_error: Tensor | None  # (B,), where it was asked for
    nfe: float
    statistics: SolverStatistics  # of the first draw

    @property
    def variance(self) -> Tensor:  # (B,)
        """Of the value, by all that is random: several draws have probes of their own."""
        return torch.where(self.draw_variance.isnan(), self.probe_variance, self.draw_variance)


def pointwise(
    flow: CNF,
    batches: Iterable[Batch],
    generator: torch.Generator | None = None,
    solver_error_points: int = 0,
    progress: str | None = None,
    num_points: int | None = None,
    num_draws: int = 1,
) -> Iterable[PointLikelihoods]:
    """Yield what `likelihood` averages, one batch at a time."""
    if isinstance(num_draws, bool) or not isinstance(num_draws, int) or num_draws < 1:
        raise InvalidValueError(f"num_draws must be a whole number >= 1, got {num_draws!r}")
    if num_draws > 1 and flow.transform.num_levels is None:
        raise InvalidValueError(
            f"num_draws = {num_draws} are draws of dequantisation noise, and the flow's transform, "
            f"{type(flow.transform).__name__}, adds none; use num_draws=1"
        )
    can_be_finished(f"num_draws: {num_draws:,} solves of each batch", FASTEST_STEP * num_draws)
    with torch.no_grad(), new_bar(total=num_points, desc=progress, unit="pt", disable=progress is None) as bar:
        for batch in batches:
            x = batch.x.to(flow.device, torch.promote_types(batch.x.dtype, flow.dtype))  # tables stay in float64
            context = None if batch.context is None else batch.context.to(flow.device)
            checked = min(len(x), solver_error_points)
            solver_error_points -= checked
            for rows, check in ((slice(checked), True), (slice(checked, None), False)):
                if len(x[rows]):
                    own = None if context is None else context[rows]
                    yield _evaluate(flow, x[rows], own, generator, num_draws, check)
            bar.update(len(x))


def _evaluate(
    flow: CNF, x: Tensor, context: Tensor | None, generator: torch.Generator | None, num_draws: int, check: bool
) -> PointLikelihoods:
    share = current_share()
    own: dict[str, Any] = {} if share is None else {"rows": share.rows(len(x))}  # another density may know no rows
    draws = [flow.estimate_log_prob(x, context, generator, check and k == 0, **own) for k in range(num_draws)]
    terms = {name: torch.stack([draw.terms[name] for draw in draws]).double().cpu() for name in draws[0].terms}
    values = torch.stack(list(terms.values())).sum(0)  # (K, B)
    solver_error = draws[0].solver_error
    spread = torch.stack([draw.standard_error for draw in draws]).double().cpu().square()
    if check and spread.isnan().all():
        spread = _variance_of_one_probe(flow, x, context, generator).double().cpu()
        spread = spread[own.get("rows", slice(None))].expand_as(values)
    value = values.logsumexp(0) - math.log(num_draws)
    weight = values.softmax(0)
    terms = {name: term.mean(0) for name, term in terms.items()}
    bias, draw_variance = torch.zeros_like(value), torch.full_like(value, torch.nan)
    if num_draws > 1:
        terms["importance_weighting"] = value - values.mean(0)
        draw_variance = (values - value).exp().var(0) / num_draws
        bias = 0.5 * (weight * (1 - weight) * spread).sum(0)

    def joined(values: Tensor) -> Tensor:
        return values if share is None else share.joined(values, len(x))

    return PointLikelihoods(
        value=joined(value),
        terms={name: joined(term) for name, term in terms.items()},
        probe_variance=joined((weight.square() * spread).sum(0)),
        probe_bias=joined(bias),
        draw_variance=joined(draw_variance),
        solver_error=None if solver_error is None else joined(solver_error.double().cpu()),
        nfe=sum(draw.nfe for draw in draws) / num_draws,
        statistics=draws[0].statistics,
    )


def _variance_of_one_probe(
    flow: CNF, x: Tensor, context: Tensor | None, generator: torch.Generator | None
) -> Tensor:  # (B,)
    """Return half the squared difference of two log-densities of the same points under different probes."""
    y = flow.to_flow_space(x, context, generator)
    first, second = (flow.transport(y, (1.0, 0.0), context, generator).log_density_change for _ in range(2))
    assert first is not None  # since the transport took the divergence
    assert second is not None
    return (first - second).square() / 2  # the points arrive at the same place: only the changes differ


def _or_nan(values: Tensor | None, like: Tensor) -> Tensor:
    return torch.full_like(like, math.nan) if values is None else values


def _mean_of_known(values: list[Tensor]) -> float | None:
    """Return the mean without the NaNs; None if there is nothing else."""
    every = torch.cat(values)
    known = every[~every.isnan()]
    return float(known.mean()) if len(known) else None
