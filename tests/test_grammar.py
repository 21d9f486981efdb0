"""What is typed reaches the settings: options in any place, text with any signs, and terminals without some."""

import io
import sys

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from flows.cli.grammar import readable_arguments
from flows.cli.terminal import any_encoding
from flows.errors import InvalidValueError
from flows.training.fabric import Hardware, build_fabric
from flows.training.processes import check_processes

PATHS = [
    "a=b",
    "a#b",
    "(a)",
    "it's",
    "[x",
    "{x}",
    "a;b",
    "größe",
    "日本",
    "~/x",
    "a!b&c",
    'a"b',
    "2024",
    "1e5",
    "true",
    "a\nb",
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("key", ["output_dir", "resume", "checkpoint", "output", "data.path", "+data.path"])
def test_paths_are_taken_as_they_are(key, path):
    (argument,) = readable_arguments([f"{key}={path}"])
    assert OverridesParser.create().parse_override(argument).value() == path


@pytest.mark.parametrize("delimiter", ["\t", " ", ";", "#"])
def test_delimiters_are_taken_as_they_are(delimiter):
    (argument,) = readable_arguments([f"data.delimiter={delimiter}"])
    assert OverridesParser.create().parse_override(argument).value() == delimiter


@pytest.mark.parametrize(
    "argument",
    ["output_dir=null", "output_dir='a b'", "output_dir=${x}", "field.hidden=[4,8]", "seed=3", "~x", "seed=1,2"],
)
def test_what_hydra_reads_keeps_its_meaning(argument):
    assert readable_arguments([argument]) == [argument]


def test_options_may_stand_anywhere():
    assert readable_arguments(["seed=1,2", "-m", "--cfg", "job"]) == ["-m", "--cfg", "job", "seed=1,2"]
    with pytest.raises(InvalidValueError, match=r"there is no option --seed; .* written without dashes: seed=3"):
        readable_arguments(["--seed=3"])


def test_a_terminal_without_a_sign_shows_a_plain_one(monkeypatch):
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding="ascii"))
    any_encoding()
    print("1.0 ± 0.1 × ü \udc80")
    sys.stdout.flush()
    assert buffer.getvalue() == b"1.0 +- 0.1 x ? ?\n"


def test_more_devices_than_the_machine_has_are_refused():
    with pytest.raises(
        InvalidValueError, match=r"devices=1000000 asks for 1,000,000 processor cores, .* has \d+; choose"
    ):
        check_processes("cpu", 1_000_000)
    with pytest.raises(InvalidValueError, match=r"number of processes on a CPU, 1 or more, got \[0, 1\]"):
        check_processes("cpu", [0, 1])
    check_processes("cpu", 1)


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("WORLD_SIZE", {"RANK": "0"}),
        ("SLURM_STEP_NUM_TASKS", {"SLURM_NTASKS": "4"}),
        ("OMPI_COMM_WORLD_SIZE", {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}),
        ("PMI_SIZE", {}),
    ],
)
def test_processes_that_would_train_the_same_run_are_refused(monkeypatch, name, others):
    for variable, value in {name: "2", **others}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.delenv("SLURM_JOB_NAME", raising=False)
    with pytest.raises(InvalidValueError, match=r"2 processes were started .* hardware.devices=2"):
        check_processes("cpu", 1)


def test_a_batch_script_of_slurm_is_one_process(monkeypatch):
    for variable, value in {"SLURM_JOB_ID": "3", "SLURM_JOB_NAME": "train.sh", "SLURM_NTASKS": "8"}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS", raising=False)
    check_processes("cpu", 1)
    assert build_fabric(Hardware(accelerator="cpu")).world_size == 1
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")  # srun --ntasks=1 inside the job
    check_processes("cpu", 1)
