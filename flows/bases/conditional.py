"""A normal distribution whose mean and covariance depend on the context."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor, nn

from flows.arguments import checked
from flows.bases.normal import Normal
from flows.checks import check_points, check_seed, whole_number
from flows.conditions import Conditions
from flows.encoders import Standardised
from flows.errors import InvalidValueError

LEARNING_RATE, WEIGHT_DECAY, BATCH = 5e-3, 0.01, 128
AVERAGE = 0.99  # decay of the average of the weights, which is judged
HELD_OUT, EVERY = 0.1, 25  # share of the points that judge the fit, and how often
SMALLEST_LOG_SCALE = -12.0
MOST_NARROWED = 6.0  # in logarithms, by the network
MOST_WIDENED = 3.0  # after the fit, by the points that were held out
RIDGE = 1e-6  # of least squares, in units of the variance of the features


@dataclass(frozen=True)
class Frame:
    """Coordinates u = W (y − μ) of points, one frame for each: N(0, I) there is N(μ, (WᵀW)⁻¹) here.

    Args:
        mean: μ, (B, d).
        log_scale: (B, d), −log of the diagonal of W.
        lower: below the diagonal, W has `lower` · exp(−log_scale) of its column, (B, d, d); None: nothing.

    Example:
        ```python
        import torch

        from flows.bases import Frame

        frame = Frame(mean=torch.ones(5, 2), log_scale=torch.zeros(5, 2), lower=None)
        u, log_det = frame.relative(torch.ones(5, 2))  # 0 for all
        ```
    """

    mean: Tensor
    log_scale: Tensor
    lower: Tensor | None

    def relative(self, y: Tensor) -> tuple[Tensor, Tensor]:  # (B, *event) and (B)
        """Return u, and log|det ∂u/∂y|."""
        u = (y.flatten(1) - self.mean) * torch.exp(-self.log_scale)
        if self.lower is not None:
            u = u + torch.einsum("bij,bj->bi", self.lower, u)
        return u.view_as(y), -self.log_scale.sum(1)

    def absolute(self, u: Tensor) -> tuple[Tensor, Tensor]:  # (B, *event) and (B)
        """Return y, and log|det ∂y/∂u|."""
        flat = u.flatten(1)
        if self.lower is not None:
            flat = torch.linalg.solve_triangular(self.lower, flat.unsqueeze(2), upper=False, unitriangular=True)[..., 0]
        return (self.mean + flat * torch.exp(self.log_scale)).view_as(u), self.log_scale.sum(1)

    def part(self, rows: slice) -> Frame:
        """The frames of some of the points."""
        return self._each(lambda values: values[rows])

    def expand(self, leading: Sequence[int], batch_shape: Sequence[int]) -> Frame:
        """Repeat the frames of contexts (*leading) for points of a batch shape."""

        def repeated(values: Tensor) -> Tensor:
            own = values.shape[1:]
            return values.reshape(*leading, *own).expand(*batch_shape, *own).reshape(-1, *own)

        return self._each(repeated)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Frame:
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: change(values) for name, values in held.items() if values is not None})


@checked
class ConditionalNormal(Normal):
    r"""A normal distribution N(μ(c), Σ(c)) that a small network predicts from the context c.

    It is fitted to the training data: least squares first, then a network for what these miss, by maximum likelihood
    (heteroscedastic regression). The flow then has to learn only the shape that a normal distribution misses, and it
    resolves densities that are narrow beside the range of the data.

    The flow works in units of this base: it sees u = W(c) (y − μ(c)) with WᵀW = Σ(c)⁻¹, and starts from u ~ N(0, I).
    So `sample` and `log_prob` are those of N(0, I), and `frame` converts. [Nix & Weigend 1994; as a base of flows:
    Winkler et al. 2019, arXiv:1912.00042]

    The fit looks at a tenth of the points to stop early, and widens the scale until it suits them. It needs some
    thousand points: with some hundred, N(0, I) is the better start. In Python, call
    `flow.fit_ends(data.reference(), data.reference_contexts())`; a run does so at its start.

    Args:
        event_shape: shape of a point.
        context_shape: shape of a context in data units.
        hidden: widths of the network's hidden layers.
        covariance_type: `"full"` or `"diagonal"`.
        scale: of the contexts, see `flows.encoders.Standardised`.
        conditions: of contexts from columns of a table, likewise. Default: contexts are numbers.
        steps: of the fit.
        trainable: whether the likelihood goes on to train the network. Default: `False`.
        seed: of the fit.

    Raises:
        InvalidTypeError, InvalidValueError: a setting is out of range.

    Example:
        ```python
        import torch

        import flows

        context = torch.rand(500, 1)
        points = context + 0.1 * context * torch.randn(500, 1)
        base = flows.bases.ConditionalNormal(1, context_shape=1, steps=50)
        field = flows.fields.MLP(1, context_shape=1, at_rest=True)
        flow = flows.CNF(field, base=base).fit_ends(points, context)
        log_p = flow.log_prob(points, context)
        ```
    """

    slopes: Tensor  # (d, features), of least squares
    centre: Tensor  # (d)
    spread: Tensor  # (d), of what they leave; the unit of the network

    def __init__(
        self,
        event_shape: int | Sequence[int],
        context_shape: int | Sequence[int],
        hidden: Sequence[int] = (64, 64),
        covariance_type: Literal["full", "diagonal"] = "full",
        scale: Literal["linear", "log", "sqrt"] = "linear",
        conditions: Conditions | None = None,
        steps: int = 4_000,
        trainable: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(event_shape)
        check_seed(seed)
        self.steps, self.seed, self.trainable = whole_number("steps", steps), seed, trainable
        self.standardise = Standardised(context_shape, scale, conditions)
        self.context_shape = self.standardise.context_shape
        d, features = math.prod(self.event_shape), math.prod(self.standardise.features_shape)
        below = [(i, j) for i in range(d) for j in range(i)] if covariance_type == "full" else []
        self._below = [i for i, _ in below], [j for _, j in below]
        widths = [features, *(whole_number("hidden", width) for width in hidden)]
        layers = [[nn.Linear(a, b), nn.SiLU()] for a, b in itertools.pairwise(widths)]
        last = nn.Linear(widths[-1], sum(self._sizes))
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.network = nn.Sequential(*itertools.chain(*layers), last)
        self.requires_grad_(trainable)
        self.hold(False, slopes=torch.zeros(d, features), centre=torch.zeros(d), spread=torch.ones(d))
        self._ready = False

    @property
    def is_standard(self) -> bool:
        """Whether this is N(0, I), which it is in its own units."""
        return True

    @property
    def needs_fit(self) -> bool:
        return True

    def _require_fit(self, name: str = "ConditionalNormal", instead: str = "") -> None:
        if not self._ready:
            raise InvalidValueError(
                "ConditionalNormal has not been fitted to data; call "
                "flow.fit_ends(data.reference(), data.reference_contexts())"
            )

    def frame(
        self,
        context: Tensor,  # (B, *context), in data units
    ) -> Frame:
        """Return the coordinates given each context."""
        self._require_fit()
        return self._frame(self._features(context))

    def _features(self, context: Tensor) -> Tensor:
        return self.standardise(context).flatten(1)

    def _frame(self, features: Tensor) -> Frame:
        kind = features.device.type
        with torch.autocast(kind, enabled=False):  # which would round the density
            mean, log_scale, below = self.network(features).split(self._sizes, 1)
            mean = nn.functional.linear(features, self.slopes, self.centre) + self.spread * mean
            log_scale = log_scale.clamp_min(-MOST_NARROWED) + self.spread.log()
            return Frame(mean, log_scale, self._lower(below))

    def _lower(self, below: Tensor) -> Tensor | None:  # (B, d, d)
        if not self._below[0]:
            return None
        lower = below.new_zeros(len(below), self._dimension, self._dimension)
        lower[:, self._below[0], self._below[1]] = below
        return lower

    @property
    def _dimension(self) -> int:
        return math.prod(self.event_shape)

    @property
    def _sizes(self) -> list[int]:
        """How many outputs of the network are what; the second are logarithms of scales."""
        return [self._dimension, self._dimension, len(self._below[0])]

    def fit(
        self,
        points: Tensor,
        to_flow_space: Callable[[Tensor], Tensor] | None = None,
        contexts: Tensor | None = None,  # (n, *context), of the points
    ) -> ConditionalNormal:
        """Fit the network to points (n, *event) given contexts, by maximum likelihood with early stopping.

        Raises:
            InvalidValueError: there are no contexts, not one for each point, or fewer than four points.
        """
        if contexts is None or len(contexts) != len(points):
            got = "none" if contexts is None else f"{len(contexts)} for {len(points)} points"
            raise InvalidValueError(
                f"ConditionalNormal is fitted to points and the context of each, got {got}; call "
                "flow.fit_ends(data.reference(), data.reference_contexts())"
            )
        check_points("points", points, self.event_shape, at_least=4, finite=True)
        self.standardise.fit(contexts.to(self.device))
        with torch.no_grad():
            features, rows = self._features(contexts.to(self.device)), points.to(self.device, self.dtype)
            self._least_squares(rows, features)
        with torch.enable_grad():
            self._fit(rows, features)
        self._ready = True
        return self

    def _least_squares(self, points: Tensor, features: Tensor) -> None:
        y, x = points.flatten(1).cpu().double(), features.cpu().double()
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        gram = x.T @ x + RIDGE * len(x) * torch.eye(x.shape[1], dtype=x.dtype)  # columns may depend on each other
        found = torch.linalg.solve(gram, x.T @ y)  # (features + 1, d)
        self.slopes.copy_(found[:-1].T)
        self.centre.copy_(found[-1])
        self.spread.copy_((y - x @ found).std(0).clamp_min(math.exp(SMALLEST_LOG_SCALE)))

    def _fit(self, points: Tensor, features: Tensor) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(points), generator=generator).to(points.device)
        count = max(1, round(HELD_OUT * len(order)))
        held_out, rows = order[:count], order[count:]

        def judged() -> float:
            with torch.no_grad():
                return -float(self._log_density(points[held_out], features[held_out]).mean())

        trained = self.network.requires_grad_()
        average, best, score = copy.deepcopy(trained), copy.deepcopy(trained.state_dict()), judged()
        optimizer = torch.optim.AdamW(trained.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        for step in range(self.steps):
            chosen = rows[torch.randint(len(rows), (min(BATCH, len(rows)),), generator=generator).to(points.device)]
            loss = -self._log_density(points[chosen], features[chosen]).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(trained.parameters(), 10.0)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                for mean, now in zip(average.parameters(), trained.parameters(), strict=True):
                    mean.lerp_(now, max(1 - AVERAGE, 1 / (step + 1)))
            if (step + 1) % EVERY == 0 or step + 1 == self.steps:
                self.network = average
                found = judged()
                self.network = trained
                if found < score:
                    best, score = copy.deepcopy(average.state_dict()), found
        optimizer.zero_grad(set_to_none=True)
        trained.load_state_dict(best)
        with torch.no_grad():
            self._widen(points[held_out], features[held_out])
        trained.requires_grad_(self.trainable)

    def _widen(self, points: Tensor, features: Tensor) -> None:
        """Widen the scales until they suit new points, which lie farther from their mean than those of the training."""
        u, _ = self._frame(features).relative(points)
        self._biases[1].add_(u.square().mean().sqrt().clamp(1.0, MOST_WIDENED).log())

    @property
    def _biases(self) -> tuple[Tensor, ...]:
        """The biases of the network's outputs, by `_sizes`."""
        last = self.network[-1]
        assert isinstance(last, nn.Linear)
        return last.bias.split(self._sizes)

    def _log_density(self, y: Tensor, features: Tensor) -> Tensor:  # (B)
        u, log_det = self._frame(features).relative(y)
        return log_det - 0.5 * u.flatten(1).square().sum(1)
