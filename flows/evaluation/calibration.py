"""Is a posterior calibrated? Ranks of true parameters (SBC), and expected coverage (TARP)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flows.arguments import checked
from flows.errors import InvalidValueError


@dataclass(frozen=True)
class Calibration:
    """What draws from posteriors say about the parameters that made their observations.

    If θ and its L draws come from one distribution, the rank of θ among them is uniform on 0, ..., L, for each
    parameter [Talts et al. 2018, arXiv:1804.06788]. So is the share of draws that lie closer to a random
    reference point than θ does, and only for the true posterior under every choice of such points [Lemos et al. 2023,
    arXiv:2302.03026].
    """

    ranks: Tensor  # (n, d), whole numbers from 0 to L
    closer: Tensor  # (n,), shares of draws
    num_draws: int  # L

    @classmethod
    def of(
        cls,
        draws: Tensor,  # (L, n, d)
        theta: Tensor,  # (n, d)
        generator: torch.Generator | None = None,
    ) -> Calibration:
        """Compare draws with the true parameters.

        The reference points are other true parameters, in random order; distances are in standard deviations of θ.

        Raises:
            InvalidValueError: the shapes do not fit, or there are fewer than two draws or points.
        """
        if draws.ndim != 3 or theta.ndim != 2 or draws.shape[1:] != theta.shape or min(len(draws), len(theta)) < 2:
            raise InvalidValueError(
                "calibration needs two or more draws (L, n, d) for each of two or more parameters (n, d), got "
                f"{tuple(draws.shape)} and {tuple(theta.shape)}"
            )
        draws, theta = draws.detach().double().cpu(), theta.detach().double().cpu()
        sd = theta.std(0).clamp(min=torch.finfo(theta.dtype).tiny)
        shift = 1 + int(torch.randint(len(theta) - 1, (), generator=generator))
        centres = theta.roll(shift, 0)  # each of another pair
        distance = ((theta - centres) / sd).norm(dim=1)
        closer = (((draws - centres) / sd).norm(dim=2) < distance).double().mean(0)
        return cls((draws < theta).sum(0), closer, len(draws))

    @property
    def p_values(self) -> list[float]:
        """Of a test that the ranks of each parameter are uniform (Pearson's χ², on at most 20 bins)."""
        from scipy.stats import chisquare

        bins = max(2, min(20, len(self.ranks) // 10, self.num_draws + 1))
        edges = torch.linspace(0, self.num_draws + 1, bins + 1, dtype=torch.float64).round()
        shares = edges.diff() / (self.num_draws + 1)
        found = []
        for rank in self.ranks.T:
            counts = torch.histogram(rank.double() + 0.5, edges).hist
            found.append(float(chisquare(counts.numpy(), (shares * len(rank)).numpy()).pvalue))
        return found

    @property
    def p_value(self) -> float:
        """The smallest of them, corrected for their number."""
        return min(1.0, min(self.p_values) * self.ranks.shape[1])

    def expected_coverage(
        self,
        levels: Tensor,  # (k,), credibilities between 0 and 1
    ) -> Tensor:  # (k,)
        """The share of true parameters inside credible regions of these levels; equal to them if calibrated.

        A rank r among L draws stands for the levels from r/(L + 1) to (r + 1)/(L + 1), so that the expectation is
        exact for any L.
        """
        return self._inside(levels).mean(0)

    def _inside(self, levels: Tensor) -> Tensor:  # (n, k)
        ranks = (self.closer * self.num_draws).round().unsqueeze(1)
        return (levels.to(self.closer) * (self.num_draws + 1) - ranks).clamp(0, 1)

    @property
    def coverage_error(self) -> float:
        """The largest distance between expected coverage and level, 1/√n by chance (Kolmogorov's statistic)."""
        levels = torch.linspace(0, 1, 101, dtype=torch.float64)[1:-1]
        return float((self.expected_coverage(levels) - levels).abs().max())

    def coverage_se(self, level: float) -> float:
        """The standard error of the expected coverage at a level, if it is right."""
        return math.sqrt(level * (1 - level) / len(self.closer))


@checked
def calibration_rows(found: Calibration) -> list[tuple[str, str]]:
    """Names and values for a reader."""
    at_90 = float(found.expected_coverage(torch.tensor([0.9]))[0])
    n = len(found.closer)
    return [
        ("ranks", f"uniform with p = {found.p_value:.2g} ({n:,} parameters, {found.num_draws} draws each)"),
        ("coverage", f"{at_90:.3f} ± {found.coverage_se(0.9):.3f} of 90 % regions"),
        ("at most off", f"{found.coverage_error:.3f} at any level (by chance about {0.87 / math.sqrt(n):.3f})"),
    ]
