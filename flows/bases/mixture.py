"""A mixture of normal distributions, fitted to the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from flows.arguments import checked
from flows.bases.base import Base
from flows.bases.expectation_maximisation import fit_mixture
from flows.bases.normal import LOG_TWO_PI, entries
from flows.checks import as_shape, check_number, check_points, check_seed, whole_number
from flows.errors import InvalidValueError

MOST_POINTS = 100_000  # that EM looks at
MOST_EXACT = 16  # numbers a point up to which EM computes in float64; beyond, float32 halves its time


@checked(own=("weights", "means", "covariances"))
class Mixture(Base):
    r"""A mixture of K normal distributions, log p(z) = log Σ_k π_k N(z; μ_k, Σ_k).

    By default the components are fitted to the training data in flow space, by EM, from the clusters of k-means.
    The flow then has to learn only what the mixture has missed. In Python call `base.fit(points)`, or
    `flow.fit_ends(data.reference())`; a run does so at its start.

    Args:
        event_shape: shape of a point.
        num_components: K of the fit. Default: 8.
        covariance_type: of the fit: `"full"`, `"diagonal"` or `"spherical"`. Default: `"full"`.
        weights: π, (K) positive numbers. Default: equal, or those of the fit.
        means: μ, (K, *event). Default: those of the fit.
        covariances: Σ: one variance, K variances, or K matrices of d rows of d numbers. Default: 1, or those of the
            fit.
        shrinkage: ν of the fit: a component of n_k points and covariance S_k gets (n_k S_k + ν C)/(n_k + ν), with the
            covariance C of all points. It keeps components of few points from overfitting. Default: 0.
        trainable: whether likelihood training moves all of them. Default: `False`.
        seed: of the start of EM.

    Raises:
        InvalidValueError: a shape is wrong, a weight is not positive, or a covariance is none.

    Source of EM: Dempster, Laird & Rubin 1977. As a base of flows: Izmailov et al. 2020, arXiv:1912.13025.

    Example:
        ```python
        import torch

        import flows

        flow = flows.CNF(flows.fields.MLP((2,), at_rest=True), base=flows.bases.Mixture((2,), num_components=4))
        flow.fit_ends(flows.datasets.Moons().sample(1000))  # fits the mixture by EM
        flow.log_prob(torch.zeros(1, 2))  # that of the mixture: the field is at rest
        ```
    """

    log_weight: Tensor  # (K), up to a constant
    mean: Tensor  # (K, d)
    log_scale: Tensor  # (K, d)
    lower: Tensor  # (K, d, d), below the diagonal, in units of log_scale

    def __init__(
        self,
        event_shape: int | Sequence[int],
        num_components: int = 8,
        covariance_type: Literal["full", "diagonal", "spherical"] = "full",
        weights: Sequence[float] | Tensor | None = None,
        means: Sequence[Any] | Tensor | None = None,
        covariances: float | Sequence[Any] | Tensor | None = None,
        trainable: bool = False,
        seed: int = 0,
        shrinkage: float = 0.0,
    ) -> None:
        super().__init__(event_shape)
        check_seed(seed)
        check_number("shrinkage", shrinkage, at_least=0)
        self.shrinkage = shrinkage
        size, d = whole_number("num_components", num_components), math.prod(self.event_shape)
        self.covariance_type, self.seed, self.trainable = covariance_type, seed, trainable
        self._given = means is not None
        if means is None and (weights is not None or covariances is not None):
            raise InvalidValueError("weights and covariances belong to given means; give means, too, or none of them")
        if means is not None:
            size = len(means)
        self._ready = self._given
        centre = (
            torch.full((size, d), math.nan) if means is None else entries("means", means, (size, *self.event_shape))
        )
        share = torch.ones(size) if weights is None else entries("weights", weights, (size,))
        if not share.is_meta and not bool((share > 0).all()):
            raise InvalidValueError(f"weights must be above 0, got {weights}")
        factor = _factors(1.0 if covariances is None else covariances, size, d)
        self.hold(
            trainable,
            log_weight=(share / share.sum()).log(),
            mean=centre.reshape(size, d),
            log_scale=factor.diagonal(dim1=-2, dim2=-1).log(),
            lower=_unit(factor),
        )

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Gradients of a draw do not reach the weights, so draws of a trained mixture carry none."""
        return not self.is_trained

    @property
    def needs_fit(self) -> bool:
        return not self._given

    @property
    def num_components(self) -> int:
        """K."""
        return len(self.log_weight)

    @property
    def factor(self) -> Tensor:  # (K, d, d)
        """Cholesky factors of the covariances."""
        unit = self.lower.tril(-1) + _identity(self.lower)
        return unit * self.log_scale.exp().unsqueeze(-2)

    def sample(self, shape: int | Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        self._require_fit("Mixture", "means and covariances")
        shape = as_shape("shape", shape, at_least=0)
        noise = self.standard_normal(shape, generator).reshape(-1, self.mean.shape[1])
        with torch.no_grad():
            total = self.log_weight.softmax(0).cumsum(0)
            which = torch.searchsorted(total / total[-1], self.uniform((len(noise),), generator, ()), right=True)
            which = which.clamp_max(self.num_components - 1)
            moved = torch.einsum("nij,nj->ni", self.factor[which], noise)
            return (self.mean[which] + moved).reshape(*shape, *self.event_shape)

    def companions(self, points: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw a component of each data point from its posterior, and a point of that component; the middle is μ_k."""
        self._require_fit("Mixture", "means and covariances")
        noise = self.standard_normal((len(points),), generator).flatten(1)
        with torch.no_grad():
            total = self._log_joint(points.flatten(1)).softmax(-1).cumsum(-1)
            rank = self.uniform((len(points),), generator, ()).unsqueeze(1) * total[:, -1:]
            which = torch.searchsorted(total, rank, right=True).squeeze(1).clamp_max(self.num_components - 1)
            drawn = self.mean[which]
            for k, factor in enumerate(self.factor):
                own = (which == k).nonzero().squeeze(1)
                drawn[own] += noise[own] @ factor.T
            return drawn.view_as(points), self.mean[which].view_as(points)

    def log_prob(
        self,
        z: Tensor,  # (*batch, *event)
    ) -> Tensor:  # (*batch)
        """The log-density in nats."""
        self._require_fit("Mixture", "means and covariances")
        check_points("z", z, self.event_shape, batched=False)
        flat = z.flatten(z.ndim - len(self.event_shape)).reshape(-1, self.mean.shape[1])
        logits = self._log_joint(flat)
        return logits.logsumexp(-1).reshape(z.shape[: z.ndim - len(self.event_shape)])

    def _log_joint(self, flat: Tensor) -> Tensor:  # (n, d) to (n, K)
        """Return the log-density of each component, times its weight."""
        whitening, shift = self.whitening()
        white = (flat @ whitening.flatten(0, 1).T).view(len(flat), *self.mean.shape) - shift
        return self.log_constant() - 0.5 * white.square().sum(-1)

    def whitening(self) -> tuple[Tensor, Tensor]:  # (K, d, d) and (K, d)
        """Return L⁻¹ and L⁻¹ μ of each component, for Σ = L Lᵀ."""
        factor = self.factor
        whitening = torch.linalg.solve_triangular(factor, _identity(factor).expand_as(factor), upper=False)
        return whitening, torch.einsum("kij,kj->ki", whitening, self.mean)

    def log_constant(self) -> Tensor:  # (K)
        """Return the log-density of each component, times its weight, at its mean."""
        log_det = self.log_scale.sum(-1)
        return self.log_weight.log_softmax(0) - log_det - 0.5 * self.mean.shape[1] * LOG_TWO_PI

    def fit(self, points: Tensor, to_flow_space: Callable[[Tensor], Tensor] | None = None) -> Mixture:
        """Fit the components to points (n, *event) by EM, unless means were given.

        At most 100,000 points are looked at, evenly spaced.

        Raises:
            InvalidValueError: there are fewer points than components, or a covariance is not positive definite.
        """
        if self._given:
            return self
        size = self.num_components
        check_points("points", points, self.event_shape, finite=True)
        if len(points) < max(2, size):
            raise InvalidValueError(
                f"num_components={size} need at least as many points to be fitted to, got {len(points)}; choose fewer"
            )
        rows = points[:: -(-len(points) // MOST_POINTS)].flatten(1)
        exact = rows.double() if rows.shape[1] <= MOST_EXACT else rows.float()
        found = fit_mixture(exact, size, self.covariance_type, self.shrinkage, self.seed)
        with torch.no_grad():
            self.log_weight.copy_(found.weights.log())
            self.mean.copy_(found.means)
            self.log_scale.copy_(found.factors.diagonal(dim1=-2, dim2=-1).log())
            self.lower.copy_(_unit(found.factors))
        self._ready = True
        return self


def _identity(like: Tensor) -> Tensor:  # (d, d), made where it is used: a copy would wait for a GPU
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def _unit(factor: Tensor) -> Tensor:
    """Cholesky factors in units of their diagonal."""
    return factor / factor.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)


def _factors(covariances: Any, size: int, d: int) -> Tensor:  # (K, d, d)
    if isinstance(covariances, Tensor):
        matrices = covariances.ndim == 3
    else:
        matrices = isinstance(covariances, Sequence) and bool(covariances) and isinstance(covariances[0], Sequence)
    if matrices:
        full = entries("covariances", covariances, (size, d, d))
    else:
        variances = entries("covariances", covariances, (size,))
        full = torch.diag_embed(variances.unsqueeze(1).expand(size, d))
    if full.is_meta:
        return full
    factor, failed = torch.linalg.cholesky_ex(full)
    if bool(failed.any()) or not torch.allclose(full, full.mT, rtol=1e-5, atol=1e-12):
        raise InvalidValueError("covariances must be symmetric and positive definite matrices, or positive variances")
    return factor
