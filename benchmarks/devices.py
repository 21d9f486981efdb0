"""The device of a benchmark: its option on the command line, and its name."""

from __future__ import annotations

import argparse

import torch


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the option `--device`; by default a GPU where there is one."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=_device, default=default, help="cpu, cuda, cuda:1, ... (%(default)s)")


def _device(name: str) -> str:
    try:
        device = torch.empty(0, device=name).device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # the one that is waited for
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch built without that kind
        raise argparse.ArgumentTypeError(f"{name!r} is no device of this machine ({error})") from error
    return name


def machine(device: str) -> str:
    """The hardware of a measurement, in words."""
    threads = torch.get_num_threads()
    where = "1 thread" if threads == 1 else f"{threads} threads"
    if torch.device(device).type == "cuda":
        where = torch.cuda.get_device_name(device)
    return f"{where}, torch {torch.__version__}"
