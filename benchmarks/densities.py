"""Baseline densities without an ODE, evaluated by the same account as flows."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flows.bases import Normal
from flows.datasets import Batch, Dataset
from flows.errors import MissingPackageError
from flows.evaluation import Evaluation, Evaluator, Report, likelihood, part_batches
from flows.models.results import LogProbEstimate
from flows.objectives import LossOutput, Objective
from flows.solvers import SolverStatistics
from flows.transforms import Transform, Whiten


class TransformedDensity(nn.Module):
    """log p(x) = log p(y) + log_det with y = transform(x).

    It has the interface that `flows.evaluation.likelihood` needs. Subclasses implement `log_density`.
    """

    def __init__(self, transform: Transform, event_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.transform = transform
        self.event_shape = event_shape
        self.base = Normal(event_shape)

    @property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @abstractmethod
    def log_density(self, y: Tensor) -> Tensor:
        """log p(y) in nats: (B, d) -> (B,)."""

    def estimate_log_prob(
        self,
        x: Tensor,  # (B, *event), data space
        context: None = None,
        generator: torch.Generator | None = None,  # of dequantisation noise
        solver_error: bool = False,
    ) -> LogProbEstimate:
        """The same account as that of a flow, without probes and solves."""
        y, terms = self.transform.account(x, generator)
        value = self.log_density(y.flatten(1)).to(x)
        terms, none = {"model": value} | terms, torch.zeros_like(value)
        return LogProbEstimate(sum(terms.values()), none, none, 0, SolverStatistics(), terms, {})

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


class Gaussian(TransformedDensity):
    """N(mean, C) with the moments of `points`; `floor` is added to the diagonal of C."""

    def __init__(self, transform: Transform, event_shape: tuple[int, ...], points: Tensor, floor: float = 1e-6) -> None:
        super().__init__(transform, event_shape)
        y = points.double()
        size = y.shape[1]
        covariance = y.T.cov().reshape(size, size) + floor * torch.eye(size, dtype=torch.float64)
        self.normal = torch.distributions.MultivariateNormal(y.mean(0), covariance)

    def log_density(self, y: Tensor) -> Tensor:
        return self.normal.log_prob(y.double())

    @property
    def num_parameters(self) -> int:
        d = math.prod(self.event_shape)
        return d + d * (d + 1) // 2


class Mixture(TransformedDensity):
    """A mixture of Gaussians with full covariances, by scikit-learn's EM.

    Args:
        points: in flow space.
        num_components: of the mixture.
        floor: added to the diagonals of all covariances, after the points are whitened.
        seed: of the initial components.
    """

    def __init__(
        self,
        transform: Transform,
        event_shape: tuple[int, ...],
        points: Tensor,  # (n, d)
        num_components: int,
        floor: float,
        seed: int = 0,
    ) -> None:
        super().__init__(transform, event_shape)
        from sklearn.mixture import GaussianMixture

        self.whiten = Whiten((points.shape[1],)).double().fit(points.double())
        model = GaussianMixture(num_components, reg_covar=floor, random_state=seed, max_iter=50, tol=0.02)
        self.model = model.fit(self.whiten(points.double())[0].numpy())

    def log_density(self, y: Tensor) -> Tensor:
        white, log_det = self.whiten(y.double())
        return torch.from_numpy(self.model.score_samples(white.numpy())) + log_det

    @property
    def num_parameters(self) -> int:
        d = math.prod(self.event_shape)
        return self.model.n_components * (1 + d + d * (d + 1) // 2) - 1


class Spline(TransformedDensity):
    """zuko's neural spline flow, untrained. [Durkan et al. 2019, arXiv:1906.04032]

    Raises:
        MissingPackageError: zuko is not installed.
    """

    def __init__(
        self,
        transform: Transform,
        event_shape: tuple[int, ...],
        num_transforms: int = 3,
        hidden: int = 256,
        bins: int = 8,
    ) -> None:
        super().__init__(transform, event_shape)
        size = math.prod(event_shape)
        self.flow = spline_flow()(size, transforms=num_transforms, bins=bins, hidden_features=(hidden, hidden))

    def log_density(self, y: Tensor) -> Tensor:
        return self.flow().log_prob(y)


class NegativeLogLikelihood(Objective):
    """−mean log p(x) of a model with `estimate_log_prob`."""

    solves = False

    def __call__(self, model: TransformedDensity, batch: Batch, generator: torch.Generator | None = None) -> LossOutput:
        return LossOutput(-model.estimate_log_prob(batch.x, generator=generator).value.mean())


class NegativeLogLikelihoodScore(Evaluator):
    """The validation NLL in nats, with the same noise at every call."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def validate(self, model: nn.Module) -> Evaluation:
        return Evaluation(validation_nll(model, self.dataset), {})

    def test(self, model: nn.Module) -> Report:
        return Report({}, [])


def validation_nll(model: Any, dataset: Dataset) -> float:
    """Validation NLL in nats, with the same noise at every call."""
    batches, _ = part_batches(model, dataset, "validation", 10_000)
    return likelihood(model, batches, torch.Generator().manual_seed(1)).nll


def spline_flow() -> Callable[..., nn.Module]:
    """zuko's class of neural spline flows; raises `MissingPackageError` if zuko is missing."""
    try:
        from zuko.flows import NSF
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            "the neural spline flow needs zuko, which is not installed: pip install -e '.[bench]'; for images, "
            "--baselines mixture gaussian does without it"
        ) from error
    return NSF
