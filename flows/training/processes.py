"""The processes of a run: no more than the machine carries, none by accident, and none that outlives its parent."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from flows.errors import InvalidValueError

STEP = "SLURM_STEP_NUM_TASKS"
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")  # of Open MPI, MPICH and its like, MVAPICH
CROWDED = 4  # processes on a core; more are a mistake
LOG = logging.getLogger("flows")
PARENT = "FLOWS_PARENT"  # the number of the process that has started this one to train with it


def check_processes(accelerator: Any, devices: Any) -> None:
    """Compare what a run asks for with the machine, and with what was started by others.

    Raises:
        InvalidValueError: the machine has fewer devices, or several processes would each train the whole run.
    """
    number = _number(devices)
    _check_launcher(number)
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
    if not gpu and has < number <= CROWDED * has:  # slow, but some test on few cores what is to run on many
        LOG.warning("%d processes share the %d cores of this machine", number, has)
    elif number > has:
        advice = f"choose hardware.devices={has} or fewer" if has else "choose hardware.accelerator=cpu"
        raise InvalidValueError(
            f"devices={devices} asks for {number:,} {kind}s, one for each process, and this machine has {has}; {advice}"
        )


def in_batch_script() -> bool:
    """Whether this is a process of Slurm's that srun has not started, of which there is one only."""
    return "SLURM_NTASKS" in os.environ and STEP not in os.environ and "RANK" not in os.environ


def launch(fabric: Any) -> None:
    """Start the processes of the other devices, which end with this one however it ends."""
    if PARENT in os.environ:
        _end_with(int(os.environ.pop(PARENT)))
        fabric.launch()
        return
    os.environ[PARENT] = str(os.getpid())
    try:
        fabric.launch()
    finally:
        os.environ.pop(PARENT, None)


def _end_with(parent: int) -> None:
    """End this process soon after its parent, for which it would wait in vain."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))

    if os.getppid() == parent or os.getppid() == 1:  # anyone else has inherited the variable by accident
        threading.Thread(target=watch, name="end with the parent", daemon=True).start()


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
