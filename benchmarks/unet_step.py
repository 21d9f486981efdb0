"""Flow-matching steps of a U-Net beside torchcfm's U-Net of the same size."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from flows.compare.timing import alternating_medians
from flows.errors import MissingPackageError
from flows.fields import UNet

SHAPE = (1, 28, 28)


def add_command(benchmarks: Any) -> None:
    """Add `unet` to the commands."""
    description = "Flow-matching steps of UNet beside torchcfm's U-Net of the same size, on images of 28 × 28 pixels."
    part = benchmarks.add_parser("unet", help=description, description=description)
    part.add_argument("--batch", type=int, default=64, help="images (%(default)s)")
    part.add_argument("--seconds", type=float, default=5.0, help="at least, for each case (%(default)s)")
    part.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print parameters and CPU times of both."""
    torch.manual_seed(0)
    networks = {
        "torchcfm": other_unet()(dim=SHAPE, num_channels=32, num_res_blocks=1),
        "flows": UNet(SHAPE, channels=32, num_blocks=2),
    }
    steps = {name: training_step(network, arguments.batch) for name, network in networks.items()}
    seconds = alternating_medians(steps, arguments.seconds, clock=time.process_time)
    for name, network in networks.items():
        number = sum(parameter.numel() for parameter in network.parameters())
        ratio = seconds[name] / seconds["torchcfm"]
        print(f"{name:10} {number:10,} parameters {1e3 * seconds[name]:8.0f} ms a step  ratio {ratio:.2f}")


def training_step(network: nn.Module, batch: int) -> Callable[[], None]:
    """Return a step of Adam on the velocities of one fixed batch."""
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    x, t, target = torch.randn(batch, *SHAPE), torch.rand(batch), torch.randn(batch, *SHAPE)

    def step() -> None:
        loss = (network(t, x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def other_unet() -> Callable[..., nn.Module]:
    """torchcfm's class; raises `MissingPackageError` if torchcfm is missing."""
    try:
        from torchcfm.models.unet import UNetModel  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            "the other U-Net is torchcfm's, which is not installed: pip install torchcfm"
        ) from error
    return UNetModel
