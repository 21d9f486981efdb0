"""Settings: finding the yamls, composing them with the command line, and resuming with those of a run."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import flows
from flows.checks import check_seed
from flows.errors import InvalidValueError
from flows.training.checkpoint import CheckpointError, find_checkpoint, load_checkpoint
from flows.training.files import FOLDER
from flows.training.loggers import warnings_above_bars
from flows.training.runs import checkpoint_config
from flows.training.settings import SettingsError, check_type, complete, instantiate, no_setting

PROGRAM_SETTINGS = {  # settings that no class has, and their types
    "seed": int,
    "output_dir": str | None,
    "output": str | None,
    "device": str | None,
    "dtype": str | None,
    "trust": Sequence[str],
    "part": str,
    "checkpoint": str | None,
    "resume": str | None,
    "num_samples": int,
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
PATHS = ("output_dir", "output", "checkpoint", "resume")
OPEN_PARTS = {  # of each program: their settings may have any name, as far as Hydra is concerned
    "train": (
        "data",
        "transform",
        "field",
        "divergence",
        "solver",
        "objective",
        "optimizer",
        "optimization",
        "hardware",
        "reporting",
        "evaluation",
    ),
    "evaluate": ("data", "divergence", "solver", "outliers"),
    "sample": ("data", "solver"),
    "compare_estimators": ("data", "transform", "field", "divergence", "solver"),
}

# A resumed run may be watched differently, run on other devices, or last longer. Anything else would make it another.
CHANGEABLE_ON_RESUME = re.compile(
    r"hardware\.(?!precision$)\w+|reporting\.\w+|evaluation\.[\w.]+|optimization\.(on|max)_solver_errors?"
    r"|objective\.\w+\.(steps|seconds)"
)
RESUME_SETTINGS = ("resume", "output_dir", "trust")


def config_folder() -> Path:
    """The folder with the yamls: `flows/conf` in an installed package, `conf` in a checkout."""
    package = Path(flows.__file__).resolve().parent
    places = (package / "conf", package.parent / "conf")
    for place in places:
        if (place / "train.yaml").is_file():
            return place
    raise AssertionError(f"the package is incomplete: there is no train.yaml in {places[0]} or {places[1]}")


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
        with warnings_above_bars(), _command_line([process[0], *arguments]):
            decorate(run_task)()
    except (HydraException, OmegaConfBaseException):
        raise  # has a message for people
    except (AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        if started:
            raise
        raise InvalidValueError(f"these settings cannot be composed: {' '.join(arguments)} ({error})") from error


def print_settings(composed: DictConfig) -> None:
    """Print all settings as yaml, with the defaults of the classes, which the yamls do not repeat."""
    print(yaml.safe_dump(complete(plain_settings(composed)), sort_keys=False, allow_unicode=True), end="")


def check_choices(arguments: Sequence[str]) -> None:
    """Check that what is given for a group, such as `divergence`, is the name of a choice.

    Raises:
        InvalidValueError: it is a number, a mapping, or nothing.
    """
    overrides = [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
    for override in OverridesParser.create().parse_overrides(overrides):
        group = str(override.key_or_group)
        folder = config_folder() / group
        if override.is_delete() or override.is_sweep_override() or not folder.is_dir():
            continue
        value = override.value()
        # nothing is chosen by null where nothing is chosen by default
        if not isinstance(value, str | list) and not (group == "experiment" and value is None):
            choices = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
            shown = "null" if value is None else value
            raise InvalidValueError(f"{group} must be the name of a choice, got {shown}; there are {choices}")


def refuse(arguments: Sequence[str], parts: Mapping[str, str]) -> None:
    """Refuse overrides of parts that a program ignores.

    Args:
        arguments: the command line.
        parts: names of parts, and what to do instead.

    Raises:
        InvalidValueError: a part is among the overrides.
    """
    for argument in arguments:
        part = re.split(r"[./@=]", argument.lstrip("+~"))[0]
        if part in parts and not argument.startswith("-"):
            raise InvalidValueError(f"{part} cannot be chosen here: {parts[part]}")


def check_added(arguments: Sequence[str], name: str) -> None:
    """Check that settings added with `+` belong to the program `name`, which would ignore any other.

    Raises:
        SettingsError: there is no such setting or group.
    """
    content = OmegaConf.load(config_folder() / f"{name}.yaml")
    assert isinstance(content, DictConfig)
    groups = {str(group) for entry in content.defaults if isinstance(entry, DictConfig) for group in entry}
    known = {str(key) for key in content if key != "defaults"} | set(OPEN_PARTS[name]) | {"hydra"}
    known |= {re.split(r"[./@ ]", group.removeprefix("override "))[0] for group in groups}
    overrides = [argument for argument in arguments if argument.startswith("+") and "=" in argument]
    for override in OverridesParser.create().parse_overrides(overrides):
        top = re.split(r"[./@]", str(override.key_or_group))[0]
        if top not in known:
            raise SettingsError(no_setting(top, "", sorted(known - {"hydra"})))


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
    lines = (f"{group}: {', '.join(loader.get_group_options(group))}" for group in groups)
    return "\n".join(textwrap.fill(line, 110, subsequent_indent="  ") for line in lines)


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

    Raises:
        SettingsError: a setting of `PROGRAM_SETTINGS` has another type.
        MissingMandatoryValue: a setting without a default is not given.
    """
    settings = plain(composed, resolve=True, throw_on_missing=True)
    for name, kind in PROGRAM_SETTINGS.items():
        if name in settings:
            check_type(name, settings[name], kind)
    for name in PATHS:
        check_path(name, settings.get(name))
    if "seed" in settings:
        check_seed(settings["seed"])
    return settings


