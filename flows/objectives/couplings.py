"""Which noise goes with which data point in a batch of flow matching."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from flows.errors import InvalidValueError
from flows.objectives.contexts import groups_of

MANY = 16  # examples that are more than chance


class Coupling(ABC):
    """Pairs the noise of a batch with its data so that both keep their own distribution.

    To add one: subclass it with :meth:`pair`; settings may then give it by its lower-case name.
    """

    @property
    def is_independent(self) -> bool:
        """Whether noise and data are independent, as the posterior of the marginal target supposes."""
        return False

    @abstractmethod
    def pair(
        self,
        noise: Tensor,  # (B, *event)
        data: Tensor,  # (B, *event)
        generator: torch.Generator | None = None,
    ) -> Tensor:  # (B,)
        """The index of the noise that goes with each data point."""

    def couple(
        self, noise: Tensor, data: Tensor, context: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:  # (B, *event)
        """The noise in the order of the data.

        With contexts, only examples of equal context are paired among each other: a pairing across contexts would
        make the noise of a context another than the base, which samples start from. Where all contexts of a batch
        of 16 or more differ, nothing is left to pair, of which a warning tells.
        """
        if context is None:
            return noise[self.pair(noise, data, generator)]
        coupled = noise.clone()
        groups = groups_of(context)
        shared = (groups.bincount() > 1).nonzero()
        if len(groups) >= MANY and not len(shared):  # a few examples of classes may well differ
            warnings.warn(
                f"{type(self).__name__} pairs examples of equal context, and in this batch all contexts differ: noise "
                "and data stay independent; coupling=independent says so",
                stacklevel=2,
            )
        for group in shared:
            members = (groups == group).nonzero().squeeze(1)
            coupled[members] = noise[members[self.pair(noise[members], data[members], generator)]]
        return coupled


@dataclass(frozen=True)
class Independent(Coupling):
    """Noise and data as they come."""

    @property
    def is_independent(self) -> bool:
        return True

    def pair(self, noise: Tensor, data: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.arange(len(data), device=data.device)

    def couple(
        self, noise: Tensor, data: Tensor, context: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        return noise


@dataclass(frozen=True)
class OptimalTransport(Coupling):
    """The assignment of least total squared distance within the batch, exact, on the CPU in O(B³) at worst.

    Paths hardly cross, so that velocities vary less and flows are straighter.
    [Tong et al. 2024, arXiv:2302.00482; Pooladian et al. 2023, arXiv:2304.14772]
    """

    def pair(self, noise: Tensor, data: Tensor, generator: torch.Generator | None = None) -> Tensor:
        cost = _reduced(_squared_distances(data, noise))
        _, index = linear_sum_assignment(cost.cpu().numpy())
        return torch.from_numpy(index).to(data.device)


@dataclass(frozen=True)
class Sinkhorn(Coupling):
    r"""A draw from the entropic plan: min_π ⟨π, C⟩ + regularisation · KL(π ‖ uniform), C squared distances.

    π has uniform marginals; it is found by Sinkhorn's iterations in the log domain. Each data point draws its noise
    from its own conditional of π, so a noise may serve twice. Towards 0 the plan is that of
    :class:`OptimalTransport`, towards infinity independent; it runs on the device of the data.
    [Cuturi 2013, arXiv:1306.0895; in flow matching: Tong et al. 2024, arXiv:2302.00482]

    Args:
        regularisation: in squared units of flow space.
        max_iterations: after which the plan is taken as it is.
        tolerance: of the noise's marginal, relative to uniform, at which iterations stop; the data's is exact.
    """

    regularisation: float = 0.1
    max_iterations: int = 1000
    tolerance: float = 1e-2

    def __post_init__(self) -> None:
        for name in ("regularisation", "max_iterations", "tolerance"):
            if not getattr(self, name) > 0:
                raise InvalidValueError(f"{name} must be > 0, got {getattr(self, name)}")

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
        """log π of each pair of a data point (row) and a noise (column); rows sum to 1/M exactly."""
        kernel = -_squared_distances(data, noise) / self.regularisation
        log_m, log_n = math.log(kernel.shape[0]), math.log(kernel.shape[1])
        columns = kernel.new_zeros(kernel.shape[1])
        for iteration in range(self.max_iterations):
            rows = -log_m - torch.logsumexp(kernel + columns, 1)
            update = -log_n - torch.logsumexp(kernel + rows.unsqueeze(1), 0)
            looks = iteration % 10 == 9  # now and then, since a GPU has to be waited for
            if looks and float((columns - update).abs().amax()) < self.tolerance:
                break
            columns = update
        rows = -log_m - torch.logsumexp(kernel + columns, 1)
        return kernel + rows.unsqueeze(1) + columns


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:  # (A, B), float64
    return torch.cdist(a.detach().flatten(1).double(), b.detach().flatten(1).double()).square()


def _reduced(cost: Tensor, sweeps: int = 2) -> Tensor:
    """``cost`` less a number for each row and each column, so that in each the least entry is 0.

    Every assignment loses the same, so the best one stays the best. With the numbers of an entropic plan, two sweeps
    of Sinkhorn's iterations, its entries are nearly 0, and the search for it takes less than half the time.
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
