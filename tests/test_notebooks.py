"""The notebooks as they are committed: run from top to bottom, with what they printed. CI runs them again."""

import re
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_hold_their_results(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    kinds = [output.output_type for output in outputs]
    assert "error" not in kinds
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not re.search(r"/(home|Users|work|tmp)/", path.read_text(encoding="utf-8"))


def printed(stem):
    """All that a notebook prints."""
    (path,) = [path for path in NOTEBOOKS if path.stem == stem]
    return "\n".join(
        output.text
        for cell in nbformat.read(path, as_version=4).cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream"
    )


def test_the_estimators_are_measured_in_their_notebook():
    """The claims of the text, from the printed figures."""
    text = printed("estimators")
    measured, formula = re.search(r"\n +1 +([\d.]+) +([\d.]+)\n +4 ", text).groups()
    spread = float(re.search(r"varies by ([\d.]+)", text)[1])
    assert float(measured) == pytest.approx(float(formula), rel=0.1)
    assert float(measured) > 10 * spread
    assert re.search(r"\n +25 +[\d.]+ +\S+e-1\d\n", text)
    few, every = re.search(r"at 28 x 28: ([\d.-]+) with 25 products, ([\d.-]+) with 784", text).groups()
    assert few == every
    assert re.search(r"For training    Analytic: exact at [\d.]+ field evaluations forward and backward", text)
    assert re.search(r"For evaluation  Analytic: exact at [\d.]+ field evaluations", text)


def test_bits_are_audited_in_their_notebook():
    text = printed("images")
    total, by_hand = re.search(r"sum of the parts ([\d.]+), NLL / \(d log 2\) ([\d.]+)", text).groups()
    assert total == by_hand
    pairs = float(re.search(r"and pairs of pixels +([\d.]+)", text)[1])
    draws = [float(value) for value in re.findall(r"\n +\d+ draws: ([\d.]+)", text)]
    assert pairs > float(total) > draws[1] > draws[2]
    coarse = dict(re.findall(r" +(\d+) steps: Euler ([\d.]+)", text))
    assert float(coarse["10"]) < float(total)  # the trap that the text warns of
    assert float(re.search(r"solver error +(\S+) nats", text)[1]) < 1e-1
