"""How many processes a run takes: no more than the machine carries, and none by accident."""

from __future__ import annotations

import importlib.util
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from flows.errors import InvalidValueError

STEP = "SLURM_STEP_NUM_TASKS"
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")  # of Open MPI, MPICH and its like, MVAPICH


def check_processes(accelerator: Any, devices: Any) -> None:
    """Compare what a run asks for with the machine, and with what was started by others.

    Raises:
        InvalidValueError: the machine has fewer devices, or several processes would each train the whole run.
    """
    number, started = _number(devices), started_together()
    if started is None:
        _check_launcher(number)
    elif devices not in (1, "1", "auto", started.here):
        raise InvalidValueError(
            f"torchrun has started {started.here} processes on this machine, and hardware.devices={devices}; leave out "
            f"hardware.devices, or start torchrun with --nproc_per_node={devices}"
        )
    else:
        number = devices = started.here
    gpu = accelerator in ("cuda", "gpu") or (accelerator == "auto" and torch.cuda.is_available())
    if accelerator == "cpu" or (accelerator == "auto" and not gpu and devices != "auto"):
        which = not isinstance(devices, int | str) or (isinstance(devices, str) and "," in devices)
        if number is None or which:
            raise InvalidValueError(
                f"hardware.devices must be the number of processes on a CPU, 1 or more, got {devices!r}; which "
                "ones can be chosen among GPUs alone"
            )
    if number is None or not (gpu or accelerator in ("auto", "cpu")):
        return
    has, kind = (torch.cuda.device_count(), "GPU") if gpu else (os.cpu_count() or 1, "processor core")
    if number > has:
        fewer = f"choose hardware.devices={has} or fewer" if started is None else f"use --nproc_per_node={has} or fewer"
        advice = fewer if has else "choose hardware.accelerator=cpu"
        raise InvalidValueError(
            f"devices={devices} asks for {number:,} {kind}s, one for each process, and this machine has {has}; {advice}"
        )


def in_batch_script() -> bool:
    """Whether this is a process of Slurm's that srun has not started, of which there is one only."""
    return "SLURM_NTASKS" in os.environ and STEP not in os.environ and "RANK" not in os.environ


@dataclass(frozen=True)
class Together:
    """The processes that torchrun has started for one run."""

    here: int  # on this machine
    machines: int


def started_together() -> Together | None:
    """The processes that torchrun has started, this one among them; None: it has started none."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or "MASTER_ADDR" not in os.environ:
        return None
    number, here = _started("WORLD_SIZE"), _started("LOCAL_WORLD_SIZE")
    return Together(here, max(1, number // here))


def is_first() -> bool:
    """Whether this is the first, or the only one, of the processes of a run, as far as its environment says."""
    return all(os.environ.get(name, "0").strip() in ("", "0") for name in ("RANK", "LOCAL_RANK"))


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _number(devices: Any) -> int | None:
    """How many devices are asked for, as far as that can be read."""
    if isinstance(devices, str):
        words = [word for word in devices.split(",") if word.strip()]
        if len(words) > 1 or devices.rstrip().endswith(","):
            return len(words)
        return int(devices) if devices.strip().isdecimal() else None
    if isinstance(devices, int):
        return devices if devices > 0 else None
    return len(devices)


def _check_launcher(number: int | None) -> None:
    """Refuse several processes of another program that would each train the whole run.

    Args:
        number: of devices asked for; None: not known.
    """
    for launcher in _launchers():
        if launcher.started > 1:
            if launcher.joins and number in (None, launcher.started):
                return
            advice = (
                f"{launcher.alone}, or let them train together with hardware.devices={launcher.started}"
                if launcher.joins
                else f"{launcher.alone}, which starts its own with hardware.devices={launcher.started}, or install "
                "mpi4py, by which they find each other"
            )
            raise InvalidValueError(
                f"{launcher.started} processes were started ({launcher.shown}), and hardware.devices={number}: each of "
                f"them would train the same run. Either {advice}"
            )


@dataclass(frozen=True)
class _Launcher:
    """Another program that may have started this process among others."""

    started: int
    shown: str  # what says so
    alone: str  # how to start one process
    joins: bool = True  # Fabric can make the processes train together


def _launchers() -> Iterator[_Launcher]:
    started = _started("WORLD_SIZE") if "RANK" in os.environ else 1
    yield _Launcher(started, f"WORLD_SIZE={started}, as torchrun sets it", "start the program without torchrun")
    if started > 1:
        return  # perhaps on several machines by another launcher
    if os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        started = _started(STEP)  # a batch script is one process, whatever its SLURM_NTASKS
        yield _Launcher(started, f"{STEP}={started}, as srun sets it", "ask srun for one task, --ntasks=1")
    for variable in MPI_SIZES:
        started = _started(variable)
        joins = importlib.util.find_spec("mpi4py") is not None
        yield _Launcher(started, f"{variable}={started}, as mpirun sets it", "start the program without mpirun", joins)


def _started(variable: str) -> int:
    given = os.environ.get(variable, "1")
    if not given.strip().isdecimal():
        raise InvalidValueError(f"the environment variable {variable} must be a whole number, got {given!r}; unset it")
    return int(given)
