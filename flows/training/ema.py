"""The moving average of the weights that is validated, tested and sampled from."""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from flows.errors import InvalidValueError


class ExponentialMovingAverage(AveragedModel):
    """Keeps average <- d average + (1 - d) weights, with d = min(decay, (1 + n) / (10 + n)) at update n.

    The rising d lets the average forget its start, so that it also follows a stage of a hundred steps; the
    first update copies the weights.

    Args:
        model: the module to average; it is copied.
        decay: the largest d, from 0 (no averaging) to 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise InvalidValueError(f"ema_decay must lie in [0, 1), got {decay}; 0 turns the averaging off")
        super().__init__(model, multi_avg_fn=self._average)
        self.decay = decay
        self.requires_grad_(False)

    def _average(self, averaged: list[Tensor], current: list[Tensor], num_averaged: Tensor) -> None:
        n = int(self.n_averaged)  # on the CPU, unlike the argument: reading it does not wait for the GPU
        decay = min(self.decay, (1 + n) / (10 + n))
        get_ema_multi_avg_fn(decay)(averaged, current, num_averaged)

    def restart(self) -> None:
        """Let the next update copy the weights, as at the start of a run."""
        self.n_averaged.zero_()
