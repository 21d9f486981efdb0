"""Kinds of runs, each small enough to be killed many times."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import flows
from flows import plots
from flows.datasets import DoubleWell, Gaussian, Images, Moons, MoonsByClass, Table
from flows.datasets.images.images import LabelledImages
from flows.evaluation import default_evaluator
from flows.models import mass
from flows.objectives import FlowMatching, MaximumLikelihood, ReverseKL
from flows.path_costs import KineticEnergy
from flows.training import Hardware, Optimization, Reporting, Stage, Trainer, load_checkpoint

COUNTS = {"num_validation": 30, "num_test": 30, "num_reference": 60}


def gaussian():
    return Gaussian([1.0, -1.0], [[1.0, 0.8], [0.8, 2.0]], **COUNTS)


def table():
    values = torch.randn(81, 2, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 3.0]) + 2.0
    return Table(values, validation_fraction=10 / 81, test_fraction=10 / 81)


def images():
    levels = torch.randint(4, (40, 1, 2, 2), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    parts = {"train": levels[:30], "validation": levels[30:35], "test": levels[35:]}
    return Images({part: LabelledImages(found) for part, found in parts.items()}, num_levels=4, flip=True)


MATCHING = Stage(FlowMatching(), steps=6, batch_size=16, learning_rate=1e-2, warmup_steps=2)
LIKELIHOOD = Stage(MaximumLikelihood(), steps=5, batch_size=8, learning_rate=1e-2)
COSTLY = Stage(MaximumLikelihood([KineticEnergy(0.01)]), steps=5, batch_size=8, learning_rate=1e-2)
STAGED = {"flow_matching": MATCHING, "likelihood": LIKELIHOOD}
KINDS = {  # the data, the stages, the solver
    "likelihood": (gaussian, {"likelihood": LIKELIHOOD}, {"method": "rk4", "step_size": 0.5}),
    "adaptive": (gaussian, {"likelihood": COSTLY}, {"method": "dopri5", "rtol": 1e-3, "atol": 1e-3}),
    "flow matching": (lambda: Moons(**COUNTS), {"flow_matching": MATCHING}, {"method": "rk4", "step_size": 0.5}),
    "staged": (gaussian, STAGED, {"method": "rk4", "step_size": 0.5}),
    "reverse KL": (
        DoubleWell,
        {"reverse_kl": dataclasses.replace(LIKELIHOOD, objective=ReverseKL(DoubleWell()))},
        {"method": "rk4", "step_size": 0.5},
    ),
    "table": (table, STAGED, {"method": "rk4", "step_size": 0.5}),
    "images": (images, {"flow_matching": MATCHING}, {"method": "rk4", "step_size": 0.5}),
    "conditional": (lambda: MoonsByClass(**COUNTS), STAGED, {"method": "rk4", "step_size": 0.5}),
}


def flow_for(dataset, solver, seed=0):
    torch.manual_seed(seed)
    contexts = {} if dataset.context_shape is None else {"context_shape": dataset.context_shape}
    if dataset.num_levels is None:
        transform = flows.transforms.Standardise(dataset.event_shape)
    else:
        transform = flows.transforms.Dequantise(dataset.num_levels)
    if dataset.has_samples:
        transform.fit(dataset.reference())
    return flows.CNF(
        flows.fields.MLP(dataset.event_shape, hidden=(8, 8), **contexts),
        divergence=flows.divergence.Exact() if isinstance(dataset, DoubleWell) else flows.divergence.Hutchinson(2),
        solver=flows.ODESolver(**solver),
        transform=transform,
    )


def trainer_for(kind, folder, **reporting):
    """The trainer that starts a run of this kind in a folder, or continues it."""
    make_dataset, stages, solver = KINDS[kind]
    dataset = make_dataset()
    flow = flow_for(dataset, solver)
    settings = {"log_every": 1, "validate_every": 3, "plot_every": 4, "checkpoint_every": 2, "progress_bar": False}
    evaluator = dataclasses.replace(default_evaluator(flow, dataset, progress_bar=False), **few_points(dataset))
    object.__setattr__(evaluator, "pictures", one_picture)
    return Trainer(
        flow,
        dataset,
        stages,
        evaluator=evaluator,
        optimization=Optimization(),
        hardware=Hardware(accelerator="cpu"),
        reporting=Reporting(**{**settings, **reporting}),
        output_dir=folder,
        resume="auto",
        config={"kind": kind, "output_dir": None},
    )


def few_points(dataset):
    if isinstance(dataset, DoubleWell):
        return {"points": 40}
    return {"points": 30, "solver_error_points": 0}


def one_picture(model):
    """A quick picture that shows every weight."""
    return {"weights": picture_of([weight.tolist() for weight in model.parameters()])}


def picture_of(content):
    """A picture that differs wherever the content does, drawn in no time."""
    figure = Figure(figsize=(1, 1), dpi=32)
    digest = hashlib.sha512(repr(content).encode()).digest()
    figure.figimage(np.frombuffer(digest, np.uint8).reshape(8, 8), vmin=0, vmax=255)
    return figure


def quick_masses():
    """Integrate densities by few points."""
    mass.NUM_SAMPLES, mass.NUM_DENSITIES = 200, 50
    mass.mass.__defaults__ = (None, None, True, 1_600)


def quick_pictures():
    """Draw the curves and the steps of solves as pictures that take no time, from now on in this process."""
    plots.curves = lambda curves, *rest: picture_of({name: v for name, v in curves.items() if not is_clock(name)})
    plots.steps = lambda solve, purpose=None: picture_of(
        [purpose, solve.nfe_forward, solve.attempts, {name: solve.curve(name) for name in sorted(solve.observed)}]
    )


def flat(value, path=""):
    if isinstance(value, dict | list | tuple):
        named = value.items() if isinstance(value, dict) else enumerate(value)
        return {name: leaf for key, each in named for name, leaf in flat(each, f"{path}/{key}").items()}
    return {path: value}


CLOCKS = ("/position/seconds", "/position/seconds_in_stage", "/run", "/config")


def is_clock(name):
    return "second" in name or name == "output_dir"


def state(folder):
    """All that a finished run leaves, but what clocks have measured; each part by its name."""
    folder = Path(folder)
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir():
            continue
        if path.suffix == ".pt":
            for leaf, value in flat(load_checkpoint(path)).items():
                if leaf not in CLOCKS:
                    found[name + leaf] = value.tolist() if isinstance(value, torch.Tensor) else value
        elif path.name == "metrics.jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{key: value for key, value in row.items() if not is_clock(key)} for row in rows]
        elif path.name == "summary.json":
            found[name] = {key: value for key, value in json.loads(path.read_text()).items() if not is_clock(key)}
        elif path.suffix == ".png":
            found[name] = path.read_bytes()
        elif path.name == "config.yaml":
            found[name] = path.read_text().replace(str(folder), "")
        elif not path.name.startswith("events.out.tfevents."):
            found[name] = path.stat().st_size
    return found | events(folder)


def events(folder):
    accumulator = EventAccumulator(str(folder), {"scalars": 0, "images": 0, "tensors": 0}, purge_orphaned_data=False)
    accumulator.Reload()
    tags = accumulator.Tags()
    scalars = {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in tags["scalars"]}
    pictures = {tag: [(e.step, e.encoded_image_string) for e in accumulator.Images(tag)] for tag in tags["images"]}
    texts = {tag: len(accumulator.Tensors(tag)) for tag in tags["tensors"]}
    return {f"event {tag}": value for tag, value in (scalars | pictures | texts).items() if not is_clock(tag)}


def differences(one, two):
    return sorted(name for name in one.keys() | two.keys() if one.get(name, "nothing") != two.get(name, "nothing"))
