"""Metrics that compare draws of a model with data: C2ST, Wasserstein distances, MMD."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from flows.arguments import checked
from flows.checks import check_number, check_seed, whole_number
from flows.errors import InvalidValueError
from flows.evaluation.metrics.base import Measurement, SampleMetric

MAX_EXACT = 2_000  # points of an exact transport plan, whose time grows like the cube of their number
MAX_KERNEL = 5_000  # points of a matrix of kernels


class TwoSampleMetric(SampleMetric):
    """Compares draws of a model with data, both independent.

    Example:
        ```python
        import flows
        from flows.evaluation.metrics import Wasserstein2

        metric: flows.evaluation.TwoSampleMetric = Wasserstein2(max_points=500)
        ```
    """

    @abstractmethod
    def compare(self, draws: Tensor, data: Tensor) -> Measurement:
        """Compare draws (n, k) with data (m, k), in float64 on the CPU."""

    @checked
    def __call__(
        self,
        draws: Tensor,  # (n, *event)
        data: Tensor,  # (m, *event)
    ) -> Measurement:
        """Compare draws of a model with data.

        Raises:
            InvalidValueError: the shapes differ, there are fewer than two points, or a value is not finite.
        """
        if draws.ndim < 1 or data.ndim < 1 or draws.shape[1:] != data.shape[1:]:
            raise InvalidValueError(
                f"{self.name} compares points of one shape, got draws {tuple(draws.shape)} and data "
                f"{tuple(data.shape)}; both must be (n, *event)"
            )
        return self.compare(*(self.points(part, what) for part, what in ((draws, "draws"), (data, "data"))))


@checked
class C2ST(TwoSampleMetric):
    """The accuracy of a classifier that tells draws from data; ½ is perfect.

    A perceptron with two hidden layers of 10 k units (k: entries of a point), after standardisation by the data, as in
    sbibm. The accuracy is that on held-out folds. Both samples are cut to the same size. Its standard error is
    √(a (1 − a)/n) with n held-out points; that training sets overlap is ignored. [Lopez-Paz & Oquab 2017,
    arXiv:1610.06545; Lueckmann et al. 2021, arXiv:2101.04653]

    Args:
        num_folds: of the cross-validation.
        max_points: of each sample; the first are taken.
        seed: of the folds and the classifier.

    Example:
        ```python
        import torch

        from flows.evaluation import C2ST

        accuracy = C2ST(num_folds=2)(torch.randn(500, 2), torch.randn(500, 2) + 3)
        print(accuracy.value, accuracy.standard_error)
        ```
    """

    def __init__(self, num_folds: int = 5, max_points: int = 10_000, seed: int = 1) -> None:
        self.num_folds = whole_number("num_folds", num_folds, 2)
        self.max_points = whole_number("max_points", max_points, 10)
        check_seed(seed)
        self.seed = seed

    def compare(self, draws: Tensor, data: Tensor) -> Measurement:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.model_selection import KFold
        from sklearn.neural_network import MLPClassifier

        size = min(len(draws), len(data), self.max_points)
        if size < self.num_folds:
            raise InvalidValueError(
                f"c2st with {self.num_folds} folds needs as many draws and data at least, got {len(draws)} and "
                f"{len(data)}"
            )
        draws, data = draws[:size], data[:size]
        sd, mean = data.std(0), data.mean(0)
        points = ((torch.cat([draws, data]) - mean) / torch.where(sd > 0, sd, 1.0)).numpy()
        labels = np.repeat([0, 1], size)
        right = np.zeros(2 * size, dtype=bool)
        for train, test in KFold(self.num_folds, shuffle=True, random_state=self.seed).split(points):
            width = 10 * points.shape[1]
            model = MLPClassifier((width, width), max_iter=10_000, random_state=self.seed)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                model.fit(points[train], labels[train])
            right[test] = model.predict(points[test]) == labels[test]
        accuracy = float(right.mean())
        return Measurement(accuracy, math.sqrt(accuracy * (1 - accuracy) / len(right)))


class _Wasserstein(TwoSampleMetric):
    """W_p = (min E‖x − y‖^p)^(1/p), by an exact transport plan between the points."""

    power: int

    def __init__(self, max_points: int = MAX_EXACT) -> None:
        self.max_points = whole_number("max_points", max_points, 2)

    def compare(self, draws: Tensor, data: Tensor) -> Measurement:
        import ot

        x, y = draws[: self.max_points].numpy(), data[: self.max_points].numpy()
        cost: Any = ot.dist(x, y, metric="sqeuclidean" if self.power == 2 else "euclidean")
        weights = [np.full(len(part), 1 / len(part)) for part in (x, y)]
        value, log = ot.emd2(*weights, cost, log=True, numItermax=10_000_000)  # type: ignore[misc]
        return _root(float(value), _variance(log["u"]) + _variance(log["v"]), self.power)


@checked
class Wasserstein1(_Wasserstein):
    """The Wasserstein-1 distance, min E‖x − y‖ over plans, in data units.

    The plan between the points is exact (POT), so the distance of two samples of one distribution is above 0; it
    falls like n^(−1/d). The standard error is that around this expectation, by the dual potentials
    [del Barrio & Loubes 2019, arXiv:1705.01299].

    Args:
        max_points: of each sample; the first are taken. Time grows like its cube.

    Example:
        ```python
        import torch

        from flows.evaluation.metrics import Wasserstein1

        found = Wasserstein1()(torch.randn(200, 2), 1 + torch.randn(200, 2))
        found.value, found.standard_error
        ```
    """

    power = 1


@checked
class Wasserstein2(_Wasserstein):
    """The Wasserstein-2 distance, (min E‖x − y‖²)^½ over plans, in data units.

    See `Wasserstein1`. Two Gaussians with one covariance are as far apart as their means.

    Args:
        max_points: of each sample; the first are taken. Time grows like its cube.

    Example:
        ```python
        import torch

        from flows.evaluation.metrics import Wasserstein2

        found = Wasserstein2()(torch.randn(200, 2), 1 + torch.randn(200, 2))
        found.value, found.standard_error
        ```
    """

    power = 2


@checked
class SlicedWasserstein2(TwoSampleMetric):
    """The sliced Wasserstein-2 distance, (mean over directions u of W₂²(uᵀx, uᵀy))^½, in data units.

    Costs a sort for each direction, so it takes many points of many dimensions. For two Gaussians with one covariance
    whose means are δ apart it is ‖δ‖/√d. The standard error holds the spread over directions, and that over points by
    the dual potentials. [Bonneel et al. 2015, J. Math. Imaging Vis. 51, 22]

    Args:
        num_directions: drawn uniformly on the sphere.
        max_points: of each sample; the first are taken, as many of the one as of the other.
        seed: of the directions.

    Example:
        ```python
        import torch

        from flows.evaluation.metrics import SlicedWasserstein2

        found = SlicedWasserstein2()(torch.randn(200, 2), 1 + torch.randn(200, 2))
        found.value, found.standard_error
        ```
    """

    def __init__(self, num_directions: int = 200, max_points: int = 10_000, seed: int = 1) -> None:
        self.num_directions = whole_number("num_directions", num_directions, 2)
        self.max_points = whole_number("max_points", max_points, 2)
        check_seed(seed)
        self.seed = seed

    def compare(self, draws: Tensor, data: Tensor) -> Measurement:
        size = min(len(draws), len(data), self.max_points)
        generator = torch.Generator().manual_seed(self.seed)
        directions = torch.randn(draws.shape[1], self.num_directions, generator=generator, dtype=torch.float64)
        directions = directions / directions.norm(dim=0)
        squares, potentials = [], torch.zeros(2, size, dtype=torch.float64)
        for direction in directions.T:  # one at a time: together they might not fit into memory
            (x, x_order), (y, y_order) = ((part[:size] @ direction).sort() for part in (draws, data))
            squares.append(float((x - y).square().mean()))
            for row, order, own, other in ((0, x_order, x, y), (1, y_order, y, x)):
                slope = 2 * (own - other)  # of the potential, of which x ↦ its partner is the optimal map
                rise = (slope[1:] + slope[:-1]) / 2 * own.diff()
                potentials[row, order] += torch.cat([rise.new_zeros(1), rise.cumsum(0)]) / self.num_directions
        spread = float(np.var(squares, ddof=1)) / self.num_directions if draws.shape[1] > 1 else 0.0
        variance = spread + sum(float(part.var()) / size for part in potentials)
        return _root(float(np.mean(squares)), variance, 2)


@checked
class MMD(TwoSampleMetric):
    """The squared maximum mean discrepancy, E k(x, x′) + E k(y, y′) − 2 E k(x, y).

    k(x, y) = exp(−‖x − y‖²/2h²). The estimate is unbiased, so it may fall below 0 where the distributions are equal.
    Its standard error is that of a U-statistic, with both terms of its variance. [Gretton et al. 2012, JMLR 13, 723]

    Args:
        bandwidth: h in data units; "median": the median distance between points of both samples.
        max_points: of each sample; the first are taken, as many of the one as of the other.

    Example:
        ```python
        import torch

        from flows.evaluation.metrics import MMD

        found = MMD()(torch.randn(200, 2), 1 + torch.randn(200, 2))
        found.value, found.standard_error
        ```
    """

    def __init__(self, bandwidth: float | Literal["median"] = "median", max_points: int = 2_000) -> None:
        if bandwidth != "median":
            check_number("bandwidth", bandwidth, above=0, otherwise="or use 'median'")
        self.bandwidth = bandwidth
        self.max_points = whole_number("max_points", max_points, 4, MAX_KERNEL)

    def compare(self, draws: Tensor, data: Tensor) -> Measurement:
        n = min(len(draws), len(data), self.max_points)
        x, y = draws[:n], data[:n]
        if n < 4:
            raise InvalidValueError(f"mmd needs four points of each sample, got {len(draws)} and {len(data)}")
        if self.bandwidth == "median":
            width = float(torch.pdist(torch.cat([x[:500], y[:500]])).median())
            if width == 0:
                raise InvalidValueError("mmd: most points are equal, so their median distance is 0; set bandwidth=...")
        else:
            width = float(self.bandwidth)
        kernels = (torch.cdist(a, b).square().mul_(-0.5 / width**2).exp_() for a, b in ((x, x), (y, y), (x, y)))
        within_x, within_y, across = kernels
        h = (within_x + within_y - across - across.T).fill_diagonal_(0)
        means = h.sum(1) / (n - 1)
        value = float(means.mean())
        first = float(means.var())  # Var E[h(z, z′) | z], above by second/(n − 1)
        second = float(h.square().sum() / (n * (n - 1))) - value**2  # Var h(z, z′)
        first = max(first - second / (n - 1), 0.0)
        return Measurement(value, math.sqrt((4 * (n - 2) * first + 2 * second) / (n * (n - 1))))


def _variance(potential: Any) -> float:
    """Of the mean of a potential."""
    return float(np.var(np.asarray(potential), ddof=1)) / len(potential)


def _root(value: float, variance: float, power: int) -> Measurement:
    """The root of a cost, with its standard error to first order."""
    value = max(value, 0.0)
    root = value ** (1 / power)
    slope = 1 / power * root / value if value > 0 else 0.0
    if power == 2 and variance > 0 and slope * math.sqrt(variance) > root:
        return Measurement(root, variance**0.25)  # the expansion fails beside 0
    return Measurement(root, slope * math.sqrt(variance))
