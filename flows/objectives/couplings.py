"""Couplings: which noise is paired with which data point in a batch of flow matching."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flows.arguments import CheckedMethods, checked
from flows.checks import check_number
from flows.errors import InvalidValueError, warn
from flows.objectives.contexts import groups_of

MIN_BATCH_TO_WARN = 16  # in smaller batches, class labels may all differ by chance


class Coupling(CheckedMethods, ABC, checks=("pair", "pairs", "couple")):
    """Pairs the points of the base ("noise") of a batch with its data.

    To add one, subclass this and implement `pair`. Settings may then name it by its lower-case name.

    Attributes:
        context_weight: w of couplings that respect contexts by a cost; see `pairs`. Default: `None`, exactly.

    Example:
        ```python
        import torch

        import flows


        class Sorted(flows.objectives.Coupling):
            '''Optimal transport on the line: both sides in order.'''

            def pair(self, noise, data, generator=None):
                index = torch.empty(len(data), dtype=torch.long)
                index[data[:, 0].argsort()] = noise[:, 0].argsort()
                return index


        objective = flows.objectives.FlowMatching(coupling=Sorted())
        ```
    """

    context_weight: float | None = None

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

    def selected(
        self, noise: Tensor, data: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:  # (K,) and (K,)
        """Return pairs of indices of noise and data. Default: every data point once, with its `pair`."""
        return self.pair(noise, data, generator), torch.arange(len(data), device=data.device)

    def pairs(
        self,
        noise: Tensor,  # (B, *event)
        data: Tensor,  # (B, *event)
        context: Tensor | None = None,  # (B, *context), of the data; that of the same row stands for the noise, too
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:  # (K,) and (K,)
        """Return pairs of indices of noise and data that suit the contexts.

        Noise that depends on the context would not have the distribution of the base, from which samples start. Without
        a `context_weight`, noise is only exchanged between examples of equal context; if all contexts of a batch of 16
        or more examples differ, there is nothing to pair, and a warning says so.

        With a weight w, for contexts that are numbers, the noise of row i counts as drawn under context c_i, and pairs
        are chosen by the cost ‖x₀ − x₁‖² + w ‖(c_i − c_j)/s‖², s the standard deviations in the batch. As w grows, the
        plan becomes that of each context; a finite w leaves a bias, and a larger batch needs a smaller one.
        [Chemseddine et al. 2024, arXiv:2403.18705; Kerrigan et al. 2024, arXiv:2404.04240]
        """
        if context is None:
            return self.selected(noise, data, generator)
        if self.context_weight is not None:
            columns = _scaled(context, self.context_weight).to(data)
            own, other = (torch.cat([part.flatten(1), columns], 1) for part in (noise, data))
            return self.selected(own, other, generator)
        groups = groups_of(context)
        shared = (groups.bincount() > 1).nonzero()
        if len(groups) >= MIN_BATCH_TO_WARN and not len(shared):
            warn(
                f"{type(self).__name__} pairs examples of equal context, but in this batch all contexts differ: noise "
                "and data stay independent; for contexts that are numbers set a context_weight, such as 10, or use "
                "coupling=independent, which does the same without this warning"
            )
        alone = torch.arange(len(data), device=data.device)
        single = alone[(groups.bincount() == 1)[groups]]
        found = [(single, single)]
        for group in shared:
            members = (groups == group).nonzero().squeeze(1)
            chosen = self.selected(noise[members], data[members], generator)
            found.append((members[chosen[0]], members[chosen[1]]))
        first, second = (torch.cat(part) for part in zip(*found, strict=True))
        order = second.argsort(stable=True)  # queries are the first of a batch, so its groups must stay mixed
        return first[order], second[order]

    def couple(
        self, noise: Tensor, data: Tensor, context: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:  # (K, *event)
        """Return the noise of the `pairs`; in the order of the data, if each data point is in one of them."""
        return noise[self.pairs(noise, data, context, generator)[0]]


@checked
@dataclass(frozen=True)
class Independent(Coupling):
    """No pairing: noise and data stay as they were drawn."""

    @property
    def is_independent(self) -> bool:
        return True

    def pair(self, noise: Tensor, data: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.arange(len(data), device=data.device)

    def pairs(
        self, noise: Tensor, data: Tensor, context: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        every = torch.arange(len(data), device=data.device)
        return every, every


@checked
@dataclass(frozen=True)
class Components(Coupling):
    """Noise from the component of the base that each data point belongs to.

    A data point x₁ draws its component k from the posterior p(k | x₁) of the base (`flows.bases.Mixture`), and noise
    from that component. Paths go around the mean μ_k of the component,

        x_t = μ_k + a (x₁ − μ_k) + b (x₀ − μ_k).

    Along `path="cosine"` the velocity is 0 where the data of each component are normal with its covariance. So a field
    that starts at rest starts near its target, and training learns only what the base has missed; along straight paths
    all points would have to move towards the mean and back. A base without components, such as `Normal`, is one
    component. After EM the noise has the distribution of the base, as its weights are then the mean posteriors.

    It refuses contexts: components differ between contexts, so that the noise would not be that of the base.
    """

    def pair(self, noise: Tensor, data: Tensor, generator: torch.Generator | None = None) -> Tensor:
        raise InvalidValueError(
            "coupling=components draws noise for given data from the components of a base, so it cannot pair noise "
            "that has been drawn already; use it in FlowMatching, or another coupling"
        )


@checked
@dataclass(frozen=True)
class OptimalTransport(Coupling):
    """The assignment with the least total squared distance in the batch.

    Paths then hardly cross, so velocities vary less and flows are straighter. Exact, on the CPU, in O(B³) at worst.
    [Tong et al. 2024, arXiv:2302.00482; Pooladian et al. 2023, arXiv:2304.14772]

    Args:
        context_weight: see `Coupling.pairs`.
    """

    context_weight: float | None = None

    def __post_init__(self) -> None:
        _check_context_weight(self.context_weight)

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
        context_weight: see `Coupling.pairs`.

    Raises:
        InvalidValueError: an argument is not positive.
    """

    regularisation: float = 0.1
    max_iterations: int = 1000
    tolerance: float = 1e-2
    context_weight: float | None = None

    def __post_init__(self) -> None:
        check_number("regularisation", self.regularisation, above=0)
        check_number("max_iterations", self.max_iterations, whole=True, at_least=1)
        check_number("tolerance", self.tolerance, above=0)
        _check_context_weight(self.context_weight)

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


