"""A flow as a torch.distributions.Distribution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from flows.arguments import checked
from flows.checks import as_shape
from flows.errors import InvalidTypeError, InvalidValueError
from flows.expectations import refusal
from flows.models.inputs import batch_shape_of, context_ndim

if TYPE_CHECKING:
    from flows.models.cnf import CNF


@checked
class FlowDistribution(Distribution):
    """p(x | context) of a `flows.CNF`, over data space.

    Its batch shape is that of the context, and empty without one. `sample` records no gradient, `rsample`
    does.

    Args:
        flow: the flow, whose parameters it shares.
        context: (*batch, *context) or `None`.

    Example:
        ```python
        import torch

        import flows

        flow = flows.CNF(flows.fields.MLP((2,), context_shape=(3,)))
        density = flow(torch.zeros(3))  # p(x | c), a `torch.distributions.Distribution`
        x = density.sample((10,))  # (10, 2)
        density.log_prob(x)  # (10,)
        ```
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 (the base class's form)
    has_rsample = True

    def __init__(
        self, flow: CNF, context: Tensor | None = None, batch_shape: int | Sequence[int] | None = None
    ) -> None:
        from flows.models.cnf import CNF  # which builds on this module

        if not isinstance(flow, CNF):
            raise InvalidTypeError(refusal("flow", flow, CNF))
        self.flow = flow
        self.context = context
        if batch_shape is None:
            batch_shape = () if context is None else context.shape[: context.ndim - context_ndim(flow, context)]
        super().__init__(
            torch.Size(as_shape("batch_shape", batch_shape, at_least=0)),
            torch.Size(flow.event_shape),
            validate_args=False,
        )

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> constraints.Constraint:
        levels = self.flow.transform.num_levels
        values = constraints.real if levels is None else constraints.integer_interval(0, levels - 1)
        return constraints.independent(values, len(self.event_shape))

    @checked
    def log_prob(self, value: Tensor) -> Tensor:
        """log p(value | context) in nats, of shape (*sample, *batch)."""
        own = batch_shape_of(self.flow, value)
        try:
            shape = torch.broadcast_shapes(own, self.batch_shape)
        except RuntimeError:
            raise InvalidValueError(
                f"points of the batch shape {own} do not broadcast to the batch shape {tuple(self.batch_shape)} of the "
                "contexts; their last batch dimensions must be equal or 1"
            ) from None
        return self.flow.log_prob(value.expand(*shape, *self.event_shape), self.context)

    @checked
    def rsample(self, sample_shape: int | Sequence[int] = torch.Size()) -> Tensor:
        """Draw (*sample, *batch, *event), differentiable in the flow's parameters and the context."""
        if self.context is None:
            return self.flow.sample((*as_shape("sample_shape", sample_shape, at_least=0), *self.batch_shape))
        return self.flow.sample(sample_shape, self.context)

    @checked
    def rsample_and_log_prob(self, sample_shape: int | Sequence[int] = torch.Size()) -> tuple[Tensor, Tensor]:
        """Draw together with the log-density of each draw, in one solve."""
        if self.context is None:
            shape = as_shape("sample_shape", sample_shape, at_least=0)
            return self.flow.sample_and_log_prob((*shape, *self.batch_shape))
        return self.flow.sample_and_log_prob(sample_shape, self.context)

    @checked
    def expand(self, batch_shape: int | Sequence[int], _instance: object = None) -> FlowDistribution:
        """The same distribution with a larger batch shape."""
        shape, context = as_shape("batch_shape", batch_shape, at_least=0), self.context
        if context is not None:
            own = context.shape[len(self.batch_shape) :]
            try:
                context = context.expand(*shape, *own)
            except RuntimeError:
                raise InvalidValueError(
                    f"the batch shape {tuple(self.batch_shape)} does not broadcast to {shape}; add dimensions "
                    "in front, or enlarge those of size 1"
                ) from None
        return FlowDistribution(self.flow, context, shape)
