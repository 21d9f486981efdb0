"""Wrong settings of every kind get one paragraph that names them, exit code 2, and leave nothing behind."""

import importlib
import re
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
import yaml
from figures import report_figure

from flows.training import Trainer

CASES = yaml.safe_load((Path(__file__).parent / "settings.yaml").read_text(encoding="utf-8"))
MODEL = ["data=gaussian", "field.hidden=[4]"]
TINY = [
    *MODEL,
    "data.num_validation=20",
    "data.num_test=20",
    "solver=rk4",
    "objective=flow_matching",
    "objective.flow_matching.steps=2",
    "reporting.plot_every=null",
    "reporting.progress_bar=false",
    "hardware.accelerator=cpu",
]
FOREIGN = re.compile(
    r"Traceback|pydantic|omegaconf|full_key|object_type|site-packages|HYDRA_FULL|usage:|\w+Exception", re.I
)
MAX_SECONDS = 60  # a hang, on a busy machine


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run for the programs that need one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    folder = tmp_path_factory.mktemp("trained") / "run"
    importlib.import_module("flows.cli.train").main([*TINY, f"output_dir={folder}"])
    torch.set_default_dtype(before)
    return folder


def complaints(case, trained, folder, monkeypatch, capsys):
    """What is wrong with the answer to a case."""
    start = {
        "train": [*MODEL, "output_dir=o"],
        "evaluate": [f"checkpoint={trained}"],
        "sample": [f"checkpoint={trained}", "output=o.npy", "num_samples=5", "plot=false"],
        "compare": [
            *MODEL,
            "output_dir=o",
            "points=4",
            "measure.seconds=0.05",
            "progress_bar=false",
            "estimators=[exact]",
        ],
        "flows": [],
    }[case["program"]]
    given = {setting.partition("=")[0].lstrip("+~") for setting in case["settings"]}
    arguments = [*(setting for setting in start if setting.partition("=")[0] not in given), *case["settings"]]
    module = "main" if case["program"] == "flows" else case["program"]
    begun = time.monotonic()
    with monkeypatch.context() as changed:
        changed.chdir(folder)
        changed.setattr(Trainer, "fit", _starts)
        changed.setattr(sys, "argv", ["flows", *arguments])
        for name, value in case.get("environment", {}).items():
            changed.setenv(name, value)
        try:
            importlib.import_module(f"flows.cli.{module}").main(arguments)
            code = 0
        except SystemExit as stop:
            code = stop.code
        except Exception as error:
            code = f"traceback of {type(error).__name__}: {error}"
    plt.close("all")
    text = capsys.readouterr().err.strip()
    left = sorted(path.name for path in folder.iterdir())
    found = [f"exit code {code}"] if code != 2 else []
    found += [f"no {word!r}" for word in case["expect"] if word not in text]
    found += ["more than a paragraph"] if len(text.splitlines()) != 1 or not text.startswith("Error: ") else []
    found += [f"foreign words {FOREIGN.findall(text)}"] if FOREIGN.search(text) else []
    found += [f"left behind {left}"] if left else []
    found += ["hang"] if time.monotonic() - begun > MAX_SECONDS else []
    return [f"{case['id']}: {', '.join(found)} in {text[:300]!r}"] if found else []


def _starts(trainer):
    raise SystemExit("training starts")


def check(cases, *fixtures):
    _, tmp_path, *_ = fixtures
    trained, _, monkeypatch, capsys = fixtures
    wrong = []
    for number, case in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        wrong += complaints(case, trained, folder, monkeypatch, capsys)
    tracebacks, hangs = (sum(word in line for line in wrong) for word in ("traceback of", "hang"))
    left, foreign = (sum(word in line for line in wrong) for word in ("left behind", "foreign words"))
    report_figure(
        f"bad settings: {len(cases)} cases, {len(wrong)} wrong, {tracebacks} tracebacks, {hangs} hangs, {left} folders "
        f"left behind, {foreign} foreign messages"
    )
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("part", range(4))
def test_a_sample_of_the_bad_settings(part, trained, tmp_path, monkeypatch, capsys):
    check(CASES[part::32], trained, tmp_path, monkeypatch, capsys)


@pytest.mark.slow
def test_all_bad_settings(trained, tmp_path, monkeypatch, capsys):
    assert len(CASES) >= 300
    assert len({case["id"] for case in CASES}) == len(CASES)
    check(CASES, trained, tmp_path, monkeypatch, capsys)