@checked
@dataclass(frozen=True)
class UnbalancedTransport(Coupling):
    """Draws from an unbalanced entropic transport plan, which leaves out points that are far from all others.

    The plan is π = argmin ⟨π, C⟩ + ε KL(π ‖ uniform) + τ KL(π 1 ‖ uniform) + τ KL(πᵀ 1 ‖ uniform), with squared
    distances C, by Sinkhorn's iterations in the log domain, damped by τ/(τ + ε). As many pairs as the batch has points
    are drawn from it. Neither marginal stays: with outliers that is the aim, otherwise the flow ends at other weights
    than those of the data. As τ goes to infinity, the plan becomes that of `Sinkhorn`.
    [Chizat et al. 2018, arXiv:1607.05816; in flow matching: Eyring et al. 2024, arXiv:2311.15100]

    Args:
        regularisation: ε, in squared units of flow space.
        marginal_penalty: τ, in squared units of flow space: pairs further apart than about √τ are given up.
        max_iterations, tolerance: as of `Sinkhorn`, for the change of the potentials, relative to ε.
        context_weight: see `Coupling.pairs`.

    Raises:
        InvalidValueError: an argument is not positive.
    """

    regularisation: float = 0.1
    marginal_penalty: float = 1.0
    max_iterations: int = 1000
    tolerance: float = 1e-2
    context_weight: float | None = None

    def __post_init__(self) -> None:
        for name in ("regularisation", "marginal_penalty", "tolerance"):
            check_number(name, getattr(self, name), above=0)
        check_number("max_iterations", self.max_iterations, whole=True, at_least=1)
        _check_context_weight(self.context_weight)

    def pair(self, noise: Tensor, data: Tensor, generator: torch.Generator | None = None) -> Tensor:
        given_data = self.log_plan(noise, data).softmax(1)
        device = data.device if generator is None else generator.device
        return torch.multinomial(given_data.to(device), 1, generator=generator).squeeze(1).to(data.device)

    def selected(self, noise: Tensor, data: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        weights = self.log_plan(noise, data).logsumexp(1).softmax(0)
        device = data.device if generator is None else generator.device
        rows = torch.multinomial(weights.to(device), len(data), replacement=True, generator=generator).to(data.device)
        return self.pair(noise, data[rows], generator), rows

    @torch.no_grad()
    def log_plan(
        self,
        noise: Tensor,  # (N, *event)
        data: Tensor,  # (M, *event)
    ) -> Tensor:  # (M, N)
        """Return log π for each data point (row) and noise (column)."""
        kernel = -_squared_distances(data, noise) / self.regularisation
        damping = self.marginal_penalty / (self.marginal_penalty + self.regularisation)
        log_m, log_n = math.log(kernel.shape[0]), math.log(kernel.shape[1])
        kernel = kernel - log_m - log_n  # of the plan relative to the product of uniform marginals
        rows, columns = kernel.new_zeros(kernel.shape[0]), kernel.new_zeros(kernel.shape[1])
        for iteration in range(self.max_iterations):
            rows = -damping * (log_m + torch.logsumexp(kernel + columns, 1))
            update = -damping * (log_n + torch.logsumexp(kernel + rows.unsqueeze(1), 0))
            checks = iteration % 10 == 9  # not always, because the check waits for a GPU
            if checks and float((columns - update).abs().amax()) < self.tolerance:
                break
            columns = update
        return kernel + rows.unsqueeze(1) + columns


@checked
@dataclass(frozen=True)
class PartialTransport(Coupling):
    """The assignment of a share of the batch with the least total squared distance; the rest is left out.

    The points left out are those that cost most, such as outliers, so neither marginal stays, as with
    `UnbalancedTransport`. Exact, on the CPU. [Caffarelli & McCann 2010; Chapel et al. 2020, arXiv:2002.08276]

    Args:
        share: of the pairs that are kept, 0 < share <= 1.
        context_weight: see `Coupling.pairs`.

    Raises:
        InvalidValueError: `share` is out of range.
    """

    share: float = 0.9
    context_weight: float | None = None

    def __post_init__(self) -> None:
        check_number("share", self.share, above=0, at_most=1)
        _check_context_weight(self.context_weight)

    def pair(self, noise: Tensor, data: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return OptimalTransport().pair(noise, data, generator)

    def selected(self, noise: Tensor, data: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        from scipy.optimize import linear_sum_assignment

        cost = _squared_distances(data, noise).cpu().numpy()
        size = len(data)
        spare = size - max(1, round(self.share * size))
        # Each spare row and column takes a point that is left out; two of them cannot take each other.
        enlarged = np.zeros((size + spare, size + spare))
        enlarged[:size, :size] = cost
        enlarged[size:, size:] = 2 * size * (1 + cost.max())
        rows, columns = linear_sum_assignment(enlarged)
        kept = (rows < size) & (columns < size)
        first, second = (torch.from_numpy(part[kept]).to(data.device) for part in (columns, rows))
        return first, second


def _check_context_weight(weight: float | None) -> None:
    if weight is not None:
        check_number("context_weight", weight, above=0, otherwise="None pairs examples of equal context alone")


def _scaled(context: Tensor, weight: float) -> Tensor:  # (B, k)
    """Contexts in standard deviations of the batch, times √w."""
    columns = context.detach().flatten(1).double()
    spread = columns.std(0, correction=0)
    return columns / torch.where(spread > 0, spread, 1.0) * math.sqrt(weight)


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
