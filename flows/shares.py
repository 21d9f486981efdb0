"""A batch that several processes share: each solves rows of its own, and the result is that of one process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Share:
    """The share of one process in a batch that several compute together.

    Every process holds the whole batch and draws all its random numbers, as one process would. It evaluates the field
    on its own rows alone. Fewer rows than processes are not shared: each process takes all of them.

    Args:
        index: of this process, from 0.
        count: of the processes.
        gather: stacks a tensor, of one shape in all processes, to (count, *shape). All of them must call it.

    Example:
        ```python
        from flows.shares import Share

        share = Share(index=0, count=2, gather=lambda tensor: tensor.repeat(2, 1))
        share.rows(5), share.weight(5)  # slice(0, 2), 0.8
        ```
    """

    index: int
    count: int
    gather: Callable[[Tensor], Tensor] = field(compare=False, repr=False)

    def rows(self, number: int) -> slice:
        """The own ones of so many rows."""
        return self._rows_of(self.index, number)

    def weight(self, number: int) -> float:
        """The factor of a mean over the own rows whose mean over processes is that over all rows."""
        if number < self.count:
            return 1.0
        own = self.rows(number)
        return (own.stop - own.start) * self.count / number

    def factor(self, number: int) -> float:
        """The factor of a sum over the own rows whose mean over processes is the sum over all rows."""
        return float(self.count if number >= self.count else 1)

    def joined(self, own: Tensor, number: int) -> Tensor:
        """All rows, (number, ...), from those of each process."""
        if number < self.count:
            return own
        most = -(-number // self.count)
        padded = torch.cat([own, own[:1].expand(most - len(own), *own.shape[1:])])
        every = self.gather(padded)
        sizes = [rows.stop - rows.start for rows in (self._rows_of(i, number) for i in range(self.count))]
        return torch.cat([part[:size] for part, size in zip(every, sizes, strict=True)])

    def _rows_of(self, index: int, number: int) -> slice:
        if number < self.count:
            return slice(0, number)
        return slice(number * index // self.count, number * (index + 1) // self.count)


_CURRENT: ContextVar[Share | None] = ContextVar("share", default=None)
_STEPS: ContextVar[Share | None] = ContextVar("share of steps", default=None)


def current_share() -> Share | None:
    """The share of this process in what is computed now; None where it computes alone."""
    return _CURRENT.get()


@contextlib.contextmanager
def sharing(share: Share | None) -> Iterator[None]:
    """While entered, batches are computed together; None: alone."""
    before = _CURRENT.set(share)
    try:
        yield
    finally:
        _CURRENT.reset(before)


def own_rows(number: int) -> tuple[slice | None, float]:
    """The rows of this process, None for all, and the weight of its mean; see `Share`."""
    share = current_share()
    return (None, 1.0) if share is None else (share.rows(number), share.weight(number))


def own_part(number: int) -> tuple[slice | None, float]:
    """The rows of this process, None for all, and the factor of its sums, for means over anything but rows.

    Every process holds the whole batch, so it can count what all of them sum: observed values, for example. With its
    sum S over its own rows, factor · S / (the number of all) has the mean over processes that one process would find.
    It is 0, and not NaN, where the own rows have no such value.
    """
    share = current_share()
    return (None, 1.0) if share is None else (share.rows(number), share.factor(number))


def mean_of_all(own: Tensor, weight: float) -> Tensor:
    """The mean over all rows from the mean over the own ones, whose weight is that of `own_rows`.

    Figures that are no means, such as a root mean square, are computed from it; all processes must call this.
    """
    share = current_share()
    return own if share is None else share.gather(weight * own).mean(0)


@contextlib.contextmanager
def steps_together(rows: slice | None) -> Iterator[None]:
    """While entered, processes that solve `rows` of a shared batch control the error of all; None: of their own.

    A solve within a shared one, as that of a base which is a flow, is of the same rows, and shared as well.
    """
    before = _STEPS.set(share_of_steps() if rows is None else current_share())
    try:
        yield
    finally:
        _STEPS.reset(before)


def anywhere(found: bool) -> bool:
    """Whether it is so in any of the processes that solve rows of a shared batch; all of them must call this."""
    share = share_of_steps()
    return found if share is None else bool(share.gather(torch.tensor([float(found)])).any())


def share_of_steps() -> Share | None:
    """The share of this process in a solve whose steps all processes take together; None: in no such solve."""
    return _STEPS.get()
