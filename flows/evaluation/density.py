"""Evaluate a flow as a density: its likelihood on the data, and pictures of it."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import nn

from flows.arguments import checked
from flows.checks import whole_number
from flows.datasets import Dataset
from flows.divergence import Auto, DivergenceEstimator
from flows.errors import FlowsError, InvalidTypeError, InvalidValueError
from flows.evaluation.evaluator import Evaluation, Evaluator, Report, known, seeded
from flows.evaluation.likelihood import FIGURES, Likelihood, likelihood, part_batches
from flows.evaluation.metrics import Measurement, SampleMetric, chosen_metrics
from flows.evaluation.outliers import OutlierScores, outlier_scores
from flows.evaluation.parameters import with_parameters
from flows.evaluation.sampled import measured, with_metrics
from flows.models.cnf import CNF
from flows.models.mass import Mass, box, exactly, has_mass, mass
from flows.models.resolution import CHECKED_POINTS
from flows.naming import by_name
from flows.objectives.checks import check_base, check_contexts, check_levels
from flows.shares import current_share
from flows.solvers.stepping import check_step_size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOG = logging.getLogger(__name__)
MASS_POINTS = 10_000  # of the data, that say where to integrate the density
MASS_CONTEXTS = 8  # under which to do so: of classes
FEW_CONTEXTS = 3  # the same where hardly any two are equal
TRIAL_NUMBERS = 4096  # in the points that say how long a validation takes
CHECKED_TWICE = 2  # evaluations that the solver error of a point costs beside its own, about
WITH_MASS = 1.25  # how much longer a validation takes that integrates the density, too
PREDICTIVE = ("crps", "coverage")  # metrics of one value given columns of a table


@checked
@dataclass(frozen=True)
class FlowEvaluator(Evaluator):
    """What the evaluators of flows share: the divergence, the random numbers, the pictures.

    Args:
        dataset: what to evaluate on.
        divergence: used for all that is reported or drawn, whatever trains the flow: an estimator, its lower-case
            name, or `"auto"`. That is the cheapest exact one where an evaluation costs at most 32 Jacobian products,
            otherwise the training estimator with enough probes (two or more) for a standard error.
        batch_size: points in one solve.
        points: evaluate on the first points of a part alone; None: on all.
        solver_error_points: points of the test that are solved again at tighter tolerances. 32 of them are even if it
            is less, and in validation: a figure with a large solver error is no result.
        part: what `test` looks at, `"test"` or `"validation"`.
        seed: of noise and probes.
        progress_bar: show one in the test.

    Raises:
        ValueError: a number is out of range, or there is no estimator of that name.

    Example:
        ```python
        import flows
        from flows.evaluation import DensityEvaluator

        evaluator = DensityEvaluator(flows.datasets.Moons(), divergence="exact", part="validation", points=1000)
        ```
    """

    dataset: Dataset
    divergence: DivergenceEstimator | str = "auto"
    batch_size: int = 10_000
    points: int | None = None
    solver_error_points: int = 2_000
    part: str = "test"
    seed: int = 0
    progress_bar: bool = True

    def __post_init__(self) -> None:
        if self.divergence != "auto":
            object.__setattr__(self, "divergence", by_name(DivergenceEstimator, self.divergence, "divergence"))
        whole_number("batch_size", self.batch_size)
        if self.points is not None:
            whole_number("points", self.points, otherwise="None takes all")
        whole_number("solver_error_points", self.solver_error_points, 0, otherwise="0 takes as few as possible")
        if self.part not in ("test", "validation"):
            raise InvalidValueError(f"part must be test or validation, got {self.part!r}")

    @checked
    def check(self, model: nn.Module) -> None:
        flow = as_flow(model)
        check_contexts(flow, self.dataset)
        check_levels(flow.transform, self.dataset)
        if flow.solver.step_size is not None:
            check_step_size(flow.solver.step_size, (0.0, 1.0))

    def estimator(self, flow: CNF) -> DivergenceEstimator:
        """Return the estimator that evaluations of this flow use."""
        if isinstance(self.divergence, DivergenceEstimator):
            return self.divergence
        cheapest = Auto()
        return cheapest if cheapest.bind(flow.bind()).is_exact else with_standard_error(flow.divergence, flow)

    def evaluated_with(self, flow: CNF) -> str:
        """Name that estimator for a reader, such as "Analytic" or "Hutchinson, mean of 2"."""
        bound = self.estimator(flow).bind(flow.bind())
        if bound.is_exact:
            return bound.description
        one = bound.num_estimates == 1
        return f"{bound.description}, {'one estimate' if one else f'mean of {bound.num_estimates}'}"

    @contextlib.contextmanager
    def evaluating(self, flow: CNF) -> Iterator[CNF]:
        """Give the flow its evaluation estimator while entered; then the training one again."""
        training = flow.divergence
        flow.divergence = self.estimator(flow)
        try:
            yield flow
        finally:
            flow.divergence = training

    def pictures(self, model: nn.Module) -> Mapping[str, Figure]:
        from flows import plots  # slow to import

        flow = as_flow(model)
        with self.evaluating(flow), exactly(flow) if has_mass(flow) else contextlib.nullcontext():
            generator, bound = self.generator(flow, "plots"), flow.divergence.bind(flow.bind())
            name = bound.description if bound.is_exact else self.evaluated_with(flow)
            return plots.figures(flow, self.dataset, generator, evaluated_with=name)

    def generator(self, flow: CNF, purpose: str) -> torch.Generator:
        """Return a generator with the same numbers for the same purpose."""
        return seeded(torch.Generator(flow.device), self.seed, purpose)

    def _progress(self, part: str) -> str | None:
        share = current_share()
        first = share is None or share.index == 0
        return part if part == self.part and self.progress_bar and first else None


@checked
@dataclass(frozen=True)
class DensityEvaluator(FlowEvaluator):
    """Scores a flow by its negative log-likelihood (NLL) in nats.

    Args:
        num_draws: draws of the dequantisation noise of discrete data; more of them tighten the bound, one solve each.
            Validation takes one.
        metrics: figures of draws to report in the test: metrics of `flows.evaluation.metrics`, or their lower-case
            names, such as `["c2st", "crps"]`. By default (None) none, as they cost many draws, but the CRPS and the
            coverage of 90 % intervals of a single value given columns of a table.

    Example:
        ```python
        import flows
        from flows.evaluation import DensityEvaluator

        data, flow = flows.datasets.Moons(num_test=100), flows.CNF(flows.fields.MLP((2,), hidden=(8,)))
        report = DensityEvaluator(data, progress_bar=False).test(flow)
        report.metrics
        ```
    """

    shares: ClassVar[bool] = True
    num_draws: int = 1
    metrics: Sequence[SampleMetric | str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.metrics is not None:
            object.__setattr__(self, "metrics", chosen_metrics(self.metrics))

    @checked
    def check(self, model: nn.Module) -> None:
        super().check(model)
        check_base(as_flow(model), "evaluation=density", "judge it with evaluation=distance")

    @checked
    def likelihood(self, flow: CNF, part: str | None = None) -> Likelihood:
        """Evaluate a part; None: the one that `test` looks at."""
        tests, part = part is None, self.part if part is None else part
        batches, num_points = part_batches(flow, self.dataset, part, self.batch_size, self.points)
        with self.evaluating(flow):
            found = likelihood(
                flow,
                batches,
                generator=self.generator(flow, part),
                solver_error_points=max(self.solver_error_points if tests else 0, CHECKED_POINTS),
                progress=self._progress(part) if tests else None,
                num_points=num_points,
                num_draws=self.num_draws if tests else 1,
            )
            if has_mass(flow) and (tests or found.unresolved() is None):
                found = replace(found, mass=self._mass(flow, part, thorough=tests))
            return found

    def _mass(self, flow: CNF, part: str, thorough: bool) -> Mass | None:
        """Integrate the density where the data lie; under several contexts, return the worst mass.

        None if it cannot be solved there. Validation takes fewer points and no samples, which is enough to find a mass
        that is too large and flatters the likelihood.
        """
        batches, _ = part_batches(flow, self.dataset, part, MASS_POINTS, MASS_POINTS)
        batch = next(iter(batches))
        contexts, generator = [None], self.generator(flow, "mass")
        if batch.context is not None:
            every = batch.context.unique(dim=0)  # in order, so that the first may be an outlier
            order = torch.randperm(len(every), generator=torch.Generator().manual_seed(self.seed))
            most = MASS_CONTEXTS if self.dataset.num_classes is not None else FEW_CONTEXTS
            contexts = every[order[: most if thorough else 1]]
        low, high = box(batch.x)
        try:
            found = [mass(flow, low, high, one, generator, samples=thorough) for one in contexts]
        except FlowsError as error:  # between the data the field may be stiff, or the transform undefined
            LOG.info("the mass of the density is unknown: %s", error)
            return None
        return max(found, key=lambda one: abs(one.total - 1))

    def trial_seconds(self, model: nn.Module) -> float | None:
        flow = as_flow(model)
        most = min(self.dataset.num_validation, self.points or self.dataset.num_validation)
        count = min(most, TRIAL_NUMBERS // math.prod(flow.event_shape) + 1, self.batch_size)
        batches, _ = part_batches(flow, self.dataset, "validation", count, count)
        began = time.perf_counter()
        with self.evaluating(flow):
            likelihood(flow, batches, generator=self.generator(flow, "trial"))
        seconds = time.perf_counter() - began
        whole = seconds * (most + CHECKED_TWICE * min(CHECKED_POINTS, most)) / count
        return whole * (WITH_MASS if has_mass(flow) else 1.0)

    def test_size(self) -> float:
        sizes = [min(n, self.points or n) for n in (self.dataset.num_validation, self.dataset.num_test)]
        costs = [n + CHECKED_TWICE * min(n, checked) for n, checked in zip(sizes, self._checked_points(), strict=True)]
        return costs[1] * self.num_draws / costs[0]

    def _checked_points(self) -> tuple[int, int]:
        return CHECKED_POINTS, max(self.solver_error_points, CHECKED_POINTS)

    @checked
    def outliers(
        self, flow: CNF, data: Likelihood, outliers: Dataset | Literal["shuffled", "plain"] | None = None
    ) -> OutlierScores:
        """Score outliers against the part that `test` looks at, whose likelihood is `data`; see `outlier_scores`."""
        with self.evaluating(flow):
            generator = self.generator(flow, "outliers")
            return outlier_scores(
                flow, self.dataset, data, self.part, outliers, self.batch_size, generator, self.num_draws
            )

    @checked
    def validate(self, model: nn.Module) -> Evaluation:
        result = self.likelihood(as_flow(model), "validation")
        metrics = {"nll": result.nll, "nll_se": result.standard_error, "nfe": result.nfe}
        if (solver_error := known(result.solver_error)) is not None:
            metrics["solver_error"] = solver_error
        if self.dataset.entropy is not None:
            metrics["gap"] = result.nll - self.dataset.entropy
        if result.bits_per_dim is not None:
            metrics["bits_per_dim"] = result.bits_per_dim.value
            if (error := known(result.bits_per_dim.standard_error)) is not None:
                metrics["bits_per_dim_se"] = error
            metrics |= {f"bits_per_dim/{name}": value for name, value in result.bits_per_dim.parts.items()}
        fault = result.unresolved(self.dataset.entropy)
        if fault is not None:
            figures = [name for name in metrics if name.startswith(FIGURES) and not name.endswith("_se")]
            metrics = {f"{name}_unresolved" if name in figures else name: value for name, value in metrics.items()}
        return Evaluation(result.nll, metrics, result.statistics, fault)

    @checked
    def test(self, model: nn.Module) -> Report:
        flow = as_flow(model)
        return with_metrics(self.report(self.likelihood(flow), flow), self.measured(flow))

    @checked
    def measured(self, flow: CNF) -> Mapping[str, Measurement]:
        """Measure draws of the flow by `metrics`, on the part that `test` looks at."""
        points = self.dataset.num_test if self.part == "test" else self.dataset.num_validation
        points = min(points, self.points or points)
        predicts = self.dataset.conditions is not None and flow.event_shape == (1,) and points > 1
        chosen = chosen_metrics((PREDICTIVE if predicts else ()) if self.metrics is None else self.metrics)
        return measured(flow, self.dataset, chosen, self.part, self.generator(flow, "metrics"), self.points)

    @checked
    def report(self, result: Likelihood, flow: CNF) -> Report:
        """Write up a likelihood of this flow."""
        entropy, name = self.dataset.entropy, self.evaluated_with(flow)
        written = Report(
            metrics=result.metrics(entropy),
            rows=[*result.table(entropy), ("divergence", f"evaluated with {name}")],
            headline=("nll", "bits_per_dim", "gap", "nfe"),
            evaluated_with=name,
            unresolved=result.unresolved(entropy),
        )
        return with_parameters(written, flow)


def as_flow(model: nn.Module) -> CNF:
    """Return the model, which must be a `CNF`."""
    if not isinstance(model, CNF):
        raise InvalidTypeError(f"this evaluator needs a flows.CNF, got {type(model).__name__}; pass another evaluator")
    return model


def with_standard_error(estimator: DivergenceEstimator, flow: CNF) -> DivergenceEstimator:
    """Return the estimator with at least two probes, so that it has a standard error.

    A kind that always makes a single estimate is returned as it is.
    """
    field = flow.bind()
    given = estimator.bind(field)
    if given.is_exact or given.num_estimates > 1:
        return estimator
    for budget in range(given.cost + 1, 4 * given.cost + 4):
        candidate = given.with_budget(budget, field)
        bound = candidate.bind(field)
        if bound.is_exact or bound.num_estimates > 1:
            return candidate
    return estimator
