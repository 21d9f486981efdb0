"""What a GPU must not change: the numbers, in float64, and what they are made of. Runs where there is one."""

import copy
import math
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from problems import perceptron
from small_run import STAGES, small_flow, small_table, small_trainer, stopping_at
from test_checkpoint import assert_same_state

from flows import CNF, ODESolver, SolverError
from flows.datasets import Batch, DoubleWell
from flows.divergence import Analytic, Exact, Hutchinson
from flows.fields import MLP, ConcatSquashMLP, bind
from flows.objectives import FlowMatching, MaximumLikelihood, ReverseKL
from flows.objectives.couplings import OptimalTransport, Sinkhorn
from flows.path_costs import JacobianNorm, KineticEnergy, TotalDerivative
from flows.solvers import ErrorControl, check_gradients
from flows.training import TrainingInterrupted, load_checkpoint

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

GPU = "cuda"
YAMLS = sorted((Path(__file__).parents[1] / "conf" / "divergence").glob("*.yaml"))
NEAR = {"rtol": 1e-8, "atol": 1e-10}


def on_both(build, compute):
    """``compute(module, device)`` of the same weights on either device, both on the CPU in the end."""
    module = build()
    return [
        [value.detach().cpu() for value in compute(copy.deepcopy(module).to(device), device)] for device in ("cpu", GPU)
    ]


def assert_agree(pair):
    for ours, theirs in zip(*pair, strict=True):
        torch.testing.assert_close(ours, theirs, **NEAR)


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
@pytest.mark.parametrize("event_shape", [(7,), (2, 6, 6)], ids=["points", "image"])
def test_estimators_give_the_numbers_of_the_cpu(path, event_shape):
    estimator = instantiate(OmegaConf.load(path))
    field, x = perceptron(event_shape), torch.randn(5, *event_shape)
    probes = estimator.bind(bind(field)).draw_probes(x, torch.Generator().manual_seed(0))

    def compute(field, device):
        moved = None if probes is None else probes.to(device)
        sample = estimator.bind(bind(field))(torch.tensor(0.3, device=device), x.to(device), moved)
        gradient = torch.autograd.grad(sample.divergence.sum(), [*field.parameters()], allow_unused=True)
        return [sample.value, sample.estimates, *(g for g in gradient if g is not None)]

    assert_agree(on_both(lambda: field, compute))


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
@pytest.mark.parametrize("field", [MLP, ConcatSquashMLP])
@pytest.mark.parametrize("divergence", [Analytic(), Exact(), Hutchinson(2)], ids=repr)
def test_solves_give_the_numbers_gradients_and_steps_of_the_cpu(gradient, field, divergence):
    x, context = torch.randn(6, 2), torch.randn(6, 3)
    steps = []

    def build():
        control = ErrorControl(per_sample=True)
        solver = ODESolver(gradient=gradient, rtol=1e-6, atol=1e-6, error_control=control)
        return CNF(field((2,), (16, 16), context_shape=(3,)), divergence, solver)

    def compute(flow, device):
        estimate = flow.estimate_log_prob(
            x.to(device),
            context.to(device),
            generator=torch.Generator().manual_seed(0),  # of the CPU: the same probes on either device
            solver_error=False,
            path_costs=[KineticEnergy(), JacobianNorm(), TotalDerivative()],
        )
        loss = estimate.value.sum() + sum(cost.sum() for cost in estimate.path_costs.values())
        gradients = torch.autograd.grad(loss, list(flow.parameters()))
        steps.append([(a.accepted, a.component, a.sample) for a in estimate.statistics.attempts])
        return [estimate.value, *gradients]

    assert_agree(on_both(build, compute))
    assert steps[0] == steps[1]


OBJECTIVES = {
    "likelihood": MaximumLikelihood([KineticEnergy(0.1), JacobianNorm(0.1)]),
    "sampled": FlowMatching(target="sampled"),
    "marginal": FlowMatching(target="marginal"),
    "transport": FlowMatching(coupling=OptimalTransport(), target="sampled"),
    "sinkhorn": FlowMatching(coupling=Sinkhorn(), target="sampled"),
    "reverse_kl": ReverseKL(DoubleWell()),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_stay_on_the_gpu(name):
    flow = CNF(MLP((2,), (16, 16)), Analytic()).to(GPU)
    generator = torch.Generator(GPU).manual_seed(0)
    points = torch.empty(64, 0) if name == "reverse_kl" else torch.randn(64, 2)
    output = OBJECTIVES[name](flow, Batch(points.to(GPU)), generator)
    assert output.loss.device.type == GPU
    output.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in flow.parameters())


def test_a_stopped_run_resumes_bit_for_bit(tmp_path):
    settings = {"accelerator": GPU, "deterministic": True}
    small_trainer(tmp_path / "straight", small_table(), **settings).fit()
    with pytest.raises(TrainingInterrupted):
        small_trainer(tmp_path / "run", stopping_at(small_table(), 8), **settings).fit()
    torch.cuda.manual_seed(12345)
    flow = small_flow(small_table(), seed=99)
    small_trainer(tmp_path / "run", small_table(), flow=flow, resume=tmp_path / "run", **settings).fit()
    paths = [tmp_path / name / "checkpoints/last.pt" for name in ("straight", "run")]
    assert_same_state(*map(load_checkpoint, paths))


def test_compiled_training_runs(tmp_path):
    stages = {"flow_matching": STAGES["flow_matching"]}
    summary = small_trainer(tmp_path, small_table(), stages, accelerator=GPU, compile=True).fit()
    assert math.isfinite(summary.metrics["nll"])


def test_errors_and_checks_speak_of_samples():
    class Blown(MLP):
        def forward(self, t, x, context=None):
            return super().forward(t, x) + 1e30 * (x[:, :1] > 90) * x**3

    x = torch.zeros(5, 2, device=GPU)
    x[3] = 100.0
    with pytest.raises(SolverError, match="sample 3"):
        CNF(Blown((2,), (8,)).to(GPU), Exact(), ODESolver(max_steps=50)).log_prob(x)
    assert check_gradients(CNF(MLP((2,), (8,)), Analytic()).to(GPU), torch.randn(8, 2, device=GPU)).difference < 0.1
