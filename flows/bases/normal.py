"""Normal distributions: the standard one, from which a flow starts by default, and any other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from flows.arguments import checked
from flows.bases.base import Base
from flows.checks import as_shape, check_points
from flows.errors import InvalidValueError

LOG_TWO_PI = math.log(2 * math.pi)


@checked(own=("mean", "covariance"))
class Normal(Base):
    r"""A normal distribution, N(0, I) by default.

    log N(z; μ, Σ) = −½ (z − μ)ᵀ Σ⁻¹ (z − μ) − ½ log det Σ − d/2 log 2π, for points z with d numbers each.

    Args:
        event_shape: shape of a point.
        mean: μ, one number for all entries or numbers of the event shape. Default: 0.
        covariance: Σ: one number, the variance of all entries; variances of the event shape; or d rows of d numbers.
            Default: 1.
        fit: take mean and covariance of the training data, in flow space. Default: `False`.
        trainable: whether likelihood training moves mean and covariance, too. Default: `False`.
        covariance_type: `"full"` or `"diagonal"`, of what is fitted or trained. Default: `"full"`.

    Raises:
        InvalidValueError: a shape is wrong, the covariance is none, or `fit` contradicts a given value.

    Example:
        ```python
        import flows

        base = flows.bases.Normal((2,), mean=[1.0, 0.0], covariance=[[2.0, 0.5], [0.5, 1.0]])
        flow = flows.CNF(flows.fields.MLP((2,)), base=base)
        ```
    """

    mean: Tensor  # (d)
    log_scale: Tensor  # (d), of the diagonal of L
    lower: Tensor  # (d, d), L in units of its diagonal; only what is below it is used

    def __init__(
        self,
        event_shape: int | Sequence[int],
        mean: float | Sequence[Any] | Tensor | None = None,
        covariance: float | Sequence[Any] | Tensor | None = None,
        fit: bool = False,
        trainable: bool = False,
        covariance_type: Literal["full", "diagonal"] = "full",
    ) -> None:
        super().__init__(event_shape)
        if fit and (mean is not None or covariance is not None):
            raise InvalidValueError("fit=True takes mean and covariance from the data; leave out mean and covariance")
        self.fits, self.full = fit, covariance_type == "full"
        self._ready = not fit
        self.is_given = mean is not None or covariance is not None or fit or trainable
        if not self.is_given:
            return
        d = math.prod(self.event_shape)
        centre = entries("mean", 0.0 if mean is None else mean, self.event_shape).reshape(d)
        factor, full = _factor(1.0 if covariance is None else covariance, self.event_shape)
        self.full = full or (self.full and (fit or trainable))
        held = {"mean": centre, "log_scale": factor.diagonal().log()}
        if self.full:
            held["lower"] = factor / factor.diagonal()  # the unit diagonal is not used
        self.hold(trainable, **held)

    @property
    def is_standard(self) -> bool:
        """Whether this is N(0, I), which formulas know."""
        own = type(self)
        return not self.is_given and own.sample is Normal.sample and own.log_prob is Normal.log_prob

    @property
    def needs_fit(self) -> bool:
        return self.fits

    def sample(self, shape: int | Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        """Draw points of shape (*shape, *event); with a generator on its device, then moved."""
        self._require_fit("Normal(fit=True)", "mean and covariance")
        noise = self.standard_normal(shape, generator)
        if not self.is_given:
            return noise
        flat = noise.flatten(noise.ndim - len(self.event_shape))
        return (self.mean + self._apply_factor(flat)).view_as(noise)

    def log_prob(
        self,
        z: Tensor,  # (*batch, *event)
    ) -> Tensor:  # (*batch)
        """log N(z; μ, Σ) in nats."""
        self._require_fit("Normal(fit=True)", "mean and covariance")
        check_points("z", z, self.event_shape, batched=False)
        noise, log_det = (z, None) if not self.is_given else (self.whitened(z - self._centre(z)), self.log_scale.sum())
        squares = noise.square().flatten(z.ndim - len(self.event_shape)).sum(-1)
        log_prob = -0.5 * (squares + math.prod(self.event_shape) * LOG_TWO_PI)
        return log_prob if log_det is None else log_prob - log_det

    def companions(self, points: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw independent points; their middle is μ."""
        drawn = self.sample((len(points),), generator)
        return drawn, torch.zeros_like(drawn) if not self.is_given else self._centre(points).expand_as(drawn)

    def whitened(
        self,
        differences: Tensor,  # (*batch, *event)
    ) -> Tensor:  # (*batch, *event)
        """L⁻¹ times differences of points, for Σ = L Lᵀ."""
        if not self.is_given:
            return differences
        flat = differences.flatten(differences.ndim - len(self.event_shape))
        if not self.full:
            return (flat * torch.exp(-self.log_scale)).view_as(differences)
        rows = flat.reshape(-1, flat.shape[-1]).T
        return torch.linalg.solve_triangular(self.factor, rows, upper=False).T.reshape(differences.shape)

    def coloured(
        self,
        noise: Tensor,  # (*batch, *event)
    ) -> Tensor:  # (*batch, *event)
        """L times noise, for Σ = L Lᵀ."""
        flat = noise.flatten(noise.ndim - len(self.event_shape))
        return noise if not self.is_given else self._apply_factor(flat).view_as(noise)

    @property
    def factor(self) -> Tensor:  # (d, d)
        """L, the Cholesky factor of the covariance."""
        scale = self.log_scale.exp()
        if not self.full:
            return scale.diag()
        return (self.lower.tril(-1) + torch.eye(len(scale), dtype=scale.dtype, device=scale.device)) * scale

    def fit(self, points: Tensor, to_flow_space: Callable[[Tensor], Tensor] | None = None) -> Normal:
        """Take mean and covariance of points (n, *event), if the base was built with `fit=True`.

        Raises:
            InvalidValueError: they have no covariance.
        """
        if self.fits:
            check_points("points", points, self.event_shape, at_least=2, finite=True)
            rows = points.flatten(1).double()
            covariance = rows.T.cov().reshape(rows.shape[1], -1)
            factor = _cholesky(covariance if self.full else covariance.diagonal().diag(), "the covariance of the data")
            with torch.no_grad():
                self.mean.copy_(rows.mean(0))
                self.log_scale.copy_(factor.diagonal().log())
                if self.full:
                    self.lower.copy_(factor / factor.diagonal())
            self._ready = True
        return self

    def _centre(self, z: Tensor) -> Tensor:
        return self.mean.view(self.event_shape)

    def _apply_factor(self, flat: Tensor) -> Tensor:  # (*batch, d)
        return flat @ self.factor.T if self.full else flat * self.log_scale.exp()


