"""The processes of a run: no more than the machine carries, none by accident, and none that outlives its parent."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import torch

from flows.errors import InvalidValueError

STEP = "SLURM_STEP_NUM_TASKS"
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
    if number > has:
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
    started = _started("WORLD_SIZE") if "RANK" in os.environ else 1
    by, alone = f"WORLD_SIZE={started}, as torchrun sets it", "start the program without torchrun"
    if started == 1 and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        started = _started(STEP)  # a batch script is one process, whatever its SLURM_NTASKS
        by, alone = f"{STEP}={started}, as srun sets it", "ask srun for one task, --ntasks=1"
    if started > 1 and number is not None and number != started:
        raise InvalidValueError(
            f"{started} processes were started ({by}), and hardware.devices={number}: each of them would train the "
            f"same run. Either {alone}, or let them train together with hardware.devices={started}"
        )


def _started(variable: str) -> int:
    given = os.environ.get(variable, "1")
    if not given.strip().isdecimal():
        raise InvalidValueError(f"the environment variable {variable} must be a whole number, got {given!r}; unset it")
    return int(given)
