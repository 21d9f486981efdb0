"""The scripts of the folder `examples` run, with fewer steps than a reader's, and stay short."""

import re
from pathlib import Path

import pytest
import torch

SCRIPTS = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_examples_run(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(script)])
    torch.set_default_dtype(torch.float32)  # as a reader would run it
    program = re.sub(r"^(STEPS|SIMULATIONS)(.*) = .*$", shorter, script.read_text(), flags=re.MULTILINE)
    exec(compile(program, script.name, "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out


def shorter(line):
    return line[0].partition(" = ")[0] + (" = 3, 100" if "," in line[0] else " = 3")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_examples_are_short_and_say_how_to_run_them(script):
    text = script.read_text()
    assert len(text.splitlines()) <= 40
    assert f"python examples/{script.name}" in text.partition("\n")[0]
