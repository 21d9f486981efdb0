"""Couplings: which noise is paired with which data point in a batch of flow matching."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from flows.arguments import CheckedMethods, checked
from flows.checks import check_number
from flows.objectives.contexts import groups_of

MIN_BATCH_TO_WARN = 16  # in smaller batches, class labels may all differ by chance


class Coupling(CheckedMethods, ABC, checks=("pair", "couple")):
    """Pairs the noise of a batch with its data; both keep their own distribution.

    To add one, subclass this and implement `pair`. Settings may then name it by its lower-case name.
    """

    @property
    def is_independent(self) -> bool:
        """Whether noise and data are independent, as the marginal target assumes."""
        return False

    @abstractmethod
    def pair(
        self,
        noise: Tensor,  # (B, *event)
        data: Tensor,  # (B, *event)
        generator: torch.Generator | None = None,
    ) -> Tensor:  # (B,)
        """Return the index of the noise for each data point."""

    def couple(
        self, noise: Tensor, data: Tensor, context: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:  # (B, *event)
        """Return the noise in the order of the data.

        With contexts, noise is only exchanged between examples of equal context. Otherwise the noise of a context would
        not have the distribution of the base, from which samples start. If all contexts of a batch of 16 or more
        examples differ, there is nothing to pair, and a warning says so.
        """
        if context is None:
            return noise[self.pair(noise, data, generator)]
        coupled = noise.clone()
        groups = groups_of(context)
        shared = (groups.bincount() > 1).nonzero()
        if len(groups) >= MIN_BATCH_TO_WARN and not len(shared):
            warnings.warn(
                f"{type(self).__name__} pairs examples of equal context, but in this batch all contexts differ: noise "
                "and data stay independent; coupling=independent does the same without this warning",
                stacklevel=2,
            )
        for group in shared:
            members = (groups == group).nonzero().squeeze(1)
            coupled[members] = noise[members[self.pair(noise[members], data[members], generator)]]
        return coupled


@checked
@dataclass(frozen=True)
class Independent(Coupling):
    """No pairing: noise and data stay as they were drawn."""

    @property
    def is_independent(self) -> bool:
        return True

    def pair(self, noise: Tensor, data: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.arange(len(data), device=data.device)

    def couple(
        self, noise: Tensor, data: Tensor, context: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        return noise


@checked
@dataclass(frozen=True)
class OptimalTransport(Coupling):
    """The assignment with the least total squared distance in the batch.

    Paths then hardly cross, so velocities vary less and flows are straighter. Exact, on the CPU, in O(B³) at worst.
    [Tong et al. 2024, arXiv:2302.00482; Pooladian et al. 2023, arXiv:2304.14772]
    """

    def pair(self, noise: Tensor, data: Tensor, generator: torch.Generator | None = None) -> Tensor:
        from scipy.optimize import linear_sum_assignment

        cost = _reduced(_squared_distances(data, noise))
        _, index = linear_sum_assignment(cost.cpu().numpy())
        return torch.from_numpy(index).to(data.device)


@checked
@dataclass(frozen=True)
class Sinkhorn(Coupling):
    """A draw from the entropic optimal transport plan of the batch.

    The plan is π = argmin ⟨π, C⟩ + regularisation · KL(π ‖ uniform), with uniform marginals and squared distances C. It
    is found by Sinkhorn's iterations in the log domain, on the device of the data. Each data point draws its noise from
    its conditional of π, so the same noise may be drawn twice. As the regularisation goes to 0, the plan becomes that
    of `OptimalTransport`; as it goes to infinity, noise and data become independent.
    [Cuturi 2013, arXiv:1306.0895; in flow matching: Tong et al. 2024, arXiv:2302.00482]

    Args:
        regularisation: strength of the entropy term, in squared units of flow space.
        max_iterations: the plan is used as it is after this many iterations.
        tolerance: iterations stop when the marginal of the noise is this close to uniform, relative to it. The marginal
            of the data is exact.

    Raises:
        InvalidValueError: an argument is not positive.
    """

    regularisation: float = 0.1
    max_iterations: int = 1000
    tolerance: float = 1e-2

    def __post_init__(self) -> None:
        check_number("regularisation", self.regularisation, above=0)
        check_number("max_iterations", self.max_iterations, whole=True, at_least=1)
        check_number("tolerance", self.tolerance, above=0)

    def pair(self, noise: Tensor, data: Tensor, generator: torch.Generator | None = None) -> Tensor:
        given_data = self.log_plan(noise, data).softmax(1)
        device = data.device if generator is None else generator.device
        return torch.multinomial(given_data.to(device), 1, generator=generator).squeeze(1).to(data.device)

    @torch.no_grad()
    def log_plan(
        self,
        noise: Tensor,  # (N, *event)
        data: Tensor,  # (M, *event)
    ) -> Tensor:  # (M, N)
        """Return log π for each data point (row) and noise (column); rows sum to 1/M exactly."""
        kernel = -_squared_distances(data, noise) / self.regularisation
        log_m, log_n = math.log(kernel.shape[0]), math.log(kernel.shape[1])
        columns = kernel.new_zeros(kernel.shape[1])
        for iteration in range(self.max_iterations):
            rows = -log_m - torch.logsumexp(kernel + columns, 1)
            update = -log_n - torch.logsumexp(kernel + rows.unsqueeze(1), 0)
            checks = iteration % 10 == 9  # not always, because the check waits for a GPU
            if checks and float((columns - update).abs().amax()) < self.tolerance:
                break
            columns = update
        rows = -log_m - torch.logsumexp(kernel + columns, 1)
        return kernel + rows.unsqueeze(1) + columns


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:  # (A, B), float64
    return torch.cdist(a.detach().flatten(1).double(), b.detach().flatten(1).double()).square()


def _reduced(cost: Tensor, sweeps: int = 2) -> Tensor:
    """Subtract one number from each row and each column, so that the least entry of each is 0.

    This changes the cost of every assignment by the same amount, so the best one stays the best. The numbers come from
    an entropic plan after two sweeps of Sinkhorn's iterations. They make the best assignment's entries nearly 0, and
    the search takes less than half the time.
    """
    scale = (0.07 * cost.mean()).clamp(min=torch.finfo(cost.dtype).tiny)
    kernel = (cost / -scale).float()
    columns = kernel.new_zeros(kernel.shape[1])
    for _ in range(sweeps):
        rows = -torch.logsumexp(kernel + columns, 1, keepdim=True)
        columns = -torch.logsumexp(kernel + rows, 0)
    cost = cost - scale * columns
    cost = cost - cost.amin(1, keepdim=True)
    return cost - cost.amin(0)