def entries(name: str, value: Any, event_shape: Sequence[int]) -> Tensor:  # (*event)
    """Return numbers of an event shape, from one number for all or from nested lists or a tensor.

    Raises:
        InvalidValueError: they have another shape, or are not finite.
    """
    try:
        given = value.detach() if isinstance(value, Tensor) else torch.tensor(_plain(value))
        numbers = given.to(torch.get_default_dtype())
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidValueError(f"{name} must be a number or numbers of shape {tuple(event_shape)}: {error}") from error
    if tuple(numbers.shape) not in ((), tuple(event_shape)):
        raise InvalidValueError(
            f"{name} must be one number or numbers of shape {tuple(event_shape)}, got shape {tuple(numbers.shape)}"
        )
    if not numbers.is_meta and not bool(numbers.isfinite().all()):
        raise InvalidValueError(f"{name} must be finite, got {value}")
    return numbers.expand(tuple(event_shape)).clone()


def _plain(value: Any) -> Any:
    """Nested lists of floats, for those of a config are not Python lists."""
    if isinstance(value, str | bytes):
        raise TypeError(f"got the text {value!r}")
    return [_plain(part) for part in value] if isinstance(value, Sequence) else float(value)


def _factor(covariance: Any, event_shape: tuple[int, ...]) -> tuple[Tensor, bool]:
    """Return a Cholesky factor (d, d), and whether it is more than a diagonal."""
    d = as_shape("d", math.prod(event_shape))[0]
    matrix = isinstance(covariance, Tensor) and tuple(covariance.shape) == (d, d)
    matrix |= isinstance(covariance, Sequence) and len(covariance) == d and isinstance(covariance[0], Sequence)
    if matrix and event_shape == (d,):
        full = entries("covariance", covariance, (d, d))
        if not full.is_meta and not torch.allclose(full, full.T, rtol=1e-5, atol=1e-12):
            raise InvalidValueError(f"covariance must be symmetric, got {covariance}")
        return _cholesky(full, "covariance"), True
    variances = entries("covariance", covariance, event_shape).reshape(d)
    if not variances.is_meta and not bool((variances > 0).all()):
        raise InvalidValueError(f"covariance must have variances above 0, got {covariance}")
    return variances.sqrt().diag(), False


def _cholesky(covariance: Tensor, name: str) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if not covariance.is_meta and (bool(failed) or not bool((factor.diagonal() > 0).all())):
        raise InvalidValueError(
            f"{name} must be positive definite; of data, drop entries that are constant or follow from others, or set "
            "covariance_type='diagonal'"
        )
    return factor
