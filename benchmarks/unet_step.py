"""Flow-matching steps of a U-Net beside torchcfm's and diffusers' U-Nets of the same size."""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from flows.compare.timing import alternating_medians
from flows.errors import MissingPackageError
from flows.fields import UNet
from flows.fields.unet import _Attention, _pixel_norm

SHAPE = (1, 28, 28)


def add_command(benchmarks: Any) -> None:
    """Add `unet` to the commands."""
    description = "Flow-matching steps of UNet beside other U-Nets of the same size, on images of 28 × 28 pixels."
    part = benchmarks.add_parser("unet", help=description, description=description)
    part.add_argument("--others", nargs="*", choices=OTHERS, default=["torchcfm"], help="default: torchcfm")
    part.add_argument("--variants", nargs="*", choices=VARIANTS, default=[], help="of our step; default: none")
    part.add_argument("--batch", type=int, default=64, help="images (%(default)s)")
    part.add_argument("--seconds", type=float, default=5.0, help="at least, for each case (%(default)s)")
    part.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print parameters and CPU times of all, and the ratio of our step to each."""
    torch.manual_seed(0)
    networks = {name: OTHERS[name]() for name in arguments.others}
    networks["flows"] = UNet(SHAPE, channels=32, num_blocks=2)
    steps = {name: training_step(network, arguments.batch) for name, network in networks.items()}
    for name in arguments.variants:
        networks[f"flows, {name}"] = copy.deepcopy(networks["flows"])
        steps[f"flows, {name}"] = VARIANTS[name](networks[f"flows, {name}"], arguments.batch)
    seconds = alternating_medians(steps, arguments.seconds, clock=time.process_time)
    for name, network in networks.items():
        number = sum(parameter.numel() for parameter in network.parameters())
        ratio = seconds["flows"] / seconds[name]
        print(f"{name:24} {number:10,} parameters {1e3 * seconds[name]:8.0f} ms a step  flows / this {ratio:.2f}")


def training_step(
    network: nn.Module, batch: int, precision: torch.dtype | None = None, compiled: bool = False
) -> Callable[[], None]:
    """Return a step of Adam on the velocities of one fixed batch."""
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    x, t, target = torch.randn(batch, *SHAPE), torch.rand(batch), torch.randn(batch, *SHAPE)
    velocity = torch.compile(network) if compiled else network

    def step() -> None:
        with torch.autocast("cpu", precision, enabled=precision is not None):
            loss = (velocity(t, x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for _ in range(2 if compiled else 0):  # compilation is not part of a step
        step()
    return step


def channels_last_step(network: nn.Module, batch: int) -> Callable[[], None]:
    """A step in the memory format of channels last."""
    return training_step(network.to(memory_format=torch.channels_last), batch)  # pyright: ignore[reportCallIssue]


def fused_attention_step(network: nn.Module, batch: int) -> Callable[[], None]:
    """A step with torch's fused attention, which has no second derivatives, in place of plain products."""
    for module in network.modules():
        if isinstance(module, _Attention):
            module.forward = _Fused(module)  # type: ignore[method-assign]
    return training_step(network, batch)


class _Fused:
    def __init__(self, attention: _Attention) -> None:
        self.attention = attention

    def __call__(self, h: Tensor) -> Tensor:
        own = self.attention
        parts = own.into(_pixel_norm(h)).flatten(2).unflatten(1, (3, own.num_heads, -1))
        queries, keys, values = (part.mT for part in parts.unbind(1))
        found = functional.scaled_dot_product_attention(queries, keys, values)
        return own.out(found.mT.flatten(1, 2).view_as(h))


def torchcfm_unet() -> nn.Module:
    """torchcfm's network; raises `MissingPackageError` if torchcfm is missing."""
    try:
        from torchcfm.models.unet import UNetModel  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            "the other U-Net is torchcfm's, which is not installed: pip install torchcfm"
        ) from error
    return UNetModel(dim=SHAPE, num_channels=32, num_res_blocks=1)


class DiffusersUNet(nn.Module):
    """diffusers' network, called as a field is.

    Raises:
        MissingPackageError: diffusers is missing.
    """

    def __init__(self) -> None:
        super().__init__()
        try:
            from diffusers.models import UNet2DModel  # pyright: ignore[reportMissingImports]
        except ModuleNotFoundError as error:
            raise MissingPackageError(
                "the other U-Net is that of diffusers, which is not installed: pip install diffusers"
            ) from error
        self.network = UNet2DModel(
            sample_size=SHAPE[-1],
            in_channels=1,
            out_channels=1,
            block_out_channels=(32, 64, 64),
            layers_per_block=1,
            norm_num_groups=8,
            down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        )

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.network(x, 1000 * t).sample


OTHERS: dict[str, Callable[[], nn.Module]] = {"torchcfm": torchcfm_unet, "diffusers": DiffusersUNet}
VARIANTS: dict[str, Callable[[nn.Module, int], Callable[[], None]]] = {
    "bf16": lambda network, batch: training_step(network, batch, torch.bfloat16),
    "compiled": lambda network, batch: training_step(network, batch, compiled=True),
    "channels last": channels_last_step,
    "fused attention": fused_attention_step,
}
