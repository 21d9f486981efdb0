"""The contract of a transform, and how transforms are chained."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from flows.errors import InvalidValueError


class Transform(nn.Module, ABC):
    """A map y = T(x) from data space to flow space, with what it adds to the log-density.

    log p(x) = log p_flow(y) + log_det. Most transforms are bijections, and log_det is log|det ∂y/∂x|. One for
    discrete data draws noise (:class:`Dequantise`): then y is random, ``log_det`` has −log of the density of that
    noise in it, and the sum bounds log P(x) from below in expectation.

    Attributes:
        term: under which name log_det appears in an account of the log-density.
        num_levels: L, if data are whole numbers 0, ..., L − 1 and the transform makes them continuous.
    """

    term: str = "scaling"
    num_levels: int | None = None

    @abstractmethod
    def forward(
        self,
        x: Tensor,  # (B, *event), data space
        generator: torch.Generator | None = None,  # of the noise, where there is any
    ) -> tuple[Tensor, Tensor]:  # (B, *event) and (B,)
        """y and log_det in nats."""

    @abstractmethod
    def inverse(
        self,
        y: Tensor,  # (B, *event), flow space
    ) -> tuple[Tensor, Tensor]:  # (B, *event) and (B,)
        """x and −log_det in nats."""

    def account(
        self, x: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:  # (B, *event), and (B,) for each term
        """Like calling the transform, with log_det as the terms that it is the sum of."""
        y, log_det = self(x, generator)
        return y, {self.term: log_det}

    def check(
        self,
        x: Tensor,  # (B, *event)
    ) -> None:
        """Raise ``ValueError`` if ``x`` holds values on which the transform is not defined."""

    def fit(
        self,
        points: Tensor,  # (n, *event), data space
    ) -> Transform:
        """Set what the transform takes from the training data, if anything; returns itself."""
        return self


class Identity(Transform):
    """Data space is flow space."""

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        return x, x.new_zeros(len(x))

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return y, y.new_zeros(len(y))


class Compose(Transform):
    """One transform after the other, in the order given.

    ::

        Compose(dequantise=Dequantise(256), unit=UnitInterval(256), logit=Logit(0.05))

    Args:
        transforms: by names of your own; ``None`` is left out.
    """

    def __init__(self, **transforms: Transform | None) -> None:
        super().__init__()
        self.transforms = nn.ModuleDict({name: part for name, part in transforms.items() if part is not None})
        if not self.transforms:
            raise InvalidValueError("Compose needs at least one transform; to change nothing, use Identity()")
        _, *later = self.transforms.items()
        late = next((name for name, part in later if part.num_levels is not None), None)
        if late is not None:
            raise InvalidValueError(
                f"the transform {late!r} dequantises and must come first, got {list(self.transforms)}"
            )

    @property
    def num_levels(self) -> int | None:
        return next(iter(self.transforms.values())).num_levels

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        y, terms = self.account(x, generator)
        return y, sum(terms.values())

    def account(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        total: dict[str, Tensor] = {}
        for transform in self.transforms.values():
            x, terms = transform.account(x, generator)
            for name, value in terms.items():
                total[name] = total[name] + value if name in total else value
        return x, total

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        total = y.new_zeros(len(y))
        for transform in reversed(self.transforms.values()):
            y, log_det = transform.inverse(y)
            total = total + log_det
        return y, total

    def check(self, x: Tensor) -> None:
        next(iter(self.transforms.values())).check(x)

    def fit(self, points: Tensor) -> Compose:
        """Fit each part to what the parts before it make of ``points``; noise is drawn from a fixed seed."""
        generator = torch.Generator(points.device).manual_seed(0)
        with torch.no_grad():
            for transform in self.transforms.values():
                transform.fit(points)
                points, _ = transform(points, generator)
        return self
