"""A network that sums up long contexts in a few features."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from flows.arguments import checked
from flows.checks import whole_number
from flows.conditions import Conditions
from flows.encoders.base import Encoder
from flows.encoders.standardised import Standardised
from flows.errors import InvalidTypeError, InvalidValueError


@checked
class Embedding(Encoder):
    """Features of standardised contexts by a network that is trained with the field.

    By default a perceptron with SiLU. It runs once a solve, so it may be larger than the field.

    Args:
        context_shape: shape of one context.
        features: number of features.
        hidden: widths of the perceptron's hidden layers.
        scale: of the contexts before the network, see `Standardised`.
        network: a module of one's own instead, from what `Standardised` returns to (B, features).
        conditions: of contexts from columns of a table, see `Standardised`.

    Raises:
        InvalidTypeError, InvalidValueError: a width is no positive whole number, or the network returns another shape.

    Example:
        ```python
        import torch

        import flows

        encoder = flows.encoders.Embedding(context_shape=(100,), features=8)
        flow = flows.CNF(flows.fields.MLP(2, context_shape=8), encoder=encoder)
        log_p = flow.log_prob(torch.zeros(5, 2), context=torch.zeros(5, 100))
        ```
    """

    def __init__(
        self,
        context_shape: int | Sequence[int],
        features: int = 32,
        hidden: Sequence[int] = (64, 64),
        scale: Literal["linear", "log", "sqrt"] = "linear",
        network: nn.Module | None = None,
        conditions: Conditions | None = None,
    ) -> None:
        super().__init__(context_shape, whole_number("features", features))
        self.conditions = conditions
        self.standardise = Standardised(self.context_shape, scale, conditions)
        if network is None:
            widths = [
                math.prod(self.standardise.features_shape),
                *(whole_number("hidden", width) for width in hidden),
                features,
            ]
            pairs = list(itertools.pairwise(widths))
            layers = [[nn.Linear(a, b), nn.SiLU()] for a, b in pairs[:-1]]
            network = nn.Sequential(nn.Flatten(), *itertools.chain(*layers), nn.Linear(*pairs[-1]))
        self.network = network

    def fit(self, contexts: Tensor) -> Embedding:
        """Standardise by contexts (n, *context)."""
        self.standardise.fit(contexts)
        return self

    def forward(self, context: Tensor) -> Tensor:
        features = self.network(self.standardise(context))
        if not isinstance(features, torch.Tensor):
            raise InvalidTypeError(f"the network of an embedding must return a tensor, got {type(features).__name__}")
        expected = (context.shape[0], *self.features_shape)
        if tuple(features.shape) != expected:
            raise InvalidValueError(
                f"the network of an embedding must return features of shape {expected}, got {tuple(features.shape)}"
            )
        return features
