"""The contract of an evaluator: how good is a model?"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import nn

from flows.arguments import checked
from flows.checks import check_seed
from flows.datasets import Dataset, Energy, Simulations
from flows.errors import InvalidTypeError
from flows.models.cnf import CNF
from flows.models.neural_ode import NeuralODE
from flows.solvers import SolverStatistics

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Evaluation:
    """A score during training.

    Example:
        ```python
        from flows.evaluation import Evaluation

        Evaluation(score=1.5, metrics={"nll": 1.5, "nll_se": 0.01})  # lower is better
        ```
    """

    score: float  # lower is better; the checkpoint `best.pt` has the lowest
    metrics: Mapping[str, float]  # to log; a name with a slash keeps its own group in TensorBoard
    statistics: SolverStatistics | None = field(default=None, repr=False)  # of the largest solve
    unresolved: str | None = None  # why the score is no result, and what to change; such weights are never the best


@dataclass(frozen=True)
class Report:
    """The result of a test.

    Example:
        ```python
        from flows.evaluation import Report

        Report(metrics={"error": 0.1}, rows=[("error", "0.10 ± 0.01")], headline=["error"])
        ```
    """

    metrics: Mapping[str, Any]  # plain values for JSON, None where unknown; `<name>_se` is a standard error
    rows: Sequence[tuple[str, str]]  # names and values for a reader
    headline: Sequence[str] = ()  # the few metrics by which runs are compared
    evaluated_with: str | None = None  # how the divergence was taken, such as "Analytic"
    unresolved: str | None = None  # why figures are None, and what to change; their raw values are `<name>_unresolved`

    def __str__(self) -> str:
        return aligned(self.rows)


class Evaluator(ABC):
    """Says how good a model is: often and fast in validation, thoroughly in the test.

    The `Trainer` calls nothing else to judge a model. To add one: subclass it, and add a yaml with its `_target_` to
    `conf/evaluation`. Each call uses the same random numbers, so that scores can be compared.

    Attributes:
        shares: whether all processes of a run evaluate together, each its `flows.shares.own_rows`. By default the
            first does it alone, and the others wait.

    Example:
        ```python
        from flows.evaluation import Evaluation, Evaluator, Report


        class Distance(Evaluator):
            '''The distance of the mean sample from that of the data.'''

            def __init__(self, dataset):
                self.mean = dataset.reference().mean(0)

            def _distance(self, model):
                return float((model.sample((500,)).mean(0) - self.mean).norm())

            def validate(self, model, *rest, **settings):
                return Evaluation(self._distance(model), {})

            def test(self, model, *rest, **settings):
                return Report({"distance": self._distance(model)}, [("distance", f"{self._distance(model):.2f}")])
        ```
    """

    shares: ClassVar[bool] = False

    def check(self, model: nn.Module) -> None:
        """Raise `InvalidValueError` if the model cannot be evaluated; called before training."""
        del model

    @abstractmethod
    def validate(self, model: nn.Module) -> Evaluation:
        """Score the model on the validation part."""

    @abstractmethod
    def test(self, model: nn.Module) -> Report:
        """Measure the trained model, with standard errors."""

    def trial_seconds(self, model: nn.Module) -> float | None:
        """Estimate the time of a validation from a few points. Default: None, unknown."""
        del model
        return None

    def test_size(self) -> float:
        """Return how many times as long as a validation the test takes. Default: 1."""
        return 1.0

    def pictures(self, model: nn.Module) -> Mapping[str, Figure]:
        """Draw the model; keys are file names. By default nothing."""
        del model
        return {}


@checked(own=("dataset",))
def default_evaluator(
    model: nn.Module,
    dataset: Dataset,
    seed: int = 0,
    progress_bar: bool = True,
) -> Evaluator:
    """Return what suits a model and its data: an energy, a posterior, a density, a distance, or trajectories.

    Raises:
        TypeError: the model is neither a `CNF` nor a `NeuralODE`, or the data do not suit it.

    Example:
        ```python
        import flows
        from flows.evaluation import default_evaluator

        data, flow = flows.datasets.Moons(num_test=100), flows.CNF(flows.fields.MLP((2,), hidden=(8,)))
        report = default_evaluator(flow, data, progress_bar=False).test(flow)
        ```
    """
    from flows.evaluation.density import DensityEvaluator  # all build on this module
    from flows.evaluation.distance import DistanceEvaluator
    from flows.evaluation.energy import EnergyEvaluator
    from flows.evaluation.posterior import PosteriorEvaluator
    from flows.evaluation.trajectory import TrajectoryEvaluator
    from flows.objectives.checks import check_kind

    if isinstance(model, CNF | NeuralODE):
        check_kind(model, dataset)
    if isinstance(model, NeuralODE):
        return TrajectoryEvaluator(dataset, progress_bar=progress_bar)
    if not isinstance(model, CNF):
        raise InvalidTypeError(
            f"there is no default evaluator for {type(model).__name__}: pass evaluator=..., a subclass of "
            "flows.evaluation.Evaluator"
        )
    if isinstance(dataset, Energy):
        kind = EnergyEvaluator
    elif not model.base.is_positive_everywhere:
        kind = DistanceEvaluator
    else:
        kind = PosteriorEvaluator if isinstance(dataset, Simulations) else DensityEvaluator
    return kind(dataset, seed=seed, progress_bar=progress_bar)


@checked
def seeded(generator: torch.Generator, seed: int, purpose: str, *key: int) -> torch.Generator:
    """Seed `generator` independently of any other seed, purpose and key.

    Example:
        ```python
        import torch

        from flows.evaluation import seeded

        generator = seeded(torch.Generator(), 0, "validation", 3)
        ```
    """
    check_seed(seed)
    words = np.random.SeedSequence([seed, *purpose.encode(), *key]).generate_state(2)
    return generator.manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)


@checked
def aligned(rows: Sequence[tuple[str, str]]) -> str:
    """Write names and values in two columns.

    Example:
        ```python
        from flows.evaluation import aligned

        print(aligned([("nll", "1.50 ± 0.01"), ("evaluations", "80")]))
        ```
    """
    width = max([12, *(len(name) for name, _ in rows)])
    return "\n".join(f"{name:>{width}}  {value}" for name, value in rows)


def set_apart(metrics: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Replace unresolved metrics by None and keep their values as `<name>_unresolved`."""
    values = {name: metrics[name] for name in names if metrics.get(name) is not None}
    apart = {
        f"{name}_unresolved": {key: known(part) for key, part in value.items()}  # such as parts of bits per dimension
        if isinstance(value, Mapping)
        else known(value)
        for name, value in values.items()
    }
    return {**metrics, **{name: None for name in names if name in metrics}, **apart}


def known(value: float | None) -> float | None:
    """Return the value, or None where it is NaN or infinite, which JSON does not have."""
    return None if value is None or not math.isfinite(value) else value
