"""Noisy series of a system with known equations, and the truth to compare with."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from flows.arguments import checked
from flows.checks import check_number, check_seed, fits_in_memory, whole_number
from flows.datasets.series.pieces import Piece
from flows.datasets.series.series import Series
from flows.errors import ComputationError, InvalidValueError

CHUNK = 100  # series in one solve
TOLERANCE = 1e-10  # of the solves that generate the data, relative and absolute
EVEN = 1e-3  # share of an even spacing in random times, so that two never coincide


@checked
class DynamicalSystem(Series):
    """Series generated from dx/dt = v(t, x), with noise.

    Each series starts at time 0, at an initial state of its own. The solver is scipy's DOP853 at tolerances of 1e-10.
    Noise is N(0, noise² s²) on each value, with the standard deviation s of that entry over all series; the initial
    states, where models start, have none. Times are equal steps from 0 to `span`, or random with `irregular`. Test
    series go on to `span + beyond`, so that predictions beyond the training span can be judged.

    To add one: subclass it with `name`, `columns`, `velocity` and `initial_states`, and add a yaml to `conf/data`.

    Example:
        ```python
        import torch

        import flows

        class Decay(flows.datasets.DynamicalSystem):
            name = "decay"
            columns = ("x",)

            def velocity(self, t, x):
                return -x

            def initial_states(self, n, generator):
                return torch.rand(n, 1, generator=generator)

        data = Decay(num_series=20, noise=0.05)
        data.true_states("test").shape  # (4, 74, 1)
        ```

    Args:
        num_series: number N of series, of all splits together.
        num_times: observations of a training series, the initial state included. Test series have as many more in
            proportion to `beyond`.
        span: the time that training and validation series take.
        beyond: how much longer test series go on.
        noise: standard deviation of the noise, relative to that of the values.
        irregular: draw the times of each series uniformly at random, the initial one excepted.
        seed: of initial states, times and noise.
        validation_fraction, test_fraction, split_seed: see `Series`.

    Attributes:
        truth: the states without noise, (N, T, *event), at the times of test series.
        noise_scale: the standard deviation of the noise on each entry, (*event).

    Raises:
        InvalidTypeError, InvalidValueError: a setting is no number or out of range.
    """

    columns: Sequence[str] | None = None

    def __init__(
        self,
        num_series: int = 100,
        num_times: int = 50,
        span: float = 10.0,
        beyond: float = 5.0,
        noise: float = 0.0,
        irregular: bool = False,
        seed: int = 0,
        validation_fraction: float = 0.1,
        test_fraction: float = 0.2,
        split_seed: int = 0,
    ):
        whole_number("num_series", num_series, 4)
        whole_number("num_times", num_times, 2)
        check_number("span", span, above=0)
        check_number("beyond", beyond, at_least=0)
        check_number("noise", noise, at_least=0)
        check_seed(seed)
        self.span, self.beyond, self.noise = float(span), float(beyond), float(noise)
        self.irregular, self.seed = irregular, seed
        total = num_times + math.floor((num_times - 1) * beyond / span * (1 + 1e-12))
        generator = torch.Generator().manual_seed(seed)
        starts = self._starts(num_series, generator)
        one = starts[0].numel() * total * 8
        # One solve is read off at the times of each of its series.
        fits_in_memory(f"num_times: {total:,} times", one * max(num_series, CHUNK))
        times = self._times(num_series, num_times, total, generator)
        chunks = zip(starts.split(CHUNK), times.split(CHUNK), strict=True)
        self.truth = torch.cat([self.solve(*chunk) for chunk in chunks])
        self.noise_scale = noise * self.truth.flatten(0, 1).std(0)
        values = self.truth + self.noise_scale * torch.randn(self.truth.shape, generator=generator, dtype=torch.float64)
        values[:, 0] = self.truth[:, 0]
        super().__init__(
            times,
            values,
            columns=self.columns,
            name=self.name,
            validation_fraction=validation_fraction,
            test_fraction=test_fraction,
            split_seed=split_seed,
            source=self.name,
        )
        inside = torch.cat([self.split["train"], self.split["validation"]])
        self._all.points.counts[inside] = num_times  # the other times lie beyond the span
        self.examples = [Piece(i, 0, count) for i, count in enumerate(self._all.points.counts.tolist())]

    @abstractmethod
    def velocity(
        self,
        t: Tensor,  # 0-d, or (*batch)
        x: Tensor,  # (*batch, *event)
    ) -> Tensor:  # (*batch, *event)
        """v(t, x)."""

    @abstractmethod
    def initial_states(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw initial states, (n, *event)."""

    def conserved(
        self,
        x: Tensor,  # (*batch, *event)
    ) -> Mapping[str, Tensor]:  # (*batch) each
        """Quantities that stay constant along a solution, by name. By default none is known."""
        del x
        return {}

    @property
    def training_span(self) -> float:
        return self.span

    def true_states(self, split: str) -> Tensor:
        """The states of a split without noise, (N, T, *event)."""
        chosen = self.split[split]
        return self.truth[chosen, : int(self._all.points.counts[chosen].max())]

    def _starts(self, n: int, generator: torch.Generator) -> Tensor:  # (n, *event)
        starts = self.initial_states(n, generator).to(torch.float64)
        entries = "*event" if self.columns is None else str(len(self.columns))
        if (
            starts.ndim < 2
            or len(starts) != n
            or (self.columns is not None and starts.shape[1:] != (len(self.columns),))
        ):
            raise InvalidValueError(
                f"{type(self).__name__}.initial_states({n}, generator) must return a tensor of shape ({n}, {entries}), "
                f"got {tuple(starts.shape)}"
            )
        slope = self.velocity(torch.tensor(0.0, dtype=torch.float64), starts)
        if slope.shape != starts.shape:
            raise InvalidValueError(
                f"{type(self).__name__}.velocity(t, x) must return the shape of x, {tuple(starts.shape)}, got "
                f"{tuple(slope.shape)}"
            )
        return starts

    def _times(self, n: int, inside: int, total: int, generator: torch.Generator) -> Tensor:  # (n, total)
        if not self.irregular:
            return (self.span * torch.arange(total, dtype=torch.float64) / (inside - 1)).expand(n, -1)
        inner, later = (
            torch.rand(n, count, generator=generator, dtype=torch.float64).sort(1).values
            for count in (inside - 1, total - inside)
        )
        start = torch.zeros(n, 1, dtype=torch.float64)
        return torch.cat([start, self.span * _apart(inner), self.span + self.beyond * _apart(later)], 1)

    def solve(
        self,
        starts: Tensor,  # (n, *event)
        times: Tensor,  # (n, T)
    ) -> Tensor:  # (n, T, *event)
        """All series in one solve, each read off at its own times."""
        from scipy.integrate import solve_ivp

        def velocity(t: float, y: np.ndarray) -> np.ndarray:
            x = torch.from_numpy(y).view_as(starts)
            return self.velocity(torch.tensor(t, dtype=torch.float64), x).numpy().ravel()

        span = (0.0, float(times.max()))
        found = solve_ivp(
            velocity, span, starts.numpy().ravel(), "DOP853", rtol=TOLERANCE, atol=TOLERANCE, dense_output=True
        )
        if not found.success:
            raise ComputationError(f"the system {self.name} cannot be solved: {found.message}")
        states = [found.sol(t.numpy()).reshape(*starts.shape, -1)[i] for i, t in enumerate(times)]
        return torch.from_numpy(np.stack(states)).movedim(-1, 1).contiguous()


def _apart(draws: Tensor) -> Tensor:
    """Rising draws (n, k) from [0, 1], moved apart so that none coincide; the last is <= 1 and the first > 0."""
    count = draws.shape[1]
    return (1 - EVEN) * draws + EVEN * torch.arange(1, count + 1) / max(count, 1)
