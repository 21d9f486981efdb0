"""Runs jobs in processes of their own that need not import anything: each is a fork of this one.

It reads one job a line, `{"kind": ..., "folder": ..., "harm": {...}}`, and answers with how its process ended. What a
job prints goes to `<folder>.log`, what it does to files to `<folder>.ops`.
"""

import ctypes
import json
import os
import resource
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import kinds

from flows.cli.errors import explain
from flows.training import TrainingInterrupted


class Disk:
    """Counts what a process does to files under a folder, and kills the process in the middle of one of these."""

    def __init__(self, folder, kill_at=None, error_at=None, error=None, only=""):
        self.folder, self.kill_at, self.error_at, self.error, self.only = folder, kill_at, error_at, error, only
        self.log = open(f"{folder}.ops", "a")  # noqa: SIM115
        self.count = 0

    def touch(self, what, path, half=lambda: None):
        if not str(path).startswith(self.folder):
            return
        self.log.write(f"{what} {os.path.relpath(path, self.folder)}\n")
        self.log.flush()
        self.count += 1
        if self.kill_at == self.count:
            half()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.error_at is not None and self.count >= self.error_at and self.only in f"{what} {path}":
            half()
            raise OSError(self.error, os.strerror(self.error), str(path))

    def install(self):
        disk, path_open, unlink, mkdir = self, Path.open, Path.unlink, Path.mkdir
        fsync, replace, truncate = os.fsync, os.replace, os.truncate
        names = {}

        class Written:
            def __init__(self, file, path):
                self.file, self.path, self.writes = file, path, 0
                names[file.fileno()] = path

            def write(self, data):
                def half():
                    self.file.write(bytes(data)[: len(data) // 2])
                    self.file.flush()

                self.writes += 1
                if self.writes & (self.writes - 1) == 0:  # the 1st, 2nd, 4th ...: a checkpoint takes hundreds
                    disk.touch("write", self.path, half)
                return self.file.write(data)

            def __enter__(self):
                self.file.__enter__()
                return self

            def __exit__(self, *exception):
                return self.file.__exit__(*exception)

            def __getattr__(self, name):
                return getattr(self.file, name)

        def open_(path, mode="r", *args, **settings):
            if not set(mode) & set("wa"):
                return path_open(path, mode, *args, **settings)
            disk.touch("open", path)
            return Written(path_open(path, mode, *args, **settings), path)

        def renamed(old, new):
            disk.touch("rename", new)
            replace(old, new)
            disk.touch("renamed", new)

        def flushed(number):
            disk.touch("fsync", names.get(number, ""))
            fsync(number)

        def truncated(path, size):
            disk.touch("truncate", path)
            truncate(path, size)

        def unlinked(path, *args, **settings):
            disk.touch("unlink", path)
            unlink(path, *args, **settings)

        def made(path, *args, **settings):
            disk.touch("mkdir", path)
            mkdir(path, *args, **settings)

        Path.open, Path.unlink, Path.mkdir = open_, unlinked, made
        os.fsync, os.replace, os.truncate = flushed, renamed, truncated


def at_phase(trainer, phase, action):
    """Call `action` when the trainer comes to a phase."""

    def before(owner, name, number=1):
        function, calls = getattr(owner, name), []

        def wrapped(*args, **settings):
            calls.append(1)
            if len(calls) == number:
                action()
            return function(*args, **settings)

        object.__setattr__(owner, name, wrapped)

    if phase == "step":
        stream = trainer.dataset.train_stream

        def new_stream(*args, **settings):
            made = stream(*args, **settings)
            before(made, "next", 4)
            return made

        trainer.dataset.train_stream = new_stream
    elif phase == "start":
        before(trainer, "_new_state")
    elif phase == "saving":
        import flows.training.callbacks as callbacks

        before(callbacks, "save_checkpoint", 3)
    else:
        owner, name, number = {
            "validation": (trainer.evaluator, "validate", 1),
            "test": (trainer.evaluator, "test", 1),
            "pictures": (trainer.evaluator, "pictures", 1),
        }[phase]
        before(owner, name, number)


def signals_to_self(numbers, apart):
    def send():
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(apart)

    return send


def out_of_memory():
    import torch

    torch.empty(2**50)


def remove_folder(folder):
    import shutil

    return lambda: shutil.rmtree(folder)


def job(kind, folder, harm):
    log = os.open(f"{folder}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(log, number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    for name in harm.get("ignored", []):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    Disk(folder, **harm.get("disk", {})).install()
    if "file_size" in harm:
        resource.setrlimit(resource.RLIMIT_FSIZE, (harm["file_size"],) * 2)
    if "without" in harm:  # a closed terminal, or a pipe that nobody reads
        reading, writing = os.pipe()
        os.close(reading)
        for number in (1, 2):
            if harm["without"] == "pipe":
                os.dup2(writing, number)
            else:
                os.close(number)
    try:
        trainer = kinds.trainer_for(kind, folder, **harm.get("reporting", {}))
        phase = harm.get("phase")
        if "signals" in harm:
            numbers = [getattr(signal, name) for name in harm["signals"]]
            at_phase(trainer, phase, signals_to_self(numbers, harm.get("apart", 0.0)))
        elif harm.get("memory"):
            at_phase(trainer, phase, out_of_memory)
        elif harm.get("removed"):
            at_phase(trainer, phase, remove_folder(harm["removed"]))
        print(trainer.fit())
        return 0
    except TrainingInterrupted as stop:
        os.write(log, f"{stop}\n".encode())
        return 128 + stop.signal_number
    except KeyboardInterrupt:
        os.write(log, b"Interrupted\n")
        return 130
    except BaseException as error:
        message, code = explain(error)
        os.write(log, (f"Error: {message}\n" if message else traceback.format_exc()).encode())
        return code if message else 99


def serve():
    for line in sys.stdin:
        request = json.loads(line)
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # die with the server
            os._exit(job(request["kind"], request["folder"], request["harm"]))
        timer = threading.Timer(request["harm"].get("kill_after", 120.0), os.kill, (pid, signal.SIGKILL))
        timer.start()
        _, status = os.waitpid(pid, 0)
        timer.cancel()
        print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)


if __name__ == "__main__":
    import torch

    kinds.quick_pictures()
    kinds.quick_masses()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    print("ready", flush=True)
    serve()
