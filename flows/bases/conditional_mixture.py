"""A mixture of normal distributions whose parameters depend on the context."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from flows.arguments import checked
from flows.bases.conditional import MOST_NARROWED, MOST_WIDENED, ConditionalNormal, Frame
from flows.bases.normal import LOG_TWO_PI
from flows.bases.quantiles import LogNormalQuantile
from flows.checks import whole_number
from flows.conditions import Conditions

MOST_ROUNDS, CLOSE = 60, 1e-10  # of the search for a quantile
WIDENINGS = 24  # that are tried after the fit, from 1 to MOST_WIDENED


@dataclass(frozen=True)
class MixtureFrame(Frame):
    """Coordinates u in which a mixture of normal distributions is N(0, I).

    First v = W (y − μ). Then entry by entry u_i = Φ⁻¹(F_i(v_i | v_1, ..., v_{i−1})), with the distribution function F_i
    of the mixture, whose weights are those that the entries before leave (the Knothe-Rosenblatt map).

    Args:
        mean, log_scale, lower: of v, see `Frame`.
        log_weight: (B, K), of the components.
        centre: (B, K, d), their means.
        log_width: (B, K, d), logarithms of their standard deviations.

    Example:
        ```python
        import torch

        from flows.bases import MixtureFrame

        two = torch.tensor([[[-3.0], [3.0]]])
        frame = MixtureFrame(torch.zeros(1, 1), torch.zeros(1, 1), None, torch.zeros(1, 2), two, torch.zeros(1, 2, 1))
        u, log_det = frame.relative(torch.zeros(1, 1))  # 0, half of the mass lies below
        ```
    """

    log_weight: Tensor
    centre: Tensor
    log_width: Tensor

    def relative(self, y: Tensor) -> tuple[Tensor, Tensor]:
        v, log_det = super().relative(y)
        parts = [_Entry.of(self, i) for i in range(self.centre.shape[2])]
        log_weight, found = parts[0].exact(self.log_weight).log_softmax(1), []
        volume = log_weight.new_zeros(len(y))
        for part, value in zip(parts, v.flatten(1).unbind(1), strict=True):
            value = value.to(log_weight)
            log_joint = part.log_joint(log_weight, value)
            log_density = log_joint.logsumexp(1)
            u = part.score(log_weight, value)
            volume = volume + log_density + 0.5 * (u.square() + LOG_TWO_PI)
            log_weight = log_joint - log_density.unsqueeze(1)
            found.append(u)
        return torch.stack(found, 1).to(y).view_as(y), log_det + volume.to(y)

    def absolute(self, u: Tensor) -> tuple[Tensor, Tensor]:
        parts = [_Entry.of(self, i) for i in range(self.centre.shape[2])]
        log_weight, found = parts[0].exact(self.log_weight).log_softmax(1), []
        volume = log_weight.new_zeros(len(u))
        for part, score in zip(parts, u.flatten(1).unbind(1), strict=True):
            score = score.to(log_weight)
            value = part.value(log_weight, score)
            log_joint = part.log_joint(log_weight, value)
            log_density = log_joint.logsumexp(1)
            volume = volume - log_density - 0.5 * (score.square() + LOG_TWO_PI)
            log_weight = log_joint - log_density.unsqueeze(1)
            found.append(value)
        y, log_det = super().absolute(torch.stack(found, 1).to(u).view_as(u))
        return y, log_det + volume.to(u)

    def log_density(self, y: Tensor) -> Tensor:  # (B)
        """Return that of the mixture, without the way to u."""
        v, log_det = super().relative(y)
        white = (v.flatten(1).unsqueeze(1) - self.centre) * torch.exp(-self.log_width)
        log_joint = self.log_weight.log_softmax(1) - (0.5 * (white.square() + LOG_TWO_PI) + self.log_width).sum(2)
        return log_det + log_joint.logsumexp(1)


@dataclass(frozen=True)
class _Entry:
    """The components' means and widths of one entry, (B, K), in float64 where there is one."""

    centre: Tensor
    log_width: Tensor

    @classmethod
    def of(cls, frame: MixtureFrame, i: int) -> _Entry:
        return cls(cls.exact(frame.centre[:, :, i]), cls.exact(frame.log_width[:, :, i]))

    @staticmethod
    def exact(values: Tensor) -> Tensor:
        return values if values.device.type == "mps" else values.double()

    def white(self, value: Tensor) -> Tensor:  # (B) to (B, K)
        return (value.unsqueeze(1) - self.centre) * torch.exp(-self.log_width)

    def log_joint(self, log_weight: Tensor, value: Tensor) -> Tensor:  # (B, K)
        return log_weight - 0.5 * (self.white(value).square() + LOG_TWO_PI) - self.log_width

    def score(self, log_weight: Tensor, value: Tensor) -> Tensor:  # (B)
        """Φ⁻¹(F(v)), from the tail that is the smaller one."""
        white = self.white(value)
        below, above = ((log_weight + torch.special.log_ndtr(side)).logsumexp(1) for side in (white, -white))
        u: Tensor = LogNormalQuantile.apply(torch.minimum(below, above))  # type: ignore[assignment]
        return torch.where(below < above, u, -u)

    def value(self, log_weight: Tensor, score: Tensor) -> Tensor:  # (B)
        """F⁻¹(Φ(u)), by Newton's method within a bracket; gradients are those of the last step."""
        with torch.no_grad():  # a quantile of a mixture lies between those of its components
            quantiles = self.centre + self.log_width.exp() * score.unsqueeze(1)
            low, high = quantiles.amin(1), quantiles.amax(1)
            value = (log_weight.exp() * quantiles).sum(1).clamp(low, high)
            for _ in range(MOST_ROUNDS):
                error = self.score(log_weight, value) - score
                if bool((error.abs() <= CLOSE * (1 + score.abs())).all()):
                    break
                low, high = torch.where(error < 0, value, low), torch.where(error > 0, value, high)
                step = value - error * self._rate(log_weight, value, error + score)
                value = torch.where((step > low) & (step < high), step, (low + high) / 2)
            rate = self._rate(log_weight, value, score)
        if not torch.is_grad_enabled():
            return value
        return value - (self.score(log_weight, value) - score) * rate

    def _rate(self, log_weight: Tensor, value: Tensor, score: Tensor) -> Tensor:  # (B), dv/du
        log_density = self.log_joint(log_weight, value).logsumexp(1)
        return torch.exp(-0.5 * (score.square() + LOG_TWO_PI) - log_density)


