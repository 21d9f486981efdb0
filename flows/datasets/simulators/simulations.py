"""Pairs of parameters and observations, for posteriors of simulators."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from flows.arguments import checked
from flows.checks import check_points
from flows.datasets.base import Dataset, as_rows
from flows.datasets.batches import Batch, EpochStream, convert
from flows.datasets.simulators.priors import Prior
from flows.datasets.splits import random_split
from flows.errors import InvalidValueError

ENOUGH = 10  # observations, of which some differ if they depend on the parameters


@checked
class Simulations(Dataset):
    """Parameters θ and observations that a simulator made from them.

    x is θ and the context is the observation, so a flow learns the posterior p(θ | observation).

    Args:
        theta: parameters (n, d), drawn from the prior.
        observations: (n, *observation), of each row of parameters.
        prior: of the parameters, see `Prior`; its support bounds the posterior. Default: unknown.
        name: name of the runs.
        validation_fraction, test_fraction: of the pairs, rounded to whole ones.
        split_seed: seed of the random split.

    Raises:
        InvalidTypeError, InvalidValueError: the numbers of pairs differ, a value is not finite, parameters lie outside
            the prior, or a split would be empty.

    Example:
        ```python
        import torch

        import flows

        theta = torch.rand(2000, 2)
        data = flows.datasets.Simulations(theta, theta + 0.1 * torch.randn(2000, 2), flows.datasets.box([0, 0], [1, 1]))
        ```
    """

    def __init__(
        self,
        theta: Tensor,
        observations: Tensor,
        prior: Any = None,
        name: str = "simulations",
        validation_fraction: float = 0.05,
        test_fraction: float = 0.05,
        split_seed: int = 0,
    ) -> None:
        pairs = as_pairs(theta, observations)
        fractions = {"test": test_fraction, "validation": validation_fraction}
        rows = random_split(len(pairs), fractions, split_seed, name, "simulations")
        settings = {**{f"{split}_fraction": float(value) for split, value in fractions.items()}, "seed": split_seed}
        self._hold({split: pairs[chosen] for split, chosen in rows.items()}, prior, name, settings)

    def _hold(self, parts: dict[str, Batch], prior: Any, name: str, settings: dict[str, Any]) -> None:
        """Keep the pairs of each split."""
        self.name = name
        self._parts = parts
        self.split_settings = settings
        train = parts["train"]
        assert train.context is not None  # pairs have both
        if len(train) >= ENOUGH and bool((train.context == train.context[0]).all()):
            raise InvalidValueError(
                f"all {len(train)} observations of the training part are equal, so they say nothing about the "
                "parameters; look at the simulator"
            )
        self.event_shape, self.context_shape = tuple(train.x.shape[1:]), tuple(train.context.shape[1:])
        self.num_validation, self.num_test = len(parts["validation"]), len(parts["test"])
        self.prior = None if prior is None else Prior(prior)
        if self.prior is not None:
            if self.prior.event_shape != self.event_shape:
                raise InvalidValueError(
                    f"the prior has parameters of shape {self.prior.event_shape}, and those of the simulations have "
                    f"{self.event_shape}"
                )
            self.bounds = self.prior.bounds
            for name, given in parts.items():
                part = self._parts[name] = Batch(self.prior.inside(given.x), given.context)
                outside = self.prior.log_prob(part.x).isinf().nonzero()
                if len(outside):
                    raise InvalidValueError(
                        f"{len(outside)} of {len(part)} parameters lie outside the support of the prior, the first are "
                        f"{given.x[int(outside[0])].tolist()}; simulate with parameters drawn from the prior"
                    )

    def train_stream(
        self,
        batch_size: int,
        generator: torch.Generator,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> PairStream:
        """Return an endless stream of training pairs, reshuffled at each pass."""
        return PairStream(self.name, self._parts["train"], batch_size, generator, device, dtype)

    def held_out(self, split: Literal["validation", "test"]) -> Batch:
        return self._parts[split]

    def reference(self) -> Tensor:
        return convert(self._parts["train"].x, None, None, self.name)

    def reference_contexts(self) -> Tensor:
        context = self._parts["train"].context
        assert context is not None  # pairs have both
        return context

    def rows_for_hashing(self) -> dict[str, np.ndarray]:
        return {split: as_rows(part.x) for split, part in self._parts.items()}

    def labels_for_hashing(self) -> dict[str, np.ndarray]:
        contexts = {split: part.context for split, part in self._parts.items()}
        return {split: as_rows(context) for split, context in contexts.items() if context is not None}


class PairStream(EpochStream):
    """Batches of pairs without replacement."""

    unit = "simulations"

    def __init__(
        self,
        dataset: str,
        pairs: Batch,
        batch_size: int,
        generator: torch.Generator,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dataset, len(pairs), batch_size, generator, device, dtype)
        assert pairs.context is not None  # pairs have both
        self._theta, self._observations = (
            convert(part, self.device, self.dtype, dataset) for part in (pairs.x, pairs.context)
        )

    def next(self) -> Batch:
        chosen = self.draw().to(self.device)
        return Batch(self._theta[chosen], self._observations[chosen])


def as_pairs(theta: Tensor, observations: Tensor) -> Batch:
    """Return parameters and observations as one batch; those without a shape of their own become (1,).

    Raises:
        InvalidValueError: the numbers differ, a value is not finite, or observations are empty.
    """
    theta = theta.unsqueeze(1) if theta.ndim == 1 else theta
    observations = observations.unsqueeze(1) if observations.ndim == 1 else observations
    check_points("theta", theta, at_least=1)
    check_points("observations", observations, at_least=1)
    if len(theta) != len(observations):
        raise InvalidValueError(
            f"each row of parameters needs its observation, got {len(theta)} rows and {len(observations)} observations"
        )
    for what, values in (("parameters", theta), ("observations", observations)):
        bad = (~values.isfinite()).flatten(1).any(1).nonzero()
        if len(bad):
            first = int(bad[0])
            raise InvalidValueError(
                f"the {what} of {len(bad)} of {len(theta)} simulations hold NaN or infinite values, the first at index "
                f"{first}, whose parameters are {theta[first].tolist()}; leave those out"
            )
    if not observations[0].numel():
        raise InvalidValueError(f"an observation must hold at least one number, got the shape {observations.shape[1:]}")
    return Batch(theta.detach(), observations.detach())
