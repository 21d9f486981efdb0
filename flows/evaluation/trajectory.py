"""Evaluate a neural ODE on time series: errors of its predictions, inside and beyond the training span."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from flows.arguments import checked
from flows.checks import check_number, whole_number
from flows.datasets import Dataset, Series
from flows.errors import InvalidTypeError, InvalidValueError
from flows.evaluation.evaluator import Evaluation, Evaluator, Report, set_apart
from flows.evaluation.metrics import PredictiveMetric, SampleMetric, chosen_metrics
from flows.evaluation.parameters import with_parameters
from flows.evaluation.sampled import with_metrics
from flows.evaluation.trajectory_report import FIGURES, fault_of, figures, predictive_figures, report, score
from flows.models.neural_ode import NeuralODE
from flows.objectives.checks import check_contexts
from flows.predictions import Predictions, predict
from flows.solvers import SolverError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHECKED_SERIES = 8  # on which every evaluation takes a solver error


@checked
@dataclass(frozen=True)
class TrajectoryEvaluator(Evaluator):
    """Scores a neural ODE by the error of the states that it predicts from the first state of each series.

    The score of a validation is the mean square error per value as the field sees values, or their negative
    log-likelihood under N(state, noise²) if the model knows noise: the loss of `TrajectoryMatching`. Reported figures
    are in the units of the data, or relative to the standard deviation of each entry over the training series.

    Errors count inside the training span, and apart from that beyond it. Where the states without noise are known, as
    for a `DynamicalSystem` with noise, there are errors against them, too. Standard errors are over series.

    Args:
        dataset: what to evaluate on.
        batch_size: series in one solve.
        max_series: evaluate on the first series of a part alone; None: on all.
        solver_error_series: series of the test that are solved again at tighter tolerances; 8 of them are even if it is
            less, and in validation.
        part: what `test` looks at, `"test"` or `"validation"`.
        progress_bar: show one in the test.
        metrics: figures of draws N(state, noise²) inside the training span, for a model with noise: coverage, CRPS and
            energy score of `flows.evaluation.metrics`, or their lower-case names. Standard errors are over series.
        seed: of these draws.
        span: how long the series went on that the model was trained on; None: those of `dataset`.

    Raises:
        InvalidTypeError, InvalidValueError: the data are no series, a number is out of range, or a metric compares two
            samples, which predicted states are not.

    Example:
        ```python
        import flows
        from flows.evaluation import TrajectoryEvaluator

        data = flows.datasets.Spiral(num_series=10, num_times=20)
        ode = flows.NeuralODE(flows.fields.MLP((2,), hidden=(8,)))
        report = TrajectoryEvaluator(data, progress_bar=False).test(ode)
        report.metrics
        ```
    """

    shares: ClassVar[bool] = True
    dataset: Dataset
    batch_size: int = 1000
    max_series: int | None = None
    solver_error_series: int = 100
    part: str = "test"
    progress_bar: bool = True
    metrics: Sequence[SampleMetric | str] = ()
    seed: int = 0
    span: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "metrics", predictive_metrics(self.metrics))
        if not isinstance(self.dataset, Series):
            raise InvalidTypeError(
                f"TrajectoryEvaluator needs time series, such as flows.datasets.Series, and the data "
                f"{self.dataset.name!r} are none"
            )
        whole_number("batch_size", self.batch_size)
        if self.max_series is not None:
            whole_number("max_series", self.max_series, otherwise="None takes all")
        whole_number("solver_error_series", self.solver_error_series, 0, otherwise="0 takes as few as possible")
        if self.span is not None:
            check_number("span", self.span, at_least=0)
        if self.part not in ("test", "validation"):
            raise InvalidValueError(f"part must be test or validation, got {self.part!r}")

    @checked
    def check(self, model: nn.Module) -> None:
        ode = as_neural_ode(model)
        if tuple(self.dataset.event_shape) != ode.event_shape:
            raise InvalidValueError(
                f"the states of {self.dataset.name!r} have the shape {tuple(self.dataset.event_shape)}, and those of "
                f"the model {ode.event_shape}"
            )
        check_contexts(ode, self.dataset)
        if self.metrics and ode.log_noise is None:
            names = ", ".join(metric.name for metric in predictive_metrics(self.metrics))
            raise InvalidValueError(
                f"evaluation.metrics=[{names}] needs predictions with noise, and this neural ODE predicts one path; "
                "train with model.noise=0.1 objective.trajectory_matching.objective.loss=gaussian, or leave it out"
            )

    @checked
    def predictions(self, model: nn.Module, part: str | None = None, until: float | None = None) -> Predictions:
        """Predict the series of a part, by default the one that `test` looks at.

        Args:
            until: leave out what comes later than so long after the start of each series. None: nothing.
        """
        tests, part = part is None, self.part if part is None else part
        assert isinstance(self.dataset, Series)  # as checked
        return predict(
            as_neural_ode(model),
            self.dataset,
            part,
            self.batch_size,
            self.max_series,
            max(self.solver_error_series if tests else 0, CHECKED_SERIES),
            until,
            part if tests and self.progress_bar else None,
            self.span,
        )

    @checked
    def validate(self, model: nn.Module) -> Evaluation:
        found = self.predictions(model, "validation")
        fault = fault_of(found, "all")
        metrics = figures(found, "all", "")
        if fault is not None:
            metrics = {f"{name}_unresolved" if name in FIGURES else name: value for name, value in metrics.items()}
        numbers = {name: value for name, value in metrics.items() if value is not None}
        return Evaluation(score(found), {**numbers, "nfe": found.nfe}, found.statistics, fault)

    @checked
    def test(self, model: nn.Module) -> Report:
        assert isinstance(self.dataset, Series)  # as checked
        stopped = None
        try:
            found = self.predictions(model)
        except SolverError as error:
            stopped = str(error)
            found = self.predictions(model, until=self.dataset.training_span if self.span is None else self.span)
        chosen = predictive_metrics(self.metrics)
        written = with_metrics(report(found, self.dataset, stopped), predictive_figures(found, chosen, self.seed))
        if written.unresolved is not None:
            written = replace(written, metrics=set_apart(written.metrics, [metric.name for metric in chosen]))
        return with_parameters(written, model, self.dataset.part("train"))

    def pictures(self, model: nn.Module) -> Mapping[str, Figure]:
        from flows import plots  # slow to import

        assert isinstance(self.dataset, Series)  # as checked
        return plots.series_figures(as_neural_ode(model), self.dataset, self.part)


def predictive_metrics(given: Sequence[SampleMetric | str]) -> tuple[PredictiveMetric, ...]:
    """Return the metrics, which must compare each value with draws for it.

    Raises:
        InvalidTypeError, InvalidValueError: there is none of that name, or one compares two samples.
    """
    chosen = chosen_metrics(given)
    others = [metric.name for metric in chosen if not isinstance(metric, PredictiveMetric)]
    if others:
        raise InvalidValueError(
            f"evaluation.metrics=[{', '.join(others)}] compares two samples, and a neural ODE predicts each series; "
            "take coverage, crps or energy_score"
        )
    return tuple(metric for metric in chosen if isinstance(metric, PredictiveMetric))


def as_neural_ode(model: nn.Module) -> NeuralODE:
    """Return the model, which must be a `NeuralODE`."""
    if not isinstance(model, NeuralODE):
        raise InvalidTypeError(
            f"this evaluator needs a flows.NeuralODE, got {type(model).__name__}; pass another evaluator"
        )
    return model
