"""The house: imports point one way, and the library stands without the configuration and logging packages."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import flows

PACKAGE = Path(flows.__file__).parent

# What each part may import of the others, from the ground up; a part may always import itself, and all the errors.
GROUND = {"errors", "naming"}
MODELS = {"bases", "divergence", "dynamics", "fields", "models", "path_costs", "solvers", "transforms"}
ABOVE = MODELS | {"datasets"}
ALLOWED = {
    "errors": set(),
    "naming": set(),
    **{part: set() for part in ("bases", "datasets", "divergence", "fields", "solvers", "transforms")},
    "path_costs": {"divergence"},
    "dynamics": {"divergence", "path_costs", "solvers"},
    "models": MODELS,
    "objectives": ABOVE,
    "evaluation": ABOVE,
    "plots": ABOVE | {"evaluation"},
    "training": ABOVE | {"evaluation", "objectives", "plots"},
    "compare": ABOVE | {"evaluation", "plots"},
    "cli": ABOVE | {"compare", "evaluation", "objectives", "plots", "training"},
    "__init__": ABOVE | {"evaluation", "objectives"},
}


def part_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_parts(path):
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "flows" else [f"flows.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("flows."))


def test_imports_point_one_way():
    wrong = [
        f"{path.relative_to(PACKAGE)} imports flows.{target}"
        for path in PACKAGE.rglob("*.py")
        for target in imported_parts(path)
        if target != part_of(path) and target not in ALLOWED[part_of(path)] | GROUND
    ]
    assert not wrong


def test_the_library_needs_neither_hydra_nor_tensorboard():
    code = "import flows, sys; print([m for m in ('hydra', 'omegaconf', 'tensorboard') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_public_names_exist_and_are_documented():
    for module in [flows, flows.divergence, flows.fields, flows.objectives, flows.datasets]:
        for name in module.__all__:
            public = getattr(module, name)
            if inspect.isclass(public) or inspect.isfunction(public) or inspect.ismodule(public):
                assert public.__doc__, f"{module.__name__}.{name} has no docstring"
