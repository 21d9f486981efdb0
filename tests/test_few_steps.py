"""Sampling in few evaluations: fitted grids, straighter paths, distilled steps."""

import copy
import shutil

import pytest
import torch
from torch import nn

import flows
from flows import CNF, ODESolver, fit_grid
from flows.datasets import Moons
from flows.fields import MLP
from flows.objectives import Distillation, Reflow
from tests.problems import perceptron


class Late(nn.Module):
    """A rotation, most of which happens near t = 1."""

    event_shape = (2,)

    def forward(self, t, x):
        return 0.05 * torch.exp(4 * t) * torch.stack([-x[:, 1], x[:, 0]], 1)


def curved():
    """A flow that needs short steps late, and points of its base."""
    flow = CNF(Late()).double()
    return flow, torch.randn(256, 2, generator=torch.Generator().manual_seed(1))


def distance(flow, solver, start):
    """Root mean square distance in flow space from the ends of accurate paths."""
    exact = copy.copy(flow)
    exact.solver, flow.solver = ODESolver(rtol=1e-9, atol=1e-9), solver
    ends = [model.transport(start, (0.0, 1.0), log_density=False).x for model in (exact, flow)]
    return float((ends[0] - ends[1]).square().mean().sqrt())


@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4"])
def test_a_fitted_grid_is_never_worse_than_the_even_one_on_its_batch(method):
    flow, start = curved()
    evaluations = 8
    flow.base.sample = lambda shape, generator=None: start
    fitted = fit_grid(flow, evaluations, method, steps=25)
    steps = len(fitted.grid) - 1
    even = ODESolver(method, step_size=1 / steps)
    assert distance(flow, fitted, start) < 0.8 * distance(flow, even, start)
    unfitted = fit_grid(flow, evaluations, method, steps=0)
    assert distance(flow, unfitted, start) == pytest.approx(distance(flow, even, start))
    assert flow.transport(start, (0.0, 1.0), log_density=False).statistics.nfe_forward == evaluations


def test_auto_takes_the_best_method():
    flow, start = curved()
    flow.base.sample = lambda shape, generator=None: start
    best = distance(flow, fit_grid(flow, 4, steps=10), start)
    for method in ("euler", "midpoint", "heun2", "rk4"):
        assert best <= distance(flow, fit_grid(flow, 4, method, steps=10), start) + 1e-9
    with pytest.raises(ValueError, match=r"evaluations must be a multiple of 4, the stages of 'rk4', got 6"):
        fit_grid(flow, 6, "rk4")


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
def test_a_grid_sets_the_steps_in_both_directions(gradient):
    """With the points of an even grid, all is as with its step size; `tighter` divides each interval."""
    flow = CNF(perceptron((2,), (8, 8)))
    x = torch.randn(5, 2)
    found = []
    for settings in ({"step_size": 0.25}, {"grid": [-1.0, 0.0, 0.25, 0.5, 0.75, 1.0, 2.0]}):
        flow.solver = ODESolver("rk4", gradient=gradient, **settings)
        estimate = flow.estimate_log_prob(x)
        assert estimate.nfe == 16
        gradient_of = torch.autograd.grad(estimate.value.sum(), flow.field.out.weight)[0]
        found.append((estimate.value.detach(), gradient_of))
    torch.testing.assert_close(*found)
    uneven = ODESolver("euler", grid=(0.0, 0.9, 1.0))
    solution = uneven.solve(lambda t, s: (t.expand_as(s[0]),), (torch.zeros(1),), (1.0, 0.0))
    assert [attempt.dt for attempt in solution.statistics.attempts] == pytest.approx([-0.1, -0.9])
    finer = uneven.tighter().grid  # tenths, and at most 0.05 long
    assert finer == pytest.approx([0.05 * k for k in range(18)] + [0.9 + 0.01 * k for k in range(11)])


def test_errors_of_grids():
    with pytest.raises(ValueError, match=r"grid must be at least two increasing numbers, .* got \[0, 0.5, 0.5\]"):
        ODESolver("euler", grid=[0, 0.5, 0.5])
    with pytest.raises(ValueError, match=r"grid sets the steps of a Runge-Kutta method with fixed steps, .*one of the"):
        ODESolver("euler", step_size=0.1, grid=[0, 1])
    with pytest.raises(ValueError, match=r"grid sets .* choose a method such as 'midpoint'"):
        ODESolver(grid=[0, 1])