def check_path(name: str, path: Any) -> None:
    """Refuse text that the file system cannot take for a path, such as a name that is too long.

    Raises:
        InvalidValueError: it cannot be a path.
    """
    try:
        if isinstance(path, str):
            Path(path).exists()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InvalidValueError(f"{name} cannot be a path ({reason}): {path!r}") from error


def with_changes(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a run with the parts in `changes` replaced or changed.

    A part with a `_target_` replaces the old one; without, its settings are merged into the old one's. An empty part
    changes nothing.
    """
    changed = dict(config)
    for part, new in changes.items():
        if new:
            replaces = "_target_" in new
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


def resumed_config(
    path: str | os.PathLike[str],  # a checkpoint or the folder of a run
    overrides: Sequence[str],  # as given on the command line
    trust: Sequence[str] = (),
) -> tuple[dict[str, Any], Path]:
    """The settings of a run to resume, and the checkpoint to continue from.

    Overrides may change how the run is watched, where it runs and how long it lasts. Without an `output_dir` among
    them, the run continues in its own folder.

    Raises:
        CheckpointError: there is no usable checkpoint, or it lies in no run's folder.
        InvalidValueError: an override would make it another run.
    """
    file = find_checkpoint(path, prefer="last")
    config = checkpoint_config(load_checkpoint(file), file, trust)
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    given = {override.key_or_group: override.value() for override in parsed}
    fixed = [key for key in given if key not in RESUME_SETTINGS and not CHANGEABLE_ON_RESUME.fullmatch(key)]
    if fixed:
        raise InvalidValueError(
            f"a resumed run keeps the settings that it was started with; {', '.join(fixed)} cannot change, only the "
            "steps of a stage and how it is run and watched (hardware.devices, reporting.log_every, ...) can. "
            "Leave it out, or start a new run"
        )
    for key, value in given.items():
        if key not in RESUME_SETTINGS:
            _replace(config, key, value, file)
    if "output_dir" in given:
        config["output_dir"] = str(given["output_dir"])
    elif file.parent.name == FOLDER:
        config["output_dir"] = str(file.parent.parent)
    else:
        raise CheckpointError(f"{file} lies in no run's {FOLDER} folder; say with output_dir=... where to continue")
    return config, file


def _replace(config: dict[str, Any], key: str, value: Any, file: Path) -> None:
    """Set `config["a"]["b"]` for the key `a.b`, which must exist."""
    parent, _, last = key.rpartition(".")
    node: Any = config
    for word in parent.split("."):
        node = node.get(word) if isinstance(node, dict) else None
    if not isinstance(node, dict) or last not in node:
        valid = [name for name in node if not name.startswith("_")] if isinstance(node, dict) else []
        raise InvalidValueError(f"{no_setting(last, parent, valid)} in the run {file}")
    node[last] = value
