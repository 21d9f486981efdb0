"""Settings: finding the yamls, composing them with the command line, and resuming with those of a run."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra._internal.hydra import Hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flows.checks import check_seed
from flows.cli.arguments import OPEN_PARTS, check_added, check_choices
from flows.cli.grammar import quoted
from flows.cli.help import choices_in_lines, config_folder
from flows.errors import ComputationError, DataWarning, FieldWarning, FlowsError, InvalidValueError
from flows.training.annotations import SettingsError, check_type
from flows.training.building import without_unused_parts
from flows.training.files import OutputFolderError
from flows.training.loggers import warnings_above_bars
from flows.training.settings import complete, instantiate, parameter_names

PROGRAM_SETTINGS = {  # settings that no class has, and their types
    "seed": int,
    "steps": int | None,
    "output_dir": str | None,
    "output": str | None,
    "device": str | None,
    "dtype": str | None,
    "trust": Sequence[str],
    "part": str | None,
    "rows": str | None,
    "checkpoint": str | None,
    "resume": str | None,
    "teacher": str | None,
    "num_samples": int,
    "id": str | None,
    "class": int | str | None,
    "num_draws": int,
    "guidance": float | None,
    "points": int | None,
    "estimators": Sequence[str] | str | None,
    "variants": Mapping[str, Mapping[str, Any]] | None,
    "measure": Mapping[str, Any],
    "affordable": float,
    "batch_size": int,
    "solver_error_points": int,
    "plot": bool,
    "progress_bar": bool,
}
PATHS = ("output_dir", "output", "rows", "checkpoint", "resume", "teacher")


def run_with_hydra(task: Callable[[DictConfig], Any], name: str, arguments: Sequence[str]) -> None:
    """Call `task` with the settings that `arguments` choose from `conf/<name>.yaml`; in a sweep, once a job.

    With `--settings` among the arguments, all settings are printed instead.

    Hydra reads `sys.argv`. While the task runs, `sys.argv` is that of the process again, since Lightning Fabric starts
    the processes of further devices with it.
    """
    register_resolvers()
    check_choices(arguments)
    check_added(arguments, name)
    if "--settings" in arguments:
        task, arguments = print_settings, [argument for argument in arguments if argument != "--settings"]
    process, started = sys.argv, False

    def run_task(composed: DictConfig) -> Any:
        nonlocal started
        started = True
        with _command_line(process):
            return task(composed)

    # Hydra finds out by these where the program comes from
    run_task.__module__, run_task.__qualname__ = task.__module__, task.__qualname__
    decorate = hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=name)
    try:
        with (
            warnings_above_bars(),
            warnings.catch_warnings(),
            plain_warnings(),
            _command_line([process[0], *arguments]),
            _composed_once(arguments),
        ):
            warnings.filterwarnings("error", "provider=hydra.searchpath")  # a folder that is not there
            decorate(run_task)()
    except (HydraException, OmegaConfBaseException):
        raise  # has a message for people
    except Exception as error:
        if isinstance(error, FlowsError):
            raise
        if name == "train" and {"-m", "--multirun"} & set(arguments):  # what a job raises ends in its record
            reason = " ".join(str(error).split())[:300]
            raise ComputationError(
                f"the sweep cannot go on, since its sweeper or launcher fails: {type(error).__name__}: {reason}; the "
                "jobs that were done are in its folder"
            ) from error
        if started:
            raise
        reason = type(error).__name__ if isinstance(error, AssertionError) else " ".join(str(error).split())
        raise InvalidValueError(f"these settings cannot be composed: {' '.join(arguments)} ({reason})") from error


def print_settings(composed: DictConfig) -> None:
    """Print all settings as yaml, with the defaults of the classes, which the yamls do not repeat."""
    print(yaml.safe_dump(complete(plain_settings(composed)), sort_keys=False, allow_unicode=True), end="")


def as_on_the_command_line(text: str) -> str:
    """Advice of the library with the full names of settings: `data.columns=[a]` for `columns=[a]`."""
    own = {*PROGRAM_SETTINGS, "name"}
    names = "|".join(name for name in parameter_names("flows.datasets.Tabular") if name not in own)
    return re.sub(rf"(?<![\w.])(?=(?:{names})=)", "data.", text)


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """While entered, warnings of this package are shown without the place in the code, which tells a user nothing."""
    usual = warnings.formatwarning

    def plain(message: Any, category: type[Warning], *place: Any) -> str:
        return (
            f"Warning: {as_on_the_command_line(str(message))}\n"
            if issubclass(category, DataWarning | FieldWarning)
            else usual(message, category, *place)
        )

    warnings.formatwarning = plain
    try:
        yield
    finally:
        warnings.formatwarning = usual


@contextlib.contextmanager
def _composed_once(arguments: Sequence[str]) -> Iterator[None]:
    """Keep Hydra from composing all settings twice, the first time only to look for `hydra.mode`.

    It takes a third of a second. Settings of Hydra itself, flags and folders of yamls might set the mode.
    """
    usual = getattr(Hydra, "get_mode", None)
    if usual is None or any("hydra" in argument or argument.startswith("-") for argument in arguments):
        yield
        return
    Hydra.get_mode = lambda *_, **__: None
    try:
        yield
    finally:
        Hydra.get_mode = usual


@contextlib.contextmanager
def _command_line(arguments: list[str]) -> Iterator[None]:
    before, sys.argv = sys.argv, arguments
    try:
        yield
    finally:
        sys.argv = before


def register_resolvers() -> None:
    """Register what the yamls of the programs refer to.

    The default `open_<program>` lets the parts of a program take settings of any name. Hydra would refuse those that a
    yaml does not list, and a yaml lists only what differs from the defaults of the class. The classes check them later.
    `${choices:solver,...}` lists the choices of groups, for `--help`.
    """
    for program, parts in OPEN_PARTS.items():
        node = DictConfig({part: DictConfig({}, flags={"struct": False}) for part in parts})
        ConfigStore.instance().store(name=f"open_{program}", node=node)
    OmegaConf.register_new_resolver("choices", _choices, replace=True)


def _choices(*groups: str) -> str:
    loader = GlobalHydra.instance().config_loader()
    return "\n".join(choices_in_lines(group, loader.get_group_options(group)) for group in groups)


def compose(name: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The plain settings of the program `name`, composed outside of it.

    compose("train", ["data=moons", "seed=3"])
    """
    return plain_settings(compose_node(name, overrides))


