"""What every estimator promises. A yaml in conf/divergence faces all of it by being there."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from problems import (
    EVENT_SHAPES,
    assert_unbiased,
    assert_variance,
    at_work,
    dense_divergence,
    dense_jacobian,
    perceptron,
    sampled,
)

import flows
from flows.divergence import Bottleneck, Exact, Hutchinson, HutchPlusPlus, Probing, XTrace
from flows.fields import bind

YAMLS = sorted((Path(flows.__file__).parents[1] / "conf" / "divergence").glob("*.yaml"))
ESTIMATORS = {path.stem: instantiate(OmegaConf.load(path)) for path in YAMLS} | {
    **{f"hutchinson-{name}": Hutchinson(3, name) for name in ("rademacher", "gaussian", "sphere")},
    **{f"hutchinson-{name}": Hutchinson(3, name) for name in ("orthonormal", "coordinates")},
    "hutchinson-forward": Hutchinson(4, mode="forward", chunk_size=2),
    "probing-2": Probing(2, num_repeats=2, chunk_size=3),
    "probing-blocks": Probing(3, num_repeats=2, grid_ndim=0),
    "hutch_plus_plus-forward": HutchPlusPlus(9, mode="forward"),
    "xtrace-chunked": XTrace(8, mode="forward", chunk_size=3),
    "bottleneck-forward": Bottleneck(3, "orthonormal", mode="forward"),
    "bottleneck-exact": Bottleneck(exact=True, chunk_size=2),
}
DRAWS = 3000


def estimator_of_the_readme():
    """The class by which the README shows how to add one."""
    text = (Path(flows.__file__).parents[1] / "README.md").read_text()
    (block,) = [
        block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "(DivergenceEstimator)" in block
    ]
    module = types.ModuleType("my_package")
    sys.modules["my_package"] = module
    exec(compile(block, "README.md", "exec"), module.__dict__)
    return module.RandomCoordinates()


ESTIMATORS["readme"] = estimator_of_the_readme()

every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
every_event = pytest.mark.parametrize("event_shape", EVENT_SHAPES.values(), ids=EVENT_SHAPES)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def many_draws(estimator, field, event_shape, count=DRAWS):
    """One point as often as independent draws are wanted, and the estimates there (K, count)."""
    x = torch.randn(1, *event_shape)
    with torch.no_grad():
        return x, sampled(estimator, field, x.expand(count, *event_shape)).estimates


@every_estimator
@every_event
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_and_dtypes(estimator, event_shape, dtype):
    field = perceptron(event_shape).to(dtype)
    x = torch.randn(5, *event_shape, dtype=dtype)
    bound = at_work(estimator, field)
    probes = bound.draw_probes(x, seeded(0))
    sample = sampled(estimator, field, x)
    assert probes is None or probes.dtype == dtype
    assert sample.value.shape == x.shape
    assert sample.estimates.shape == (bound.num_estimates, 5)
    assert sample.value.dtype == sample.estimates.dtype == sample.divergence.dtype == dtype
    torch.testing.assert_close(sample.value, field(torch.tensor(0.3, dtype=dtype), x))
    assert bound.standard_error(sample.estimates.detach()).shape == (5,)
    assert isinstance(bound.is_exact, bool)
    assert bound.cost >= 0


@every_estimator
@every_event
def test_equal_to_the_dense_trace_or_unbiased(estimator, event_shape):
    field = perceptron(event_shape)
    if at_work(estimator, field).is_exact:
        x = torch.randn(6, *event_shape)
        sample = sampled(estimator, field, x)
        truth = dense_divergence(field, torch.tensor(0.3), x)
        torch.testing.assert_close(sample.estimates, truth.expand_as(sample.estimates), rtol=0, atol=1e-10)
        assert at_work(estimator, field).standard_error(sample.estimates.detach()).eq(0).all()
    else:
        x, estimates = many_draws(estimator, field, event_shape)
        truth = dense_divergence(field, torch.tensor(0.3), x).item()
        assert_unbiased(estimates.mean(0), truth)


@every_estimator
@every_event
def test_single_precision_gives_the_same_number(estimator, event_shape):
    field, x = perceptron(event_shape), torch.randn(6, *event_shape)
    bound, t = at_work(estimator, field), torch.tensor(0.3)
    probes = bound.draw_probes(x, seeded(0))
    double = bound(t, x, probes)
    probes = probes.float() if probes is not None and probes.is_floating_point() else probes
    single = at_work(estimator, field.float())(t.float(), x.float(), probes)
    assert single.estimates.dtype == torch.float32
    torch.testing.assert_close(single.estimates.double(), double.estimates, rtol=1e-4, atol=2e-4)


@every_estimator
@every_event
def test_the_norm_of_the_jacobian_beside_it_is_unbiased(estimator, event_shape):
    """Asking for it changes neither value nor estimates."""
    field = perceptron(event_shape)
    x = torch.randn(1, *event_shape).expand(DRAWS // 10, *event_shape)
    bound, t = at_work(estimator, field), torch.tensor(0.3)
    probes = bound.draw_probes(x, seeded(0))
    directions = torch.randn(2, *x.shape, generator=seeded(1)) / 2**0.5
    with torch.no_grad():
        plain = bound(t, x, probes)
        sample = bound.with_jacobian_norm(t, x, probes, directions)
    torch.testing.assert_close(sample.value, plain.value)
    torch.testing.assert_close(sample.estimates, plain.estimates)
    assert plain.squared_jacobian_norm is None
    assert_unbiased(sample.squared_jacobian_norm, dense_jacobian(field, t, x[:1]).square().sum())


@every_estimator
@every_event
def test_variance_is_the_stated_one(estimator, event_shape):
    """By formula where the estimator has one, and as the mean square of its standard error where it gives that."""
    field = perceptron(event_shape)
    if at_work(estimator, field).is_exact:
        return
    x, estimates = many_draws(estimator, field, event_shape)
    draws = estimates.mean(0)
    bound = at_work(estimator, field)
    if hasattr(bound, "variance"):
        jacobian = dense_jacobian(field, torch.tensor(0.3), x)[0]
        assert_variance(draws, bound.variance(jacobian))
    errors = bound.standard_error(estimates)
    if bound.num_estimates == 1:
        assert errors.isnan().all()
    else:
        assert 0.6 < errors.square().mean() / draws.var() < 1.33  # XTrace's is known to be low


@every_estimator
@every_event
def test_the_probes_decide_the_number(estimator, event_shape):
    field = perceptron(event_shape)
    x = torch.randn(4, *event_shape)
    first, again, other = [sampled(estimator, field, x, seed).estimates for seed in (1, 1, 2)]
    assert torch.equal(first, again)
    if not at_work(estimator, field).is_exact:
        assert (first != other).any(0).all()


@every_estimator
@every_event
def test_gradients_are_those_of_the_dense_trace(estimator, event_shape):
    """Of x and the parameters: each if exact, else the mean over draws, along two directions of parameter space."""
    field = perceptron(event_shape)
    parameters = list(field.parameters())
    x = torch.randn(1, *event_shape, requires_grad=True)
    dense = dense_divergence(field, torch.tensor(0.3), x).sum()
    truth = torch.autograd.grad(dense, [x, *parameters], allow_unused=True, materialize_grads=True)

    def gradient(count, seed):
        divergence = sampled(estimator, field, x.expand(count, *event_shape), seed).divergence.mean()
        return torch.autograd.grad(divergence, [x, *parameters], allow_unused=True, materialize_grads=True)

    if at_work(estimator, field).is_exact:
        torch.testing.assert_close(gradient(1, 0), truth, rtol=0, atol=1e-10)
        return
    blocks = [gradient(80, seed) for seed in range(14)]
    for direction in (truth, [torch.randn_like(g) for g in truth]):
        along = [sum((g * u).sum() for g, u in zip(grads, direction, strict=True)) for grads in [truth, *blocks]]
        assert_unbiased(torch.stack(along[1:]), along[0].item())


@every_estimator
@every_event
def test_no_grad_gives_the_same_number_without_a_graph(estimator, event_shape):
    field = perceptron(event_shape).eval()
    x = torch.randn(4, *event_shape)
    recorded = sampled(estimator, field, x)
    with torch.no_grad():
        sample = sampled(estimator, field, x)
    assert recorded.estimates.requires_grad
    assert not sample.value.requires_grad
    assert not sample.estimates.requires_grad
    torch.testing.assert_close(sample.estimates, recorded.estimates.detach())


@every_estimator
@every_event
@pytest.mark.parametrize("gradient", ["backprop", "adjoint"])
def test_trains_a_flow_with_probes_drawn_once_a_solve(estimator, event_shape, gradient, monkeypatch):
    kind, drawn = type(at_work(estimator, perceptron(event_shape))), []
    original = kind.draw_probes
    monkeypatch.setattr(kind, "draw_probes", lambda *a, **k: drawn.append(1) or original(*a, **k))
    solver = flows.ODESolver(method="euler", step_size=0.5, gradient=gradient)
    flow = flows.CNF(perceptron(event_shape, scale=1.0), estimator, solver)
    x = torch.randn(3, *event_shape)
    log_prob = flow.log_prob(x, generator=seeded(0))
    assert drawn == [1]
    log_prob.mean().backward()
    assert drawn == [1]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in flow.parameters())
    flow.eval()
    with torch.no_grad():
        torch.testing.assert_close(flow.log_prob(x, generator=seeded(0)), log_prob.detach())


@every_estimator
def test_the_adjoint_gradient_is_that_of_backprop(estimator):
    field = perceptron((5,), scale=1.0)
    x = torch.randn(3, 5)
    gradients = []
    for gradient in ("backprop", "adjoint"):
        flow = flows.CNF(field, estimator, flows.ODESolver(method="rk4", step_size=0.1, gradient=gradient))
        log_prob = flow.log_prob(x, generator=seeded(0)).mean()
        gradients.append(torch.autograd.grad(log_prob, tuple(field.parameters())))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@every_estimator
@every_event
def test_stays_on_the_device_of_x(estimator, event_shape):
    """Tensors of the meta device refuse to meet those of the CPU."""
    field = perceptron(event_shape).to("meta")
    x = torch.randn(4, *event_shape, device="meta")
    bound = at_work(estimator, field)
    probes = bound.draw_probes(x, seeded(0))
    sample = bound(torch.zeros((), device="meta"), x, probes)
    assert probes is None or probes.device.type == "meta"
    assert sample.value.device.type == sample.estimates.device.type == "meta"


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_the_defaults_of_every_yaml_work_in_the_plane(path):
    """Where most budgets exceed the dimension, and a bottleneck is wider than the event."""
    estimator = instantiate(OmegaConf.load(path))
    field = perceptron((2,), (16, 16))
    x = torch.randn(400, 2)
    sample = sampled(estimator, field, x)
    truth = dense_divergence(field, torch.tensor(0.3), x)
    assert (sample.divergence - truth).mean().abs() < 4 * (sample.divergence - truth).std() / 20 + 1e-10
    sample.divergence.sum().backward()
    assert field.out.weight.grad.isfinite().all()
    assert field.out.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("mode", "chunk_size", "evaluations"),
    [("reverse", None, 1), ("reverse", 2, 1), ("forward", None, 2), ("forward", 2, 5), ("forward", 1, 8)],
)
def test_evaluations_of_the_field(mode, chunk_size, evaluations):
    """Reverse mode shares one graph; forward mode repeats the field for each chunk of the 7 products."""
    field, calls = perceptron((7,)), []

    def counted(t, x):
        calls.append(1)
        return field(t, x)

    at_work(Exact(mode, chunk_size), counted, (7,))(torch.tensor(0.3), torch.randn(3, 7))
    assert len(calls) == evaluations


@every_estimator
@every_event
def test_a_budget_is_kept_and_not_wasted(estimator, event_shape):
    """At any budget: within it or as cheap as it gets, better with more, and no dearer once exact."""
    field = perceptron(event_shape)
    view = bind(field)
    chosen = [estimator.with_budget(budget, view) for budget in range(1, 80)]
    costs = [one.bind(view).cost for one in chosen]
    assert all(type(one) is type(estimator) for one in chosen)
    assert all(cost <= max(budget, costs[0]) for budget, cost in enumerate(costs, start=1))
    assert costs == sorted(costs)
    exact = [cost for one, cost in zip(chosen, costs, strict=True) if one.bind(view).is_exact]
    assert len(set(exact)) <= 1
