"""README and docs: Python blocks run, commands have settings that exist, links and pictures lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from benchmarks.__main__ import main as run_benchmark
from flows.cli.config import compose, with_changes
from flows.training.annotations import SettingsError
from flows.training.settings import GIVEN, check_settings

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md")))
}
RUNS = {  # the run that a checkpoint in a command stands for
    "runs/8gaussians/2026-01-31_12-00-00": (),
    "runs/moons/2026-01-31_12-00-00": ("data=moons",),
    "runs/classes": ("data=moons_by_class",),
    "runs/tank": ("data=trajectories", "data.path=x.csv", "data.input_columns=[inflow]", "field=forced"),
    "runs/glucose": ("model=neural_ode", "data=trajectories", "data.path=x.csv", "objective=trajectory_matching"),
    "runs/table": ("data=tabular", "data.path=x.csv"),
    "runs/tabular/2026-01-31_12-00-00": ("data=tabular", "data.path=x.csv"),
    "runs/people": ("data=tabular", "data.path=x.csv", "data.context_columns=[age]"),
    "runs/pictures": ("data=images", "data.path=x"),
    "runs/series": ("data=trajectories", "data.path=x.csv"),
    "runs/photos": ("data=images", "data.path=photos", "data.conditional=true"),
    "RUN": ("experiment=digits",),
}


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(text, pattern):
    whole = [block.replace("\\\n", " ") for block in blocks(text, "bash")]  # lines that go on
    lines = [line.partition(" #")[0] for block in whole for line in block.splitlines()]
    return [line for line in lines if re.search(pattern, line)]


SCRIPTS = [(page, command) for page, text in PAGES.items() for command in commands(text, r"python scripts/")]
BENCHMARKS = sorted({command for text in PAGES.values() for command in commands(text, r"python -m benchmarks")})


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if blocks(text, "python")])
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """A page of the docs is one program; each block of the README is one by itself."""
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)  # as a reader would run it
    programs = blocks(PAGES[page], "python")
    for program in programs if page == "README.md" else ["\n\n".join(programs)]:
        exec(compile(program, page, "exec"), {"__name__": "docs"})


def check_parts(config):
    for part, settings in config.items():
        check_settings(settings, part, GIVEN.get(part, ()))


def check_command(command):
    """Raise if a script does not have a setting of the command; nothing is run."""
    words = shlex.split(command[command.index("python scripts/") :])
    script, overrides = Path(words[1]).stem, [word for word in words[2:] if word not in ("-m", "&&")]
    overrides = [word for word in overrides if not word.startswith("hydra")]  # of packages that need not be installed
    overrides = [re.sub(r"=.*interval\((.*?)\).*", r"=\1", word) for word in overrides]  # its ends, as two choices
    parsed = OverridesParser.create().parse_overrides(overrides)
    assert any(override.is_sweep_override() for override in parsed) == ("-m" in words)
    jobs = BasicSweeper.split_arguments(parsed, None)[0] if "-m" in words else [overrides]
    assert len(jobs) > 1 or "-m" not in words
    for job in jobs:
        config = compose(script, job)
        run = config.get("checkpoint") or config.get("resume")
        if run not in (None, "auto"):  # auto: the run of these settings
            parts = ("data", "divergence", "solver")
            trained = compose("train", RUNS[run])
            config = {**trained, **with_changes(trained, {part: config.get(part) for part in parts})}
        check_parts(config)


@pytest.mark.parametrize(("page", "command"), SCRIPTS, ids=lambda value: value)
def test_commands_have_settings_that_exist(page, command):
    check_command(command)


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("python scripts/train.py divergence.nonsense=1", "divergence.nonsense"),
        ("python scripts/train.py objective.flow_matching.objective.nonsense=1", "nonsense"),
        ("python scripts/evaluate.py checkpoint=RUN solver.nonsense=1", "solver.nonsense"),
        ("python scripts/evaluate.py checkpoint=RUN divergence=hutchinson divergence.stride=2", "divergence.stride"),
        ("python scripts/sample.py checkpoint=RUN solver.rtol=tight", "solver.rtol must be a number"),
    ],
)
def test_commands_with_a_wrong_setting_are_noticed(command, name):
    with pytest.raises(SettingsError, match=re.escape(name)):
        check_command(command)


def test_a_file_without_data_asks_for_a_data_set():
    with pytest.raises(SettingsError, match=r"keeps none, .* such as data=tabular data.path=new.csv"):
        with_changes({}, {"data": {"path": "new.csv"}})


@pytest.mark.parametrize("command", BENCHMARKS)
def test_benchmark_commands_are_understood(command):
    words = shlex.split(command)
    with pytest.raises(SystemExit, match="0"):
        run_benchmark([*words[words.index("benchmarks") + 1 :], "--help"])


def test_there_are_commands_and_programs():
    assert len(SCRIPTS) > 20
    assert len(BENCHMARKS) > 5
    assert sum(len(blocks(text, "python")) for text in PAGES.values()) > 10


@pytest.mark.parametrize("page", list(PAGES))
def test_links_and_pictures_exist(page):
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)[^)]*\)", PAGES[page]):
        found = folder / target
        notebook = ROOT / "notebooks" / found.name  # which docs/hooks.py puts beside the pages
        assert found.exists() or (notebook.exists() and page.startswith("docs/")), target


@pytest.mark.parametrize("page", list(PAGES))
def test_headings_that_links_name_exist(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#([^)\s]+)\)", PAGES[page]):
        text = ((ROOT / page).parent / target).read_text(encoding="utf-8") if target else PAGES[page]
        headings = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.+)$", text, re.M)]
        assert anchor in headings, f"{target}#{anchor}"


def test_the_files_that_answer_questions_exist():
    """In "Where things are" and the table of folders."""
    named = re.findall(r"`((?:flows|conf|scripts|benchmarks)(?:/[\w./]+)?)`", PAGES["docs/where.md"])
    assert len(named) > 20
    for name in named:
        assert (ROOT / name).exists(), name


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 160
