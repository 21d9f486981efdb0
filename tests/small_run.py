"""A run small enough for tests: tiny network, few points, a coarse solver."""

import signal
from dataclasses import fields, replace

import torch

import flows
from flows.datasets import Gaussian, Table
from flows.evaluation import default_evaluator
from flows.objectives import FlowMatching, MaximumLikelihood
from flows.training import Hardware, Optimization, Reporting, Stage, Trainer
from flows.training.loggers import training_curves

STAGES = {
    "flow_matching": Stage(FlowMatching(), steps=6, batch_size=16, learning_rate=1e-2, warmup_steps=2),
    "maximum_likelihood": Stage(MaximumLikelihood(), steps=5, batch_size=24, learning_rate=1e-2),
}
QUIET = {"log_every": 1, "validate_every": 3, "plot_every": None, "checkpoint_every": 1, "progress_bar": False}


def small_gaussian():
    return Gaussian([1.0, -1.0], [[1.0, 0.8], [0.8, 2.0]], num_validation=40, num_test=50, num_reference=100)


def small_table():
    """61 training rows: batches of 16 and 24 end in the middle of a pass over the data."""
    values = torch.randn(81, 2, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 3.0]) + 2.0
    return Table(values, validation_fraction=10 / 81, test_fraction=10 / 81)


def small_flow(dataset, divergence=None, seed=0):
    torch.manual_seed(seed)
    return flows.CNF(
        flows.fields.MLP(dataset.event_shape, hidden=(8, 8)),
        divergence=divergence or flows.divergence.Hutchinson(num_probes=2),
        solver=flows.ODESolver(method="rk4", step_size=0.5),
        transform=flows.transforms.Standardise(dataset.event_shape).fit(dataset.reference()),
    )


EVALUATION = {"evaluation_batch_size": "batch_size", "evaluation_points": "points"}


def options(settings, model, dataset):
    """Arguments of the Trainer from flat settings: each goes to the option class that has a field of its name."""
    arguments = {}
    for name, kind in (("optimization", Optimization), ("hardware", Hardware), ("reporting", Reporting)):
        names = {field.name for field in fields(kind)}
        arguments[name] = kind(**{key: settings.pop(key) for key in names & settings.keys()})
    own = {key: settings.pop(key) for key in (*EVALUATION, "solver_error_points", "divergence") if key in settings}
    if "evaluator" not in settings and hasattr(model, "divergence"):
        seed = settings.get("seed", 0)
        evaluator = default_evaluator(model, dataset, max(seed, 0), arguments["reporting"].progress_bar)
        settings["evaluator"] = replace(evaluator, **{EVALUATION.get(key, key): value for key, value in own.items()})
    return {**settings, **arguments}


def small_trainer(folder, dataset=None, stages=STAGES, flow=None, **settings):
    dataset = small_gaussian() if dataset is None else dataset
    flow = small_flow(dataset) if flow is None else flow
    arguments = options({**QUIET, "accelerator": "cpu", **settings}, flow, dataset)
    return Trainer(flow, dataset, stages, output_dir=folder, **arguments)


def stopping_at(dataset, step, number=signal.SIGINT):
    """The data set, which sends this process a signal when the batch of that step is drawn."""
    train_stream, drawn = dataset.train_stream, []

    def stream_with_signal(*args, **kwargs):
        stream = train_stream(*args, **kwargs)
        draw = stream.next

        def next_batch():
            drawn.append(1)
            if len(drawn) == step:
                signal.raise_signal(number)
            return draw()

        stream.next = next_batch
        return stream

    dataset.train_stream = stream_with_signal
    return dataset


class Memory:
    """A logger that keeps everything."""

    def __init__(self):
        self.rows = []

    def log(self, metrics, step):
        self.rows.append((step, dict(metrics)))

    def close(self):
        pass

    def series(self, name):
        """The values of a metric; `train/...` is that of any stage."""
        rows = [(step, {**metrics, **training_curves(metrics)}) for step, metrics in self.rows]
        return [(step, metrics[name]) for step, metrics in rows if name in metrics]
