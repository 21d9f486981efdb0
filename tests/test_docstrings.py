"""Python blocks in docstrings run, each as a program of its own, in an empty folder and in float32."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest
from test_scripts import TINY

import flows

PACKAGE = Path(flows.__file__).parent
NEEDS_RUN = "flows.training.loading.load_flow"
SLOW = {  # they train, evaluate or draw for a while
    NEEDS_RUN,
    "flows.datasets.densities.image_density.ImageDensity",
    "flows.evaluation.metrics.likelihoods.AUROC",
    "flows.evaluation.outliers.OutlierScores",
    "flows.evaluation.outliers.outlier_scores",
    "flows.plots.classes.class_densities",
    "flows.plots.figures",
    "flows.plots.series.SeriesPrediction",
    "flows.plots.series.phase_portraits",
    "flows.plots.series.predict_curves",
    "flows.plots.series.series_figures",
    "flows.plots.series.time_series",
    "flows.training.trainer.Trainer",
}


def docstrings():
    """The name and the docstring of everything in the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        yield module, ast.get_docstring(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                yield f"{module}.{node.name}", ast.get_docstring(node)


BLOCKS = [
    (name, inspect.cleandoc(block))
    for name, text in docstrings()
    for block in re.findall(r"```python\n(.*?)```", text or "", re.DOTALL)
]
PARAMETERS = [
    pytest.param(name, block, id=name, marks=pytest.mark.slow if name in SLOW else ()) for name, block in BLOCKS
]


@pytest.mark.parametrize(("name", "block"), PARAMETERS)
def test_python_blocks_run(name, block, run):
    if name == NEEDS_RUN:
        folder = re.search(r'"(runs/[^"]*)"', block)[1]
        assert run("train", *TINY, f"output_dir={folder}")[0] == 0
        block = f"import flows\n{block}"
    exec(compile(block, name, "exec"), {"__name__": "docs"})


HOUSES = (
    "bases",
    "compare",
    "datasets",
    "divergence",
    "encoders",
    "equations",
    "evaluation",
    "fields",
    "inference",
    "objectives",
    "path_costs",
    "plots",
    "restoration",
    "solvers",
    "training",
    "transforms",
)
# Results of other public things, in whose examples they appear, and what only the package itself makes.
WITHOUT = {"Advice", "Calibration", "Comparison", "Compilable", "EstimatorCheck", "PathEnergy", "Row"}


def public_classes():
    """The classes that a user may build, by name."""
    for house in (flows, *(importlib.import_module(f"flows.{name}") for name in HOUSES)):
        for name in getattr(house, "__all__", ()):
            found = getattr(house, name)
            if inspect.isclass(found) and not issubclass(found, BaseException) and found.__module__.startswith("flows"):
                yield name, found


def test_every_public_class_has_an_example():
    lacking = {name for name, found in public_classes() if "```python" not in (found.__doc__ or "")}
    assert lacking <= WITHOUT


def test_fences_are_whole():
    """Each opening fence has its end, and none lacks a backtick."""
    wrong = [
        name
        for name, text in docstrings()
        if text and (text.count("```") % 2 or re.search(r"(?<!`)``(?!`)(python|bash|text)?$", text, re.MULTILINE))
    ]
    assert not wrong
