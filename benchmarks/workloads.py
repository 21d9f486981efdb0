"""The fields whose divergence is timed, each with the estimators that suit it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from flows.divergence import (
    Analytic,
    Bottleneck,
    DivergenceEstimator,
    Exact,
    Hutchinson,
    HutchPlusPlus,
    Probing,
    XTrace,
)
from flows.fields import MLP, ConvNet, EquivariantKernel, Hollow, PeriodicConv, Planar, Potential

HIDDEN_WIDTHS = {2: 64, 64: 256, 512: 1024}  # by dimension, of both hidden layers
MAX_EXACT_DIMENSION = 128  # above it, exact divergences by products take minutes


@dataclass(frozen=True)
class Workload:
    """A field with the estimators to time on it."""

    title: str
    event_shape: tuple[int, ...]
    build: Callable[[tuple[int, ...]], nn.Module]
    estimators: Mapping[str, DivergenceEstimator]
    batches: tuple[int, int] = (1024, 256)  # of the forward pass alone, and of forward and backward
    loop: bool = False  # also time a plain loop over the coordinates


def perceptron(dimension: int) -> Workload:
    """A perceptron with two hidden layers, the usual field for points."""
    width = HIDDEN_WIDTHS.get(dimension, 2 * dimension)
    estimators = {
        "Analytic": Analytic(),
        "Hutchinson, reverse": Hutchinson(),
        "Hutchinson, forward": Hutchinson(mode="forward"),
    }
    if dimension <= MAX_EXACT_DIMENSION:
        estimators["Exact, reverse"] = Exact()
    if 16 < dimension <= MAX_EXACT_DIMENSION:
        estimators["Exact, forward, chunks"] = Exact("forward", chunk_size=16)
    if dimension > 16:
        estimators |= {
            "Hutchinson, 12 orthonormal": Hutchinson(12, "orthonormal"),
            "Hutch++": HutchPlusPlus(12),
            "XTrace": XTrace(12),
        }
    return Workload(
        f"MLP, d = {dimension}, two hidden layers of {width}",
        (dimension,),
        lambda shape: MLP(shape, (width, width), "tanh"),
        estimators,
        loop=True,
    )


def bottleneck() -> Workload:
    """A field through a layer narrower than the space."""
    return Workload(
        "MLP, d = 512, hidden layers of 512, 16 and 512",
        (512,),
        lambda shape: MLP(shape, (512, 16, 512), "tanh"),
        {
            "Analytic": Analytic(),
            "Bottleneck": Bottleneck(),
            "Bottleneck, exact": Bottleneck(exact=True),
            "Hutchinson, reverse": Hutchinson(),
        },
        (256, 128),
    )


def structured() -> list[Workload]:
    """Fields whose structure makes the divergence cheap and exact."""
    kinds: list[tuple[str, tuple[int, ...], Callable[[tuple[int, ...]], nn.Module], tuple[int, int]]] = [
        ("Hollow, d = 64", (64,), Hollow, (256, 128)),
        ("Hollow, d = 784", (784,), Hollow, (128, 32)),
        ("Potential, d = 64, two layers of 128", (64,), Potential, (256, 128)),
        ("Planar, d = 64, 64 units", (64,), Planar, (1024, 256)),
        ("EquivariantKernel, 13 particles in space", (13, 3), EquivariantKernel, (256, 128)),
        ("PeriodicConv, 32 × 32 sites", (1, 32, 32), PeriodicConv, (64, 32)),
    ]
    estimators = {"Analytic": Analytic(), "Hutchinson, reverse": Hutchinson()}
    return [Workload(title, shape, kind, estimators, batches) for title, shape, kind, batches in kinds]


def convolutional() -> list[Workload]:
    """Four 3 × 3 convolutions, whose Jacobian is local."""
    estimators = {
        "Probing, stride 5": Probing(5),
        "Probing, stride 3": Probing(3),
        "Hutchinson, reverse": Hutchinson(),
        "Hutchinson, 9 probes": Hutchinson(9),
    }
    return [
        Workload(
            f"ConvNet, {' × '.join(map(str, shape))}, four 3 × 3 convolutions of 32 channels",
            shape,
            lambda shape: ConvNet(shape, (32, 32, 32)),
            estimators,
            (32, 8),
        )
        for shape in ((1, 28, 28), (3, 32, 32))
    ]
