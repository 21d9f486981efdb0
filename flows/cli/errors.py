"""What a person at the terminal reads: one paragraph for a mistake, a traceback for a bug."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.errors import ConfigCompositionException, HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from flows.cli.arguments import OPEN_PARTS
from flows.cli.config import as_on_the_command_line, compose_node, plain
from flows.cli.grammar import quoted_override
from flows.cli.help import config_folder
from flows.cli.terminal import any_encoding
from flows.errors import FlowsError
from flows.training.files import RunFileError
from flows.training.loggers import flat
from flows.training.memory import is_out_of_memory, memory_message
from flows.training.settings import complete, no_setting
from flows.training.signals import TrainingInterrupted
from flows.training.streams import unbreakable_streams

ABBREVIATIONS = {"lr": "learning_rate"}  # what people call settings
PLAINLY = {  # what Hydra says, and what it means for the command line
    r"Could not delete from config. '(.*?)' does not exist.": r"~\1 removes nothing: no yaml sets \1; to change a "
    r"default of a class write \1=...",
    r"Could not delete from config. The value of '(.*?)' is (.*) and not (.*)\.": r"~\1=\3 removes nothing: \1 is \2; "
    r"write ~\1",
    r"Could not append to config. An item is already at '(.*?)'": r"+\1=... adds a setting, but \1 is there already; "
    r"write \1=...",
    r"(?s)Ambiguous value for argument '([^=]*)=(.*?)'\n.*": r"\1=\2 is unclear: write \1=[\2] for a list, "
    "\"\\1='\\2'\" for text, or add -m to sweep over the values",
    r"Could not override '(.*?)'. No match in the defaults list.": r"there is no group \1 to choose from",
}
MISTAKE, FAILURE = 2, 1  # exit codes: settings or files are wrong; the computation failed


class JobFailedError(Exception):
    """A job of a sweep failed and has reported why."""

    def __init__(self, job: str, reason: str, code: int) -> None:
        super().__init__(job, reason, code)
        self.reason = reason
        self.code = code


class SweepFailedError(Exception):
    """Jobs of a sweep failed.

    Args:
        failures: the record of each job, by its name: `error`, `code` and the `process` that has reported the error.
    """

    def __init__(self, failures: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__(failures)
        self.failures = failures
        self.code = int(next(iter(failures.values()))["code"])


@contextlib.contextmanager
def readable_errors(
    program: str | None = None, arguments: Sequence[str] = (), job: str | None = None
) -> Iterator[None]:
    """End the program with a readable paragraph for every error that the user can mend.

    These are the errors of Hydra and each `FlowsError`. Anything else is a bug and keeps its traceback. Exit codes: 2
    for wrong settings or files, 1 for a computation that failed, 128 + number of the signal for an interruption.

    Args:
        program: the name of its main yaml; an unknown setting is then answered with the valid ones.
        arguments: the command line.
        job: the name of a job of a sweep. Its failure is reported and raised as `JobFailedError`; the exit code of the
            program is that of the first failed job.
    """
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let Hydra raise instead of printing its own report
    any_encoding()
    try:
        with contextlib.nullcontext() if program is None else unbreakable_streams(until_exit=True):
            yield
    except TrainingInterrupted as stop:
        command = resume_command(stop) if job is None else sweep_command(stop.checkpoint.parents[2])
        who = "Stopped" if job is None else f"{job} stopped"
        kept = "everything is saved" if not stop.lost else f"{stop.lost} later steps are lost"
        report(f"\n{who} after step {stop.step}; {kept}. Resume with\n\n    {command}\n")
        sys.exit(128 + stop.signal_number)
    except KeyboardInterrupt:
        report("\nInterrupted.")
        sys.exit(128 + signal.SIGINT)
    except SweepFailedError as failed:
        for name, record in failed.failures.items():
            if record.get("process") != os.getpid():  # another process told it, perhaps into a file
                report(f"\nError in {name}: {record.get('error')}")
        report("\nNot all jobs of the sweep succeeded; see their errors above.")
        sys.exit(failed.code)
    except Exception as error:
        message, code = explain(error, program, arguments)
        if job is not None:
            reason = message or traceback.format_exc()
            report(f"\nError in {job}: {reason}")
            raise JobFailedError(job, reason, code) from None
        if message is None:
            raise
        report(f"\nError: {as_on_the_command_line(message)}")
        sys.exit(code)
    finally:
        if before is None:
            os.environ.pop("HYDRA_FULL_ERROR", None)
        else:
            os.environ["HYDRA_FULL_ERROR"] = before


def explain(error: BaseException, program: str | None = None, arguments: Sequence[str] = ()) -> tuple[str | None, int]:
    """The message for a mistake with its exit code; no message for a bug."""
    if isinstance(error, OmegaConfBaseException) and (own := _own_cause(error)) is not None:
        return explain(own)
    if isinstance(error, ConfigCompositionException) and isinstance(
        error.__cause__, (ConfigKeyError, ConfigAttributeError)
    ):
        return _unknown_setting(str(error.__cause__.full_key), program, arguments), MISTAKE
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key}=... must be given, it has no default", MISTAKE
    if isinstance(error, OverrideParseException):
        return _unreadable(error), MISTAKE
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        reason = re.sub(r"^\w+ raised while resolving interpolation: ", "", str(error).partition("\n")[0])
        return f"{error.full_key}: {reason}", MISTAKE
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        text = str(error).partition("\nConfig search path")[0].strip()
        for pattern, plainly in PLAINLY.items():
            if found := re.match(pattern, text):
                return found.expand(plainly), MISTAKE
        if text.startswith("Error merging override") and error.__cause__ is not None:
            text += f": {str(error.__cause__).partition(chr(10))[0]}"
        text = text.replace("\n\n", "; ").replace(":\n\t", ": ").replace("\n\t", ", ")  # lists in one line
        text = re.sub(r"\s*\n\s*", "; ", text)
        own = "; a folder with yamls of your own is named by --config-dir FOLDER"
        return text + own * ("Could not find '" in text) + _nearest_choice(text), MISTAKE
    if isinstance(error, RunFileError):
        return str(error), FAILURE
    if isinstance(error, FlowsError):
        return str(error), MISTAKE if isinstance(error, (ValueError, TypeError, OSError, ImportError)) else FAILURE
    if is_out_of_memory(error):
        return f"{memory_message(error)}; choose a smaller batch_size, or a smaller model", FAILURE
    return None, FAILURE


def _nearest_choice(text: str) -> str:
    """The question that ends Hydra's message about a choice that is not there, if one is near."""
    found = re.search(r"Could not find '([\w/@]+)/([^']+)'; Available options in '[^']+': (.*)$", text)
    close = difflib.get_close_matches(found[2], found[3].split(", "), n=1) if found else []
    return f"; did you mean {found[1]}={close[0]}?" if found and close else ""


