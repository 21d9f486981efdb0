"""Processes that share series, or the points of a teacher, find together what one finds alone."""

import copy
from dataclasses import replace

import pytest
import torch

import flows
from flows.datasets import Batch, SeriesBatch
from flows.evaluation import TrajectoryEvaluator, importance_weights
from flows.objectives import DerivativeMatching, Distillation, Reflow, TrajectoryMatching
from flows.path_costs import JacobianNorm, KineticEnergy
from flows.shares import Share, current_share, own_part, sharing
from flows.solvers import ErrorControl, ODESolver, SolverError
from tests.threads import check_shared, in_threads

torch.set_default_dtype(torch.float64)


def ode(solver=None, field=None, **settings):
    torch.manual_seed(0)
    field = flows.fields.MLP((2,), hidden=(8,)) if field is None else field
    for parameter in field.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return flows.NeuralODE(field, solver or loose(), transform=flows.transforms.Standardise(2), **settings)


def loose(**settings):
    return ODESolver(**{"rtol": 1e-3, "atol": 1e-3, **settings})


def series(count=7, length=6, context=None):
    """Series of several lengths that start apart, with gaps; nothing is observed of the third and the fourth."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([length - i % 3 for i in range(count)])
    mask = torch.arange(length) < lengths[:, None]
    times = (torch.rand(count, length, generator=generator) + 0.1).cumsum(1) + torch.arange(count)[:, None]
    times = times.where(mask, times.gather(1, lengths[:, None] - 1))
    observed = (torch.rand(count, length, 2, generator=generator) < 0.8) & mask[..., None]
    observed[:, 0] = True
    observed[2:4, 1:] = False
    x = torch.randn(count, length, 2, generator=generator).where(observed, 0)
    return SeriesBatch(x, context, times=times, mask=mask, observed=observed)


def of_one_time(batch, rows):
    """The same, with nothing but the first time in some rows."""
    mask, observed = batch.mask.clone(), batch.observed.clone()
    mask[rows, 1:] = observed[rows, 1:] = False
    return replace(
        batch,
        x=batch.x.where(observed, 0),
        times=batch.times.where(mask, batch.times[:, :1]),
        mask=mask,
        observed=observed,
    )


def driven(batch):
    """Series with inputs that jump, at times of their own."""
    sample_times = batch.times[:, :1] + torch.linspace(0, 2, 4) * (1 + 0.1 * torch.arange(len(batch)))[:, None]
    inputs = torch.randn(len(batch), 4, 1, generator=torch.Generator().manual_seed(2))
    return replace(batch, context=torch.cat([sample_times[..., None], inputs], 2))


def forced():
    return flows.fields.Forced(
        flows.fields.MLP((2,), hidden=(8,), context_shape=(1,)), "hold", extrapolate=True, context_shape=(4, 2)
    )


COSTS = (KineticEnergy(0.1), JacobianNorm(0.1, exact_up_to=1))
SEGMENTS = TrajectoryMatching(segment_length=3, continuity=0.5, smoothing=3, regularizers=COSTS)
MATCHING = {
    "backprop": (TrajectoryMatching(), {}),
    "adjoint": (TrajectoryMatching(), {"solver": loose(gradient="adjoint")}),
    "checkpoint": (TrajectoryMatching(), {"solver": loose(gradient="checkpoint")}),
    "per sample": (TrajectoryMatching(loss="mae"), {"solver": loose(error_control=ErrorControl(per_sample=True))}),
    "noise": (TrajectoryMatching(loss="gaussian", horizon=0.6), {"noise": 0.3}),
    "segments": (SEGMENTS, {}),
    "segments, adjoint": (SEGMENTS, {"solver": loose(gradient="adjoint")}),
    "costs in the error": (SEGMENTS, {"solver": loose(error_control=ErrorControl(path_costs=1.0))}),
    "fixed steps": (SEGMENTS, {"solver": ODESolver("rk4", step_size=0.3)}),
    "multistep": (TrajectoryMatching(), {"solver": ODESolver("explicit_adams", step_size=0.1)}),
    "derivatives": (DerivativeMatching(), {}),
    "derivatives, smoothed": (DerivativeMatching(window=2, smoothing=5), {}),
}
SLOW = pytest.mark.slow
RARE = ("segments, adjoint", "costs in the error", "per sample", "checkpoint", "multistep")  # kept from the default run


@pytest.mark.parametrize("case", [pytest.param(case, marks=[SLOW] * (case in RARE)) for case in MATCHING])
def test_series_of_processes_are_those_of_one(case):
    """The second of the three processes has no observed value after the first times."""
    objective, settings = MATCHING[case]
    check_shared(objective, ode(**settings), of_one_time(series(), [3]))


@pytest.mark.parametrize("case", ["backprop", "adjoint", "checkpoint", "derivatives", "multistep"])
def test_a_process_whose_series_have_one_time_takes_part(case):
    objective, settings = MATCHING[case]
    check_shared(objective, ode(**settings), of_one_time(series(5, 4), slice(1, 3)))


@pytest.mark.parametrize("gradient", ["backprop", pytest.param("adjoint", marks=SLOW)])
def test_a_process_whose_series_have_ended_keeps_step(gradient):
    batch = series()
    early = batch.times - batch.times[:, :1] <= 1.0
    early[2:] = True
    batch = replace(batch, mask=batch.mask & early, observed=batch.observed & early[..., None])
    batch = replace(batch, x=batch.x.where(batch.observed, 0))
    check_shared(TrajectoryMatching(), ode(loose(gradient=gradient)), batch)


def test_series_at_the_same_times_in_one_process_alone():
    batch = series()
    batch.times[4:], batch.mask[4:] = batch.times[4], batch.mask[4]
    check_shared(TrajectoryMatching(), ode(loose(gradient="adjoint")), batch)


@pytest.mark.parametrize("gradient", ["backprop", pytest.param("adjoint", marks=SLOW)])
def test_steps_of_all_processes_end_at_the_jumps_of_all_inputs(gradient):
    check_shared(TrajectoryMatching(), ode(loose(gradient=gradient), forced()), driven(series(5, 4)))


def test_a_batch_smaller_than_the_processes_is_not_shared():
    check_shared(TrajectoryMatching(), ode(), series()[:2])
    check_shared(DerivativeMatching(), ode(), series()[4:6])
    with sharing(Share(1, 3, lambda own: own)):
        assert own_part(2) == (slice(0, 2), 1)
        assert own_part(7) == (slice(2, 4), 3)


def flow_pair(**options):
    torch.manual_seed(0)
    fields = [flows.fields.MLP((2,), hidden=(8,), **options) for _ in range(2)]
    for field in fields:
        for parameter in field.parameters():
            torch.nn.init.normal_(parameter, std=0.7)
    return [flows.CNF(field, solver=loose()) for field in fields]


@pytest.mark.parametrize("kind", [Reflow, Distillation])
@pytest.mark.parametrize("options", [{}, {"context_shape": (3,)}], ids=["", "contexts"])
def test_a_teacher_of_processes_is_that_of_one(kind, options):
    teacher, flow = flow_pair(**options)
    context = torch.randn(17, 3) if options else None
    check_shared(kind(teacher), flow, Batch(torch.randn(17, 2), context))


def test_a_solve_that_fails_in_one_process_fails_in_all():
    class Exploding(flows.fields.Field):
        def forward(self, t, x, context=None):
            return x**3

    model = flows.NeuralODE(Exploding((2,), None), ODESolver("rk4", step_size=0.1))
    x0, failed = torch.ones(4, 2), []
    x0[3] = 1e3

    def solve(rank):
        try:
            model.trajectory(x0, [0.0, 0.4], rows=current_share().rows(4), solver_error=False)
        except SolverError as error:
            failed.append(str(error))

    in_threads(2, solve)
    assert sorted("in another process" in message for message in failed) == [False, True]
    assert all("is not finite at t = 0.1 with method 'rk4'" in message for message in failed)


def test_predictions_are_those_of_one_process():
    generator = torch.Generator().manual_seed(0)
    times = [(torch.rand(5 + i % 3, generator=generator) + 0.1).cumsum(0) + i for i in range(11)]
    values = [torch.randn(len(one), 2, generator=generator) for one in times]
    data = flows.datasets.Series(times, values, validation_fraction=4 / 11, test_fraction=5 / 11)
    model = ode(noise=0.3)
    evaluator = TrajectoryEvaluator(data, batch_size=3, solver_error_series=4, progress_bar=False)
    assert evaluator.shares
    alone = evaluator.predictions(model)
    for found in in_threads(2, lambda rank: evaluator.predictions(copy.deepcopy(model))):
        for name in ("states", "scaled_error", "solver_error", "sd", "times", "observed"):
            torch.testing.assert_close(getattr(found, name), getattr(alone, name), rtol=1e-9, atol=1e-12)
        assert found.nfe == alone.nfe


def test_importance_weights_are_those_of_one_process():
    energy, (flow, _) = flows.datasets.DoubleWell(), flow_pair()
    assert flows.evaluation.EnergyEvaluator.shares

    def weights(rank=0):
        return importance_weights(copy.deepcopy(flow), energy, 41, 20, torch.Generator().manual_seed(0)).metrics()

    alone = weights()
    for found in in_threads(2, weights):
        assert found.keys() == alone.keys()
        for name, value in found.items():
            assert value == (alone[name] if value is None else pytest.approx(alone[name], rel=1e-6, abs=1e-15))
