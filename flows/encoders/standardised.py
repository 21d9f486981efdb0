"""Contexts of mean 0 and standard deviation 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from flows.arguments import checked
from flows.conditions import Conditions
from flows.encoders.base import Encoder
from flows.errors import InvalidValueError

SCALES = {"linear": torch.as_tensor, "log": torch.log1p, "sqrt": torch.sqrt}  # of |c|


@checked
class Standardised(Encoder):
    """Contexts of mean 0 and standard deviation 1: (s(c) − mean)/sd for each entry.

    Mean and standard deviation are those of the training part. Before `fit` they are 0 and 1. Both are buffers in
    float64, so checkpoints hold them. An entry that never varies becomes 0.

    Entries that are categories become one-hot vectors, of which the first so many features hold the numbers.

    Args:
        context_shape: shape of one context.
        scale: s, "linear"; "log" for sign(c) log(1 + |c|), which suits heavy tails; or "sqrt" for sign(c) √|c|, which
            suits counts, for their noise is then of one size.
        conditions: says which entries are categories, for contexts from columns of a table. Default: none are.

    Raises:
        InvalidValueError: `scale` is none of them, or `context_shape` is not that of the conditions. From a call: an
            entry is NaN or an unknown category.

    Example:
        ```python
        import torch

        import flows

        encoder = flows.encoders.Standardised(3).fit(5 + 2 * torch.randn(1000, 3))
        flow = flows.CNF(flows.fields.MLP(2, context_shape=3), encoder=encoder)
        x = flow.sample(10, context=torch.tensor([5.0, 3.0, 7.0]))  # a context in data units
        ```
    """

    mean: Tensor
    inverse_sd: Tensor  # 0 for an entry that never varies
    _like: Tensor

    def __init__(
        self,
        context_shape: int | Sequence[int],
        scale: Literal["linear", "log", "sqrt"] = "linear",
        conditions: Conditions | None = None,
    ) -> None:
        super().__init__(context_shape, context_shape)
        if conditions is not None:
            if conditions.shape != self.context_shape:
                raise InvalidValueError(
                    f"context_shape must be {conditions.shape}, one entry for each of the conditions, got "
                    f"{self.context_shape}"
                )
            known = [conditions.levels(name) for name in conditions.categories]
            self.features_shape = (len(conditions.numbers) + sum(map(len, known)),)
        self.conditions = conditions
        if scale not in SCALES:
            raise InvalidValueError(f"scale must be 'linear', 'log' or 'sqrt', got {scale!r}")
        self.scale = scale
        shape = self.context_shape if conditions is None else (len(conditions.numbers),)
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("inverse_sd", torch.ones_like(self.mean))
        self.register_buffer("_like", torch.zeros(()), persistent=False)  # the dtype of the features

    def _apply(self, fn, recurse: bool = True):
        exact = {name: self._buffers[name] for name in ("mean", "inverse_sd")}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            after = self._buffers[name]
            if before is not None and after is not None and not after.is_meta and after.device.type != "mps":
                self._buffers[name] = (after if before.is_meta else before.to(after.device)).double()
        return self

    def fit(self, contexts: Tensor) -> Standardised:
        """Compute mean and standard deviation of contexts (n, *context).

        Raises:
            InvalidValueError: there are fewer than two, or one is not finite.
        """
        if len(contexts) < 2:
            raise InvalidValueError(f"at least two contexts are needed to standardise by, got {len(contexts)}")
        scaled = self._scaled(self._parts(contexts)[0])
        if not self.mean.numel():  # categories alone
            return self
        if not bool(scaled.isfinite().all()):
            raise InvalidValueError("the contexts to standardise by hold NaN or infinite values")
        sd = scaled.std(0)
        self.mean.copy_(scaled.mean(0))
        self.inverse_sd.copy_(torch.where(sd > 1e-12 * scaled.abs().amax(0), 1 / sd, 0.0))
        return self

    def forward(self, context: Tensor) -> Tensor:
        numbers, one_hot = self._parts(context)
        scaled = ((self._scaled(numbers) - self.mean) * self.inverse_sd).to(self._like.dtype)
        return torch.cat([scaled, *(part.to(self._like.dtype) for part in one_hot)], 1) if one_hot else scaled

    def _parts(self, context: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The entries that are numbers, and one-hot vectors of the others."""
        context = context.to(self.mean)
        conditions = self.conditions
        if conditions is None:
            return context, []
        if context.device.type == "cpu" or not torch.is_grad_enabled():  # a GPU need not wait in each training step
            conditions.check(context)
        places = {name: conditions.columns.index(name) for name in conditions.categories}
        one_hot = [
            context[:, place, None] == torch.as_tensor(conditions.levels(name)).to(context)
            for name, place in places.items()
        ]
        return context[:, conditions.numbers], one_hot

    def _scaled(self, context: Tensor) -> Tensor:
        return context.sign() * SCALES[self.scale](context.abs())
