"""The text of `flows PROGRAM --help`, at once: Hydra would show the same after seconds of imports and copies."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable
from pathlib import Path

import yaml

import flows

CONFIGS = {"compare": "compare_estimators"}  # of the programs whose yaml has another name


def config_folder() -> Path:
    """The folder with the yamls: `flows/conf` in an installed package, `conf` in a checkout."""
    package = Path(flows.__file__).resolve().parent
    places = (package / "conf", package.parent / "conf")
    for place in places:
        if (place / "train.yaml").is_file():
            return place
    raise AssertionError(f"the package is incomplete: there is no train.yaml in {places[0]} or {places[1]}")


def choices_of(group: str) -> list[str]:
    """The names of the yamls of a group."""
    return sorted(path.stem for path in (config_folder() / group).glob("*.yaml"))


def choices_in_lines(group: str, choices: Iterable[str]) -> str:
    """A group and its choices, in lines for a terminal."""
    return textwrap.fill(f"{group}: {', '.join(choices)}", 110, subsequent_indent="  ")


def help_text(program: str) -> str:
    """The template in the program's yaml, filled in."""
    folder = config_folder()
    settings = yaml.safe_load((folder / f"{CONFIGS.get(program, program)}.yaml").read_text("utf-8"))["hydra"]["help"]
    groups = sorted(place.name for place in folder.iterdir() if place.is_dir() and choices_of(place.name))

    def chosen(found: re.Match[str]) -> str:
        return "\n".join(choices_in_lines(group, choices_of(group)) for group in found[1].split(","))

    text = settings["template"].replace("${hydra:help.header}", settings.get("header", ""))
    every = "".join(f"{group}: {', '.join(choices_of(group))}\n" for group in groups)
    return re.sub(r"\$\{choices:([^}]*)\}", chosen, text.replace("$APP_CONFIG_GROUPS", every))
