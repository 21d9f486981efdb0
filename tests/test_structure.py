"""The house: imports point one way, and the library stands without the configuration and logging packages."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import flows

PACKAGE = Path(flows.__file__).parent

# What each part may import of the others, from the ground up; a part may always import itself, and all the errors.
GROUND = {
    *("arguments", "checks", "conditions", "equations", "errors", "expectations", "freed_memory", "naming"),
    *("progress", "promises", "shares", "vector_field", "writing"),
}
MODELS = {"bases", "divergence", "dynamics", "encoders", "fields", "models", "path_costs", "solvers", "transforms"}
ABOVE = MODELS | {"datasets"}
ALLOWED = {
    "arguments": set(),
    "checks": set(),
    "conditions": set(),
    "equations": set(),
    "errors": set(),
    "expectations": set(),
    "freed_memory": set(),
    "naming": set(),
    "progress": set(),
    "promises": set(),
    "shares": set(),
    "vector_field": set(),
    "writing": set(),
    "bases": {"encoders"},
    **{part: set() for part in ("datasets", "divergence", "encoders", "fields", "solvers", "transforms")},
    "path_costs": {"divergence"},
    "dynamics": {"divergence", "path_costs", "solvers"},
    "models": MODELS,
    "objectives": ABOVE,
    "evaluation": ABOVE | {"objectives", "plots", "predictions"},
    "plots": ABOVE | {"predictions"},
    "predictions": ABOVE,
    "samples": ABOVE,
    "training": ABOVE | {"evaluation", "objectives", "plots"},
    "density_estimator": ABOVE | {"density_recipe", "evaluation", "objectives", "training"},
    "density_recipe": ABOVE | {"evaluation", "objectives", "training"},
    "exporting": ABOVE,
    "inference": ABOVE | {"evaluation", "objectives", "training"},
    "restoration": ABOVE | {"samples"},
    "sharing": ABOVE | {"density_estimator", "inference", "training"},
    "compare": ABOVE | {"evaluation", "plots"},
    "cli": ABOVE | {"compare", "evaluation", "objectives", "plots", "predictions", "samples", "training"},
    "__init__": MODELS,
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


def of_the_terminal(path):
    """What a file takes from Hydra, from the command line or from the terminal."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        elif isinstance(node, ast.Call):
            names = [ast.unparse(node.func)] if isinstance(node.func, ast.Name) else []
        else:
            continue
        for name in names:
            package = name.partition(".")[0]
            if package in ("hydra", "omegaconf", "argparse") or name in TERMINAL:
                yield name


TERMINAL = ("sys.argv", "sys.exit", "os._exit", "print", "exit", "input")


def test_only_the_programs_know_hydra_and_the_terminal():
    found = {path: set(of_the_terminal(path)) for path in PACKAGE.rglob("*.py") if part_of(path) != "cli"}
    assert {str(path.relative_to(PACKAGE)): names for path, names in found.items() if names} == {}
    programs = {name for path in (PACKAGE / "cli").glob("*.py") for name in of_the_terminal(path)}
    assert {"sys.argv", "sys.exit", "print"} <= programs


def test_scripts_only_call_the_programs():
    scripts = sorted((PACKAGE.parent / "scripts").glob("*.py"))
    assert [path.stem for path in scripts] == ["compare_estimators", "evaluate", "predict", "sample", "train"]
    for path in scripts:
        lines, program = [line for line in path.read_text().splitlines() if line], path.stem.partition("_")[0]
        assert lines == ["from flows.cli.main import start", 'if __name__ == "__main__":', f'    start("{program}")']


# Packages, and costly parts of torch, that `import flows` must not load beyond what `import torch` loads.
LATE = [
    "datasets",
    "hydra",
    "lightning",
    "lightning_fabric",
    "matplotlib",
    "omegaconf",
    "ot",
    "pandas",
    "pyarrow",
    "pydantic",
    "safetensors",
    "scipy",
    "sklearn",
    "tensorboard",
    "torch._dynamo",
    "torch._inductor",
    "torch.optim.swa_utils",
    "torch.utils.tensorboard",
    "torchdiffeq",
    "tqdm",
]


def modules_after(statement):
    code = f"{statement}; import sys; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_import_flows_is_light():
    added = modules_after("import flows; flows.CNF, flows.NeuralODE") - modules_after("import torch")
    assert "flows.solvers.solver" in added
    assert [name for name in LATE if name in added] == []
    assert not {name for name in added if name.startswith("torch.distributed")}


def test_programs_listen_before_they_import_torch():
    assert not {"torch", "numpy", "hydra"} & modules_after("import flows.cli.main")


def test_public_names_load_at_first_use():
    assert {"Trainer", "objectives", "training"} <= set(dir(flows))
    loaded = modules_after("import flows; flows.Trainer; flows.objectives.FlowMatching")
    assert {"flows.training", "flows.objectives"} <= loaded
    with pytest.raises(AttributeError, match="'flows' has no attribute 'nonsense'"):
        flows.nonsense  # noqa: B018


def test_public_names_exist_and_are_documented():
    for module in [flows, flows.divergence, flows.fields, flows.objectives, flows.datasets]:
        for name in module.__all__:
            public = getattr(module, name)
            if inspect.isclass(public) or inspect.isfunction(public) or inspect.ismodule(public):
                assert public.__doc__, f"{module.__name__}.{name} has no docstring"
