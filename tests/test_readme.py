"""The README's blocks: Python runs, commands compose, and the files that it shows exist."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from flows.cli.config import compose_node

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line
    for language, block in BLOCKS
    if language == "bash"
    for line in block.splitlines()
    if re.match(r"python scripts/(train|evaluate|sample|compare_estimators)\.py", line)
]


@pytest.mark.parametrize("block", [block for language, block in BLOCKS if language == "python"])
def test_python_blocks_run(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)  # as a reader would run it
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_compose(command):
    words = shlex.split(command.partition(" #")[0])
    sweeping = "-m" in words
    overrides = [word for word in words[2:] if word != "-m"]
    parsed = OverridesParser.create().parse_overrides(overrides)
    assert any(override.is_sweep_override() for override in parsed) == sweeping
    (jobs,) = BasicSweeper.split_arguments(parsed, None) if sweeping else [[overrides]]
    assert len(jobs) > 1 or not sweeping
    for job in jobs:
        compose_node(Path(words[1]).stem, list(job))


def test_there_are_blocks_of_both_kinds():
    assert COMMANDS
    assert any(language == "python" for language, _ in BLOCKS)


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
