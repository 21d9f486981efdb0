"""What a person at the terminal gets to read: one paragraph for a mistake, a traceback for a bug."""

from __future__ import annotations

import contextlib
import linecache
import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from hydra.errors import ConfigCompositionException, HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from flows.training.settings import no_setting
from flows.training.stopping import TrainingInterrupted
from flows.training.summary import flat

PACKAGE = Path(__file__).resolve().parents[1]
MISTAKE, FAILURE = 2, 1  # exit codes: the settings or files are wrong; the computation failed


class JobFailedError(Exception):
    """A job of a sweep failed, and has said why."""

    def __init__(self, job: str, code: int) -> None:
        super().__init__(f"the job {job} of the sweep failed")
        self.code = code


@contextlib.contextmanager
def readable_errors(config_file: Path | None = None, job: str | None = None) -> Iterator[None]:
    """End the program with a readable paragraph where the user can mend what went wrong.

    That is an error of the configuration, or one that this package raises on purpose: ``raise`` stands in one
    of its files at the place where the exception comes from. Anything else is a bug and keeps its traceback.
    Exit codes: 2 for wrong settings or files, 1 for a computation that failed, 128 + number of the signal for
    an interruption.

    Args:
        config_file: the main yaml of the program; a wrong setting is then answered with those that there are.
        job: the name of a job of a sweep, which goes on with the other jobs; the program's exit code is that of the
            first one that failed. An interruption ends the sweep.
    """
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let Hydra raise instead of printing its own report
    try:
        yield
    except TrainingInterrupted as stop:
        _say(f"\nStopped after step {stop.step}; everything is saved. Resume with\n\n    {resume_command(stop)}\n")
        sys.exit(128 + stop.signal_number)
    except KeyboardInterrupt:
        _say("\nInterrupted.")
        sys.exit(128 + signal.SIGINT)
    except JobFailedError as failure:
        _say("\nNot all jobs of the sweep succeeded; see their errors above.")
        sys.exit(failure.code)
    except Exception as error:
        message, code = explain(error, config_file)
        if job is not None:
            _say(f"\nError in {job}: {message or traceback.format_exc()}")
            raise JobFailedError(job, code) from None
        if message is None:
            raise
        _say(f"\nError: {message}")
        sys.exit(code)
    finally:
        if before is None:
            os.environ.pop("HYDRA_FULL_ERROR", None)
        else:
            os.environ["HYDRA_FULL_ERROR"] = before


def explain(error: BaseException, config_file: Path | None = None) -> tuple[str | None, int]:
    """A message for a mistake and its exit code; no message for a bug."""
    if isinstance(error, ConfigCompositionException) and isinstance(
        error.__cause__, (ConfigKeyError, ConfigAttributeError)
    ):
        return _explain_key(error.__cause__, config_file), MISTAKE
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key}=... must be given, it has no default", MISTAKE
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        text = str(error).partition("\nConfig search path")[0].strip()
        return text.replace("\n\n", "; ").replace(":\n\t", ": ").replace("\n\t", ", "), MISTAKE  # lists in one line
    if is_deliberate(error):
        return str(error), MISTAKE if isinstance(error, (ValueError, TypeError, OSError)) else FAILURE
    return None, FAILURE


def is_deliberate(error: BaseException) -> bool:
    """Whether this package raised the exception by a ``raise`` statement, so that its text explains it."""
    trace = error.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    file = trace.tb_frame.f_code.co_filename
    line = linecache.getline(file, trace.tb_lineno).lstrip()
    return Path(file).resolve().is_relative_to(PACKAGE) and line.startswith("raise ")


def quoted_override(key: str, value: object) -> str:
    """``key=value`` as one argument for a shell and Hydra, quoted where either needs it."""
    text = str(value)
    if not re.fullmatch(r"[A-Za-z0-9/_.:+%-]+", text):
        escaped = re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), text)
        return shlex.quote(f"{key}='{escaped}'")
    return f"{key}={text}"


def resume_command(stop: TrainingInterrupted) -> str:
    """The command that continues an interrupted run."""
    resume = quoted_override("resume", stop.checkpoint.parents[1])
    trust = [shlex.quote(f"trust=[{','.join(stop.packages)}]")] if stop.packages else []
    return " ".join(["python", shlex.quote(sys.argv[0]), resume, *trust])


def _choices_without_settings(config_file: Path) -> list[str]:
    """The groups that may be chosen from but add nothing by default, such as experiment."""
    defaults = OmegaConf.load(config_file).get("defaults", [])
    return [str(name) for entry in defaults if isinstance(entry, DictConfig) for name in entry if entry[name] is None]


def _explain_key(error: OmegaConfBaseException, config_file: Path | None) -> str:
    """Name the setting that does not exist, and those that do: beside it, or of that name elsewhere."""
    full_key = str(error.full_key)
    parent, _, key = full_key.rpartition(".")
    config = None if config_file is None else _composed_without(full_key, config_file)
    node = OmegaConf.select(config, parent) if config is not None and parent else config
    valid = [str(name) for name in node if not str(name).startswith("_")] if isinstance(node, DictConfig) else []
    if not valid:
        return f"there is no setting {full_key}"
    if not parent:
        valid += [name for name in _choices_without_settings(config_file) if name not in valid]
    elsewhere = [path for path in flat(OmegaConf.to_container(config)) if path.endswith(f".{key}")]
    return no_setting(key, parent, valid, elsewhere)


def _composed_without(key: str, config_file: Path) -> DictConfig | None:
    """The config from the other overrides."""
    from hydra import compose, initialize_config_dir

    kept = [a for a in sys.argv[1:] if "=" in a and not a.startswith("-") and a.partition("=")[0] != key]
    try:
        with initialize_config_dir(str(config_file.parent.resolve()), version_base="1.3"):
            return compose(config_file.stem, overrides=kept)
    except (HydraException, OmegaConfBaseException):
        return None  # something else is wrong as well, a sweep for instance; the message does without the list


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
