import runpy
import sys
from pathlib import Path

import matplotlib
import pytest
import torch

matplotlib.use("Agg")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _float64_and_seed():
    """Every test runs in float64 from one seed and leaves no global setting behind."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # test workers share the cores, and the tensors are small
    yield
    torch.set_default_dtype(before)


@pytest.fixture(autouse=True)
def _coarse_pictures(monkeypatch):
    """Pictures of densities have few pixels unless a test asks for more: each is a solve."""
    from flows import plots

    for draw, pixels in ((plots.density, 24), (plots.class_densities, 24)):
        monkeypatch.setattr(draw.__wrapped__, "__defaults__", (pixels,))  # what the check of arguments calls


@pytest.fixture(autouse=True)
def _no_layout(monkeypatch):
    """Figures are drawn without arranging their parts, which is half of the work, unless a module says otherwise."""
    monkeypatch.setattr("matplotlib.layout_engine.ConstrainedLayoutEngine.execute", lambda self, figure: None)


@pytest.fixture(autouse=True)
def _coarse_masses(monkeypatch):
    """A density is integrated by few points, unless a module says otherwise: small runs took long for that."""
    from flows.models import mass

    monkeypatch.setattr(mass, "NUM_SAMPLES", 200)
    monkeypatch.setattr(mass, "NUM_DENSITIES", 50)
    monkeypatch.setattr(mass.mass, "__defaults__", (None, None, True, 1_600))


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run a script in this process, in an empty folder; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)

    def run_script(name, *arguments):
        monkeypatch.setattr(sys, "argv", [str(ROOT / "scripts" / f"{name}.py"), *map(str, arguments)])
        code = 0
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_script