def compose_node(name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Like `compose`, before interpolations are resolved."""
    register_resolvers()
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        return hydra.compose(name, overrides=list(overrides))


def plain(node: Any, resolve: bool = False, throw_on_missing: bool = False) -> dict[str, Any]:
    """A node of OmegaConf as a dictionary; the options are those of `OmegaConf.to_container`."""
    content = OmegaConf.to_container(node, resolve=resolve, throw_on_missing=throw_on_missing)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def plain_settings(composed: DictConfig) -> dict[str, Any]:
    """Composed settings as plain values, with those of the program itself checked.

    Parts that the chosen model does not take are left out.

    Raises:
        SettingsError: a setting of `PROGRAM_SETTINGS` has another type.
        MissingMandatoryValue: a setting without a default is not given.
    """
    settings = without_unused_parts(plain(composed, resolve=True, throw_on_missing=True))
    if settings.get("encoder") == {}:  # none is chosen
        del settings["encoder"]
    check_program_settings(settings)
    return settings


def check_program_settings(settings: Mapping[str, Any]) -> None:
    """Check those of the settings that belong to the program itself.

    Raises:
        SettingsError: a setting of `PROGRAM_SETTINGS` has another type.
        InvalidValueError: a path or a seed cannot be one.
    """
    for name, kind in PROGRAM_SETTINGS.items():
        if name in settings:
            check_type(name, settings[name], kind)
            if isinstance(settings[name], str) and not settings[name].strip():
                raise SettingsError(f"{name} is empty; give a value, or leave {name}=... out")
    for name in PATHS:
        check_path(name, settings.get(name))
    if "seed" in settings:
        check_seed(settings["seed"])


def check_path(name: str, path: Any) -> None:
    """Refuse text that the file system cannot take for a path, such as a name that is too long.

    Raises:
        InvalidValueError: it cannot be a path.
    """
    if not isinstance(path, str):
        return
    if scheme := re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://(.*)", path):
        local = (
            f"write {name}={quoted('/' + scheme[2].lstrip('/'))}"
            if scheme[1] == "file"
            else ("use a folder of this machine, such as one where that store is mounted, and copy the files later")
        )
        raise InvalidValueError(f"{name} must be a path of a file system, got the address {path}; {local}")
    try:
        Path(path).exists()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InvalidValueError(f"{name} cannot be a path ({reason}): {path!r}") from error


def check_output(path: str | None, *suffixes: str, name: str = "output") -> None:
    """Refuse a file that cannot be written, before anything is computed for it.

    Args:
        path: the file.
        suffixes: that it may have.
        name: of the setting.

    Raises:
        InvalidValueError: it has another ending than those.
        OutputFolderError: a folder or another file is in its place.
    """
    if path is None:
        return
    file = Path(path)
    endings = in_words_or(suffixes)
    if file.is_dir():
        raise OutputFolderError(f"{name}={path} is a folder; give a file that ends in {endings}")
    if file.suffix not in suffixes:
        raise InvalidValueError(f"{name} must end in {endings}, got {path!r}")
    above = next(folder for folder in file.absolute().parents if folder.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise OutputFolderError(f"{name}={path} cannot be written: {above} is no folder that can be; choose another")


def in_words_or(names: Sequence[str]) -> str:
    """Names as a phrase, such as ".csv, .npy or .png"."""
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def is_given(name: str) -> bool:
    """Whether the command line of the running program sets this setting."""
    return any(override.lstrip("+~").partition("=")[0] == name for override in HydraConfig.get().overrides.task)


EXAMPLES = {"data": "tabular", "solver": "flow5", "divergence": "exact"}  # choices of parts


def with_changes(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a run with the parts in `changes` replaced or changed.

    A part with a `_target_` replaces the old one; without, its settings are merged into the old one's. An empty part
    changes nothing.

    Raises:
        SettingsError: there is no old part to merge the settings into.
    """
    changed = dict(config)
    for part, new in changes.items():
        if new:
            replaces = "_target_" in new
            if not replaces and part not in config:
                example = next(iter(new))
                raise SettingsError(
                    f"{part}.{example} changes the {part} of the run, and this file keeps none, as a model that was "
                    f"trained from Python; choose one as well, such as {part}="
                    f"{EXAMPLES.get(part, 'NAME')} {part}.{example}={new[example]}"
                )
            changed[part] = dict(new) if replaces else plain(OmegaConf.merge(config[part], new))
    return changed


def instances(
    group: str,
    names: Sequence[str] | str | None = None,  # None: all
    variants: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Build the choices of a group, such as every estimator in `conf/divergence`, within a running program.

    A new yaml in the folder of the group is a new choice, also in a folder of `hydra.searchpath`.

    Args:
        group: the name of the folder.
        names: the choices to build; `None`: all.
        variants: further choices by name, each a choice of the group with other settings:
            `{"orthonormal": {"divergence": "hutchinson", "probes": "orthonormal"}}`.

    Raises:
        InvalidValueError: a name is not a choice of the group.
    """
    context = HydraConfig.get()
    main, where = context.job.config_name, list(context.overrides.hydra)  # such as further folders to search
    choices = GlobalHydra.instance().config_loader().get_group_options(group, config_name=main, overrides=where)
    variants = {} if variants is None else variants
    valid = [*choices, *variants]
    names = valid if names is None else [names] if isinstance(names, str) else list(names)
    if not names:
        raise InvalidValueError(f"choose at least one {group} of {', '.join(valid)}; got an empty list")
    found = {}
    for name in names:
        if name not in valid:
            close = difflib.get_close_matches(str(name), valid, n=1)
            suggestion = f"; did you mean {close[0]}?" if close else ""
            raise InvalidValueError(f"{name!r} is not a choice of {group}; there are {', '.join(valid)}{suggestion}")
        changes = dict(variants.get(name, {}))
        base = changes.pop(group, name)
        if base not in choices:
            raise InvalidValueError(
                f"the variant {name!r} must say which {group} it varies, {group}: {choices[0]} for instance; "
                f"there are {', '.join(choices)}"
            )
        composed = plain(hydra.compose(overrides=[f"+{group}={base}", *where])[group], resolve=True)
        found[name] = instantiate({**composed, **changes}, group if base == name else f"variants.{name}")
    return found
