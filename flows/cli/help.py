"""The text of `flows PROGRAM --help`, at once: Hydra would show the same after seconds of imports and copies."""

from __future__ import annotations

import re
import textwrap
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


def help_text(program: str) -> str:
    """The template in the program's yaml, filled in."""
    folder = config_folder()
    settings = yaml.safe_load((folder / f"{CONFIGS.get(program, program)}.yaml").read_text("utf-8"))["hydra"]["help"]
    groups = sorted(place.name for place in folder.iterdir() if place.is_dir() and any(place.glob("*.yaml")))

    def listed(group: str) -> str:
        return f"{group}: {', '.join(sorted(path.stem for path in (folder / group).glob('*.yaml')))}"

    def chosen(found: re.Match[str]) -> str:
        return "\n".join(textwrap.fill(listed(group), 110, subsequent_indent="  ") for group in found[1].split(","))

    text = settings["template"].replace("${hydra:help.header}", settings.get("header", ""))
    text = text.replace("$APP_CONFIG_GROUPS", "\n".join(map(listed, groups)) + "\n")
    return re.sub(r"\$\{choices:([^}]*)\}", chosen, text)