@checked
class ConditionalMixture(ConditionalNormal):
    r"""A mixture of K normal distributions that a small network predicts from the context: a mixture density network.

    It is fitted to the training data like `ConditionalNormal`. The flow works in units of it: the map u of
    `MixtureFrame` takes the mixture to N(0, I), from which the flow starts. So a flow at rest has the density of the
    mixture, and training begins there. In several dimensions, the components share their correlations and have widths
    of their own. [Bishop 1994, Mixture density networks; Rosenblatt 1952]

    Args:
        num_components: K.
        event_shape, context_shape, hidden, covariance_type, scale, conditions, steps, trainable, seed: see
            `ConditionalNormal`.

    Raises:
        InvalidTypeError, InvalidValueError: a setting is out of range.

    Example:
        ```python
        import torch

        import flows

        context = torch.rand(500, 1)
        points = context * torch.randn(500, 1).sign() + 0.1 * torch.randn(500, 1)  # two branches
        base = flows.bases.ConditionalMixture(1, context_shape=1, num_components=2, steps=50)
        field = flows.fields.MLP(1, context_shape=1, at_rest=True)
        flow = flows.CNF(field, base=base).fit_ends(points, context)
        log_p = flow.log_prob(points, context)
        ```
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        context_shape: int | Sequence[int],
        num_components: int = 5,
        hidden: Sequence[int] = (64, 64),
        covariance_type: Literal["full", "diagonal"] = "full",
        scale: Literal["linear", "log", "sqrt"] = "linear",
        conditions: Conditions | None = None,
        steps: int = 4_000,
        trainable: bool = False,
        seed: int = 0,
    ) -> None:
        self.num_components = whole_number("num_components", num_components)  # which the network asks for
        super().__init__(event_shape, context_shape, hidden, covariance_type, scale, conditions, steps, trainable, seed)
        generator = torch.Generator().manual_seed(seed)
        quantiles = torch.special.ndtri((torch.arange(self.num_components) + 0.5) / self.num_components)
        with torch.no_grad():  # means that begin apart, in an order of their own for each entry
            orders = [torch.randperm(self.num_components, generator=generator) for _ in range(self._dimension)]
            self._biases[0].copy_(torch.stack([quantiles[order] for order in orders], 1).flatten())

    @property
    def _sizes(self) -> list[int]:
        each = self.num_components * self._dimension
        return [each, each, len(self._below[0]), self.num_components]

    def _frame(self, features: Tensor) -> MixtureFrame:
        with torch.autocast(features.device.type, enabled=False):  # which would round the density
            centre, log_width, below, log_weight = self.network(features).split(self._sizes, 1)
            mean = nn.functional.linear(features, self.slopes, self.centre)
            each = (len(features), self.num_components, self._dimension)
            return MixtureFrame(
                mean,
                self.spread.log().expand_as(mean),
                self._lower(below),
                log_weight,
                centre.reshape(each),
                log_width.reshape(each).clamp_min(-MOST_NARROWED),
            )

    def _log_density(self, y: Tensor, features: Tensor) -> Tensor:
        return self._frame(features).log_density(y)

    def _widen(self, points: Tensor, features: Tensor) -> None:
        log_widths = self._biases[1]
        fitted = log_widths.clone()
        tried = torch.linspace(0.0, math.log(MOST_WIDENED), WIDENINGS)
        scores = []
        for more in tried.tolist():
            log_widths.copy_(fitted + more)
            scores.append(float(self._log_density(points, features).mean()))
        log_widths.copy_(fitted + float(tried[int(torch.tensor(scores).argmax())]))