def learnt(flow, objective, steps):
    """Train in place, without a Trainer."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(flow.parameters(), 3e-3)
    for batch in (Moons().train_stream(256, generator).next() for _ in range(steps)):
        optimizer.zero_grad()
        objective(flow, batch, generator).loss.backward()
        optimizer.step()


def curvature(flow):
    """E ∫ ‖v(t, x_t) − (x₁ − x₀)‖² dt, zero for straight paths."""
    start = torch.randn(500, 2, generator=torch.Generator().manual_seed(2))
    times = torch.linspace(0, 1, 17)
    with torch.no_grad():
        path = flow.transport(start, times, log_density=False).x
        velocity = torch.stack([flow.field(t, x) for t, x in zip(times, path, strict=True)])
    return float((velocity - (path[-1] - path[0])).square().mean())


@pytest.mark.slow
def test_reflow_makes_paths_straighter_and_distillation_makes_two_steps_exact():
    flow = CNF(MLP((2,), (32, 32)))
    learnt(flow, flows.objectives.FlowMatching(), 200)
    teacher = copy.deepcopy(flow)
    two = ODESolver("euler", step_size=0.5)
    student = copy.deepcopy(flow)
    learnt(student, Distillation(teacher, two), 100)
    learnt(flow, Reflow(teacher), 150)
    assert curvature(flow) < 0.4 * curvature(teacher)
    start = torch.randn(500, 2, generator=torch.Generator().manual_seed(3))

    def error(model, solver):
        model.solver = solver
        with torch.no_grad():
            ends = [m.transport(start, (0.0, 1.0), log_density=False).x for m in (teacher, model)]
        return float((ends[0] - ends[1]).square().mean().sqrt())

    assert error(student, two) < 0.5 * error(copy.deepcopy(teacher), two)
    assert error(flow, two) < 0.7 * error(copy.deepcopy(teacher), two)


def test_errors_of_teachers():
    flow = CNF(MLP((2,), (8,)))
    batch = Moons().train_stream(4, torch.Generator()).next()
    with pytest.raises(ValueError, match=r"the teacher is the flow that is trained; give a copy, copy\.deepcopy"):
        Reflow(flow)(flow, batch)
    with pytest.raises(ValueError, match=r"the teacher has events of shape \(3,\), and the flow of shape \(2,\)"):
        Distillation(CNF(MLP((3,), (8,))))(flow, batch)
    with pytest.raises(ValueError, match=r"solver must take a few fixed steps, got the adaptive method 'flow5'"):
        Distillation(copy.deepcopy(flow), ODESolver())
    for part in ({"base": flows.bases.StudentT((2,))}, {"transform": flows.transforms.Standardise((2,))}):
        with pytest.raises(ValueError, match=f"the {next(iter(part))} of the teacher is S.* learn paths between other"):
            Reflow(CNF(MLP((2,), (8,)), **part))(flow, batch)
    with pytest.raises(ValueError, match=r"Reflow has no teacher yet: give one, or train with a Trainer and a stage"):
        Reflow()(flow, batch)
    with pytest.raises(ValueError, match=r"Reflow learns from a trained flow: give teacher=RUN, .* or put a stage"):
        flows.Trainer(flow, Moons(), Reflow(), steps=2).fit()


def test_a_teacher_of_fewer_digits_teaches_in_those_of_the_flow():
    teacher = CNF(MLP((2,), (8,))).float().train()
    batch = Moons().train_stream(4, torch.Generator()).next()
    loss = Reflow(teacher)(copy.deepcopy(teacher).double(), flows.datasets.Batch(batch.x.double())).loss
    assert loss.dtype == torch.float64
    assert (teacher.dtype, teacher.training) == (torch.float32, True)  # the user's own is left alone


QUIET = flows.training.Reporting(progress_bar=False, plot_every=None, checkpoint_every=1, log_every=1)


def trained(folder, steps=3, resume=None):
    """Flow matching, then reflow of what it found."""
    stages = {
        "matching": flows.training.Stage(flows.objectives.FlowMatching(), steps=2, batch_size=8),
        "reflow": flows.training.Stage(Reflow(), steps=steps, batch_size=8, schedule="constant"),
    }
    torch.manual_seed(0)
    flow, data = CNF(MLP((2,), (8,))), Moons(num_validation=20, num_test=20)
    flows.Trainer(flow, data, stages, reporting=QUIET, output_dir=folder, resume=resume).fit()
    return torch.load(folder / "checkpoints/last.pt", weights_only=True)


def test_reflow_after_a_stage_learns_from_its_flow_also_when_resumed(tmp_path):
    """The teacher is kept with the run, so that it goes on bit for bit."""
    trained(tmp_path / "short", steps=1)
    resumed = trained(tmp_path / "resumed", resume=tmp_path / "short/checkpoints/last.pt")
    straight = trained(tmp_path / "straight")
    for name, weights in straight["model"].items():
        assert torch.equal(resumed["model"][name], weights), name


def test_a_teacher_that_trains_on_teaches_a_resumed_run_what_it_did_before(tmp_path):
    def taught(folder, steps=2, resume=None):
        stage = flows.training.Stage(Reflow(str(tmp_path / "teacher")), steps=steps, batch_size=8, schedule="constant")
        torch.manual_seed(0)
        flow, data = CNF(MLP((2,), (8,))), Moons(num_validation=20, num_test=20)
        trainer = flows.Trainer(flow, data, {"reflow": stage}, reporting=QUIET, output_dir=folder, resume=resume)
        trainer.fit()
        return torch.load(folder / "checkpoints/last.pt", weights_only=True)["model"]

    trained(tmp_path / "teacher", steps=1)
    taught(tmp_path / "short", steps=1)
    straight = taught(tmp_path / "straight")
    shutil.rmtree(tmp_path / "teacher")
    trained(tmp_path / "teacher", steps=2)
    resumed = taught(tmp_path / "resumed", resume=tmp_path / "short/checkpoints/last.pt")
    for name, weights in straight.items():
        assert torch.equal(resumed[name], weights), name


@pytest.mark.slow
def test_distillation_of_a_run_from_the_shell(run, tmp_path, monkeypatch):
    """The student starts as its teacher, has its model, and draws by the steps that it was trained for."""
    tiny = ["reporting.plot_every=null", "reporting.progress_bar=false"]
    data = ["data=moons", "data.num_validation=20", "data.num_test=20", "field.hidden=[8]"]
    assert run("train", *data, *tiny, "objective=flow_matching", "steps=2", "output_dir=first")[0] == 0
    code, _, err = run("train", "teacher=first", "objective=distillation", "steps=2", *tiny, "output_dir=student")
    assert code == 0, err
    student = flows.load(tmp_path / "student")
    assert (student.solver.method, student.solver.step_size) == ("euler", 0.25)
    assert student.field.hidden == (8,)
    first = dict(flows.load(tmp_path / "first").named_parameters())
    change = max((weights - first[name]).abs().max() for name, weights in student.named_parameters())
    assert 0 < change < 0.01  # two steps
    monkeypatch.chdir(tmp_path / "first")  # from another folder
    code, out, err = run("train", "resume=../student", "objective.distillation.steps=3")
    assert code == 0, err
    monkeypatch.chdir(tmp_path)
    code, _, err = run("train", "teacher=first", "objective=reflow", "field.hidden=[9]")
    assert code == 2
    assert "the model and the data are those of the teacher" in err
    code, _, err = run("train", "teacher=first")
    assert code == 2
    assert "teacher=first needs an objective that learns from it: objective=reflow or objective=distillation" in err
    grids = []
    for _ in range(2):
        base = ("sample", "checkpoint=first", "num_samples=20", "plot=false", "output=samples.npy")
        code, out, err = run(*base, "evaluations=3")
        assert code == 0, err
        grids.append(out)
    assert "kept in first/grids.json" in grids[0]
    assert "from first/grids.json" in grids[1]
    assert grids[0].split("]")[0] == grids[1].split("]")[0]
