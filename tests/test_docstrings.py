"""Python blocks in docstrings run, each as a program of its own, in an empty folder and in float32."""

import ast
import inspect
import re
from pathlib import Path

import pytest
from test_scripts import TINY

import flows

PACKAGE = Path(flows.__file__).parent
NEEDS_RUN = "flows.training.runs.load_flow"
SLOW = {"flows.training.trainer.Trainer", NEEDS_RUN}  # they train for a while


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


def test_there_are_blocks():
    assert len(BLOCKS) >= 10


def test_fences_are_whole():
    """Each opening fence has its end, and none lacks a backtick."""
    wrong = [
        name
        for name, text in docstrings()
        if text and (text.count("```") % 2 or re.search(r"(?<!`)``(?!`)(python|bash|text)?$", text, re.MULTILINE))
    ]
    assert not wrong
