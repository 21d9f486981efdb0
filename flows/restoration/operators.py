"""What an observation shows of a point: y = A x + noise."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flows.arguments import CheckedMethods, checked
from flows.checks import whole_number
from flows.errors import InvalidTypeError, InvalidValueError


class Operator(CheckedMethods, nn.Module, ABC, checks=("observed_shape",)):
    """A differentiable map A from points to what is observed of them.

    To add one, subclass it and implement `forward` and `observed_shape`.

    Attributes:
        averaged: how many entries of a point an observed entry is the mean of; their dequantisation noise averages out.

    Example:
        ```python
        import torch

        from flows.restoration import Operator


        class Total(Operator):
            '''The sum of all entries.'''

            def observed_shape(self, event_shape):
                return (1,)

            def forward(self, x):
                return x.flatten(1).sum(1, keepdim=True)


        Total()(torch.ones(5, 2, 3))  # (5, 1)
        ```
    """

    averaged: int = 1

    @abstractmethod
    def observed_shape(self, event_shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of one observation of a point; an error if there can be none."""

    @abstractmethod
    def forward(
        self,
        x: Tensor,  # (B, *event), data space
    ) -> Tensor:  # (B, *observed)
        """What is observed of each point, without noise."""


@checked
class Denoising(Operator):
    """The whole point is observed, with noise.

    Example:
        ```python
        import torch

        from flows.restoration import Denoising

        x = torch.randn(5, 2)
        assert Denoising()(x).equal(x)
        ```
    """

    def observed_shape(self, event_shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(event_shape)

    def forward(self, x: Tensor) -> Tensor:
        return x


@checked
class Inpainting(Operator):
    """Some entries are observed, the others are missing.

    Args:
        known: which entries of a point are observed, (*event), true or false.

    Raises:
        InvalidTypeError: it does not hold true and false.
        InvalidValueError: no entry is observed.

    Example:
        ```python
        import torch

        from flows.restoration import Inpainting

        upper = torch.zeros(1, 8, 8, dtype=torch.bool)
        upper[:, :4] = True
        Inpainting(upper)(torch.randn(5, 1, 8, 8))  # (5, 32): the entries of the upper half, in reading order
        ```
    """

    known: Tensor

    def __init__(self, known: Tensor) -> None:
        super().__init__()
        if known.dtype != torch.bool:
            raise InvalidTypeError(f"known must hold true and false, got a tensor of {known.dtype}; write known.bool()")
        if not known.any():
            raise InvalidValueError("known says that no entry is observed; to draw without an observation, use sample")
        self.register_buffer("known", known.clone())

    def observed_shape(self, event_shape: Sequence[int]) -> tuple[int, ...]:
        if tuple(self.known.shape) != tuple(event_shape):
            raise InvalidValueError(
                f"known has the shape {tuple(self.known.shape)}, and the points of the flow have {tuple(event_shape)}"
            )
        return (int(self.known.sum()),)

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.known]


@checked
class Downsampling(Operator):
    """Images are observed at a lower resolution: the mean of each block of pixels.

    Args:
        factor: pixels along each side of a block.

    Raises:
        InvalidTypeError, InvalidValueError: it is no whole number from 2 on.

    Example:
        ```python
        import torch

        from flows.restoration import Downsampling

        Downsampling(2)(torch.randn(5, 1, 8, 8))  # (5, 1, 4, 4)
        ```
    """

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = whole_number("factor", factor, 2)
        self.averaged = factor**2

    def observed_shape(self, event_shape: Sequence[int]) -> tuple[int, ...]:
        if len(event_shape) != 3 or any(side % self.factor for side in event_shape[1:]):
            raise InvalidValueError(
                f"factor={self.factor} needs images (channels, height, width) whose sides are multiples of it, got "
                f"points of shape {tuple(event_shape)}"
            )
        return (event_shape[0], *(side // self.factor for side in event_shape[1:]))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(x, self.factor)
