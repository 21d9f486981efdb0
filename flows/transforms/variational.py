"""Learned dequantisation noise: a small flow, conditional on the image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from flows.arguments import checked
from flows.checks import as_shape, whole_number
from flows.errors import InvalidValueError
from flows.transforms.dequantise import DequantisationNoise, checked_levels, uniform_like


@checked
class VariationalNoise(DequantisationNoise):
    """Noise from a small coupling flow that is conditional on the image.

    u = sigmoid(z_n) with logistic z_0. Layer l keeps half of the pixels and maps the others to
    z_l = exp(s_l) z_{l−1} + t_l. The two halves of a chequerboard alternate. s_l and t_l are convolutional networks of
    the image x and of z_{l−1} at the kept pixels. With g(z) = log sigmoid′(z), summed over the entries,

        log q(u | x) = g(z_0) − g(z_n) − Σ_l Σ s_l.

    All networks start at zero, so q starts as uniform noise. Likelihood training fits it, which tightens the bound;
    flow matching does not train it. [Ho et al. 2019, arXiv:1902.00275]

    Args:
        event_shape: (C, H, W).
        num_levels: number of levels of the images.
        hidden: channels of the hidden layers.
        num_layers: number of layers.

    Raises:
        InvalidTypeError, InvalidValueError: the data are no images, or a setting is no number or out of range.

    Example:
        ```python
        from flows.transforms import Dequantise, VariationalNoise

        noise = VariationalNoise((1, 8, 8), num_levels=17, hidden=8)
        dequantise = Dequantise(num_levels=17, noise=noise)  # trained with the flow
        ```
    """

    _kept: Tensor

    def __init__(
        self, event_shape: int | Sequence[int], num_levels: int, hidden: int = 32, num_layers: int = 4
    ) -> None:
        super().__init__()
        event_shape = as_shape("event_shape", event_shape)
        if len(event_shape) != 3:
            raise InvalidValueError(
                f"variational noise needs images of shape (channels, height, width), got {event_shape}; for "
                "other data use UniformNoise()"
            )
        whole_number("hidden", hidden)
        whole_number("num_layers", num_layers, at_most=1000)
        self.num_levels = checked_levels(num_levels)
        indices = torch.meshgrid(*[torch.arange(size) for size in event_shape], indexing="ij")
        parity = torch.stack(indices).sum(0) % 2
        self.register_buffer("_kept", parity.to(torch.get_default_dtype()), persistent=False)
        self.networks = nn.ModuleList(_network(event_shape[0], hidden) for _ in range(num_layers))

    def sample(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        limits = torch.finfo(x.dtype)
        rank = uniform_like(x, generator).clamp(limits.tiny, 1 - limits.eps)
        z = rank.logit()
        log_q = _log_slope(z)
        for index in range(len(self.networks)):
            log_scale, shift = self._coefficients(index, z, x)
            z = torch.addcmul(shift, z, log_scale.exp())
            log_q = log_q - log_scale.flatten(1).sum(1)
        return z.sigmoid(), log_q - _log_slope(z)

    def log_prob(self, u: Tensor, x: Tensor) -> Tensor:
        limits = torch.finfo(u.dtype)
        z = u.clamp(limits.tiny, 1 - limits.eps).logit()
        log_q = -_log_slope(z)
        for index in reversed(range(len(self.networks))):
            log_scale, shift = self._coefficients(index, z, x)
            z = (z - shift) * (-log_scale).exp()
            log_q = log_q - log_scale.flatten(1).sum(1)
        return log_q + _log_slope(z)

    def _coefficients(self, index: int, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return s and t. Both depend on the kept pixels alone, and are zero there."""
        kept = self._kept if index % 2 else 1 - self._kept
        image = 2 * x / (self.num_levels - 1) - 1
        found = self.networks[index](torch.cat([z * kept, image], dim=1)).to(z)  # autocast may return a lower precision
        log_scale, shift = found.chunk(2, dim=1)
        return 2 * (log_scale / 2).tanh() * (1 - kept), shift * (1 - kept)


def _network(channels: int, hidden: int) -> nn.Sequential:
    last = nn.Conv2d(hidden, 2 * channels, 3, padding=1)
    nn.init.zeros_(last.weight)
    assert last.bias is not None
    nn.init.zeros_(last.bias)
    return nn.Sequential(
        nn.Conv2d(2 * channels, hidden, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(hidden, hidden, 3, padding=1),
        nn.SiLU(),
        last,
    )


def _log_slope(z: Tensor) -> Tensor:  # (B,)
    """Return log sigmoid′(z), the logistic log-density, summed over the entries."""
    return (functional.logsigmoid(z) + functional.logsigmoid(-z)).flatten(1).sum(1)
