"""The noise of `Probing` beside that of `Hutchinson`, on a convolutional field trained on digits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional

from benchmarks.time_budget import train
from flows.datasets import Density
from flows.divergence import DivergenceEstimator, Exact, Hutchinson, Probing
from flows.fields import ConvNet
from flows.models.cnf import CNF
from flows.objectives import FlowMatching
from flows.progress import new_bar
from flows.training import Stage

SHAPE = (1, 8, 8)


@dataclass(frozen=True)
class Noise:
    """Standard deviations of both estimators with equally many products, as root mean squares over points."""

    t: float | None  # None: all times together
    products: int
    hutchinson: float
    probing: float


class NoisyDigits(Density):
    """Digits of size × size pixels with noise, scaled to about unit variance."""

    name = "noisy_digits"

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        levels = torch.as_tensor(load_digits().images, dtype=torch.get_default_dtype()).view(-1, *SHAPE)
        if size != SHAPE[1]:
            levels = functional.interpolate(levels, (size, size), mode="bilinear")
        self.event_shape = (1, size, size)
        self.digits = ((levels + torch.rand(levels.shape, generator=generator)) / 17 - 0.5) * 4

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return self.digits[torch.randint(len(self.digits), (n,), generator=generator)]


def trained_on_digits(
    steps: int = 500,
    device: torch.device | str = "cpu",
    progress: bool = True,
    size: int = 8,
    batch_size: int = 256,
) -> tuple[CNF, Tensor]:
    """Train a flow with four 3 × 3 convolutions on digits of size × size pixels, by flow matching.

    The digits have 8 × 8 pixels and are interpolated to other sizes.

    Returns:
        The flow and the digits in flow space.
    """
    torch.manual_seed(0)
    dataset = NoisyDigits(size)
    flow = CNF(ConvNet(dataset.event_shape, (32, 32, 32)), Exact()).to(device)
    stage = Stage(FlowMatching(), steps, batch_size=batch_size, learning_rate=3e-3)
    train(flow, dataset, {"flow_matching": stage}, ema_decay=0.0, progress=progress)
    return flow, dataset.digits.to(device)


@torch.no_grad()
def measure_noise(
    flow: CNF,
    data: Tensor,  # (n, C, H, W), flow space
    strides: Sequence[int] = (2, 3, 4),
    times: Sequence[float] = (0.2, 0.4, 0.6, 0.8, 0.95),
    draws: int = 30,
    progress: bool = True,
) -> list[Noise]:
    """Errors of the divergence over `draws` draws of the probes, at points of the interpolation path."""
    field = flow.bind()
    probing = [Probing(stride).bind(field) for stride in strides]
    pairs = [(Hutchinson(estimator.cost).bind(field), estimator) for estimator in probing]
    variances: dict[int, list[tuple[float, float]]] = {pair[0].num_probes: [] for pair in pairs}
    results = []
    for time in new_bar(times, desc="measuring noise", leave=False, disable=not progress):
        x = torch.lerp(torch.randn_like(data), data, time)
        t = torch.tensor(time, dtype=x.dtype, device=x.device)
        exact = Exact().bind(field)(t, x).divergence
        for pair in pairs:
            variance = tuple(_variance(estimator, t, x, exact, draws) for estimator in pair)
            variances[pair[0].num_probes].append(variance)
            results.append(Noise(time, pair[0].num_probes, *(math.sqrt(value) for value in variance)))
    for products, values in variances.items():
        means = (math.sqrt(sum(column) / len(column)) for column in zip(*values, strict=True))
        results.append(Noise(None, products, *means))
    return results


def table(results: Sequence[Noise]) -> Iterator[str]:
    """One line per time and number of products."""
    yield f"{'t':>6}{'products':>10}{'Hutchinson sd':>15}{'Probing sd':>12}{'ratio':>8}"
    for row in results:
        time = "all" if row.t is None else f"{row.t:.2f}"
        ratio = row.hutchinson / row.probing
        yield f"{time:>6}{row.products:10}{row.hutchinson:15.3f}{row.probing:12.3f}{ratio:8.1f}"


def _variance(estimator: DivergenceEstimator, t: Tensor, x: Tensor, exact: Tensor, draws: int) -> float:
    """Mean square error over points and draws."""
    total = 0.0
    for _ in range(draws):
        sample = estimator(t, x, estimator.draw_probes(x))
        total += (sample.divergence - exact).square().mean().item()
    return total / draws