def _unreadable(error: OverrideParseException) -> str:
    """The message for an argument that is no setting=value."""
    key, equals, text = str(error.override).partition("=")
    if not (equals and key.strip()):
        return f"{error.override} is no setting; write setting=value, without spaces, such as data=moons"
    if not re.fullmatch(r"[+~]*[A-Za-z_][\w./@:+-]*", key, re.ASCII):
        return f"there is no setting {key}: names of settings are letters, digits, underscores and dots"
    lines = [line for line in error.message.splitlines() if "input" in line]
    reason = f" ({lines[0].partition(' expecting ')[0]})" if lines else ""
    advice = "put a value with special characters in quotes"
    if text[:1] in "[{(":
        advice = "a list is written [1,2] and a mapping {a: 1}, with all brackets closed, and text in quotes"
    return f"{error.override} cannot be read as setting=value{reason}; {advice}: {quoted_override(key, text)}"


def _own_cause(error: BaseException | None) -> FlowsError | None:
    """The error by which one of our own resolvers refuses a setting."""
    while error is not None and not isinstance(error, FlowsError):
        error = error.__cause__ or error.__context__
    return error


def resume_command(stop: TrainingInterrupted) -> str:
    """The command that continues an interrupted run."""
    resume = quoted_override("resume", stop.checkpoint.parents[1])
    trust = [shlex.quote(f"trust=[{','.join(stop.packages)}]")] if stop.packages else []
    return " ".join([*_program(), resume, *trust])


def sweep_command(folder: Path) -> str:
    """The command that continues an interrupted sweep: the same, in its folder."""
    own = ("resume=", "output_dir=")
    given = [shlex.quote(one) for one in sys.argv[1:] if not one.startswith(own) and one != "train"]
    return " ".join([*_program(), *given, quoted_override("output_dir", folder), "resume=auto"])


def _program() -> list[str]:
    script = Path(sys.argv[0])
    return ["python", shlex.quote(sys.argv[0])] if script.suffix == ".py" else [shlex.quote(script.name), "train"]


def _unknown_setting(full_key: str, program: str | None, arguments: Sequence[str]) -> str:
    """Name the setting that does not exist, and those that do: beside it, or of that name elsewhere."""
    parent, _, key = full_key.rpartition(".")
    config = None if program is None else _composed_without(full_key, program, arguments)
    node = OmegaConf.select(config, parent) if config is not None and parent else config
    valid = [str(name) for name in node if not str(name).startswith("_")] if isinstance(node, DictConfig) else []
    if config is None or not valid:
        return f"there is no setting {full_key}"
    if not parent:
        valid += [name for name in _groups_without_default(str(program)) if name not in (*valid, key)]
    key = ABBREVIATIONS.get(key, key)
    known = plain(config)
    if program != "train":  # its parts are empty here, and those of the run in truth
        parts = OPEN_PARTS[str(program)]
        known |= {part: value for part, value in _usual_parts().items() if part in parts and not known.get(part)}
    elsewhere = [path for path in flat(complete(known)) if path.endswith(f".{key}")]
    return no_setting(key, parent, valid, elsewhere)


def _usual_parts() -> dict[str, Any]:
    """The parts of a run on a table, whose settings are asked for most."""
    return plain(compose_node("train", ["data=tabular"]))


def _composed_without(key: str, program: str, arguments: Sequence[str]) -> DictConfig | None:
    """The settings from the other overrides; `None` if something else is wrong too."""
    given = [a for a in arguments if "=" in a and not a.startswith("-")]
    kept = [a for a in given if not f"{a.partition('=')[0]}.".startswith(f"{key}.")]
    try:
        return compose_node(program, kept)
    except (HydraException, OmegaConfBaseException):
        return None


def _groups_without_default(program: str) -> list[str]:
    """The groups of which nothing is chosen by default, such as experiment."""
    defaults = plain(OmegaConf.load(config_folder() / f"{program}.yaml"))["defaults"]
    return [name for entry in defaults if isinstance(entry, dict) for name in entry if entry[name] is None]


def report(text: str) -> None:
    """Tell the person at the terminal."""
    with contextlib.suppress(OSError):  # nobody reads it
        print(text, file=sys.stderr, flush=True)
