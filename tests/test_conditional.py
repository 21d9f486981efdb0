"""Conditional flows from end to end: data with contexts, training, likelihoods, samples."""

import math
from pathlib import Path

import pytest
import torch
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf
from small_run import QUIET, small_gaussian

import flows
from flows import CNF, ODESolver, plots
from flows.cli.sample import sampling_contexts
from flows.datasets import Batch, ConditionalDensity, GaussianMean, MoonsByClass, one_hot
from flows.evaluation import likelihood
from flows.fields import MLP, Linear
from flows.objectives import FlowMatching, MaximumLikelihood
from flows.objectives.contexts import same_context
from flows.objectives.posterior import posterior_moments
from flows.samples import chosen_context, comparable_points
from flows.training import Stage, Trainer, load_flow
from flows.training.building import build_dataset
from flows.training.loading import load_run
from flows.training.runs import build_trainer

CONF = Path(__file__).resolve().parents[1] / "conf"
CONFIGS = {path.stem: OmegaConf.load(path) for path in sorted((CONF / "data").glob("*.yaml"))}
CONDITIONAL = [name for name, config in CONFIGS.items() if issubclass(get_class(config._target_), ConditionalDensity)]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def test_there_are_conditional_toys():
    assert {"moons_by_class", "gaussian_mean"} <= set(CONDITIONAL)


@pytest.mark.parametrize("name", CONDITIONAL)
def test_log_prob_given_a_context_is_a_density_and_its_mean_the_entropy(name):
    density = instantiate(CONFIGS[name])
    assert density.name == name
    batch = density.draw(4_000, rng(1))
    nll = -density.log_prob(batch.x, batch.context)
    assert abs(nll.mean() - density.entropy) < 4 * nll.std() / math.sqrt(len(nll))
    axis = torch.arange(-6, 6, 1 / 16) + 1 / 32
    grid = torch.cartesian_prod(axis, axis)
    for context in (None, *batch.context[:2]):
        log_p = density.log_prob(grid) if context is None else density.log_prob(grid, context)
        assert abs(log_p.exp().sum() / 256 - 1) < 1e-6


@pytest.mark.parametrize("name", CONDITIONAL)
def test_the_density_without_a_context_is_the_mean_over_contexts(name):
    density = instantiate(CONFIGS[name])
    x = density.draw(5, rng(2)).x
    contexts = density.sample_context(40_000, rng(3))
    p = density.log_prob(x, contexts.unsqueeze(1)).exp()
    error = p.std(0) / math.sqrt(len(contexts))
    assert ((p.mean(0) - density.log_prob(x).exp()).abs() < 4 * error).all()


def test_the_entropy_of_a_moon_by_quadrature():
    """Both classes have the same, and it is the mean over the classes of the stated one."""
    axis = torch.arange(-4.5, 4.5, 1 / 16) + 1 / 32
    grid = torch.cartesian_prod(axis, axis)
    for label in (0, 1):
        log_p = MoonsByClass().log_prob(grid, one_hot(torch.tensor(label), 2))
        assert abs(-(log_p.exp() * log_p).sum() / 256 - MoonsByClass.entropy) < 2e-5


@pytest.mark.parametrize("name", CONDITIONAL)
def test_every_batch_holds_the_contexts_of_its_points(name):
    density = instantiate(CONFIGS[name], num_validation=50, num_test=70)
    parts = [
        [density.train_stream(16, rng()).next()],
        list(density.validation_batches(16)),
        list(density.test_batches(16, dtype=torch.float32)),
    ]
    for part in parts:
        for batch in part:
            assert batch.context.shape == (len(batch), *density.context_shape)
            assert batch.context.dtype == batch.x.dtype
            typical = density.log_prob(batch.x, batch.context).mean()
            assert abs(typical + density.entropy) < 2  # a shuffled context would be far less likely
    assert sum(map(len, parts[2])) == 70
    contexts = density.contexts(120)
    torch.testing.assert_close(contexts[:50], torch.cat([batch.context for batch in parts[1]]))
    torch.testing.assert_close(contexts[100:], contexts[:20])
    assert small_gaussian().contexts(3) is None


def test_classes_are_one_hot():
    assert one_hot(torch.tensor([2, 0]), 3).tolist() == [[0, 0, 1], [1, 0, 0]]
    assert one_hot(torch.tensor([1]), 2, torch.float32).dtype == torch.float32
    for labels in (torch.tensor([3]), torch.tensor([-1]), torch.tensor([0.5])):
        with pytest.raises(ValueError, match="labels must be whole numbers from 0 to 2"):
            one_hot(labels, 3)


def test_a_wrong_number_of_contexts_is_refused():
    class Wrong(GaussianMean):
        def sample_context(self, n, generator):
            return torch.zeros(n, 3)

    with pytest.raises(ValueError, match=r"Wrong.sample_context\(5, g\) must return .* shape \(5, 2\)"):
        Wrong().draw(5, rng())


# The objective


def test_the_marginal_target_averages_within_a_class():
    """Its minimum is the marginal velocity given the class: with one point a class, x₁ is known exactly."""
    x, context = torch.tensor([[3.0, 0.0], [-3.0, 1.0]]), torch.eye(2)
    position, t = torch.zeros(2, 2), torch.full((2, 1), 0.3)
    found = posterior_moments(position, t, 1 - t, x, same_context(context, 2))[0]
    torch.testing.assert_close(found, x)
    assert not torch.allclose(posterior_moments(position, t, 1 - t, x)[0], x)


def test_the_marginal_target_with_contexts_that_all_differ_is_the_sampled_one():
    flow = CNF(MLP((2,), (8,), context_shape=(2,)))
    batch = GaussianMean().draw(64, rng())
    marginal, sampled = (
        FlowMatching(kind, divergence_weight=0)(flow, batch, rng(1)).loss for kind in ("marginal", "sampled")
    )
    torch.testing.assert_close(marginal, sampled)


def test_queries_take_their_own_contexts():
    flow = CNF(MLP((2,), (8,), context_shape=(2,)))
    batch = GaussianMean().draw(64, rng())
    few = FlowMatching("marginal", num_queries=16)(flow, batch, rng(1)).loss
    alone = FlowMatching("marginal")(flow, Batch(batch.x[:16], batch.context[:16]), rng(1)).loss
    torch.testing.assert_close(few, alone)  # all contexts differ, so the rest of the batch does not count


# End to end


class ShiftByContext(torch.nn.Module):
    """v = c: x = z + c has the density N(c, I)."""

    event_shape = (2,)

    def forward(self, t, x, context):
        return context + 0 * x


def test_the_distribution_given_a_context_is_exact():
    flow = CNF(ShiftByContext(), solver=ODESolver("rk4", step_size=0.5))
    density = GaussianMean(sd=1.0)
    batch = density.draw(20, rng())
    torch.testing.assert_close(flow(batch.context).log_prob(batch.x), density.log_prob(batch.x, batch.context))
    result = likelihood(flow, density.test_batches(50_000, dtype=torch.float64))
    assert abs(result.nll - density.entropy) < 4 * result.standard_error


class ByClass(torch.nn.Module):
    """A stranger's field that looks its context up."""

    event_shape, context_shape = (2,), ()

    def __init__(self):
        super().__init__()
        self.classes = torch.nn.Embedding(5, 2)
        self.layer = torch.nn.Linear(2, 2)

    def forward(self, t, x, context):
        return torch.tanh(self.layer(x)) + self.classes(context)


def test_a_field_may_look_whole_numbers_up():
    flow = CNF(ByClass(), solver=ODESolver("rk4", step_size=0.5))
    x, classes = torch.randn(6, 2, generator=rng()), torch.tensor([0, 1, 2, 3, 4, 0])
    with torch.no_grad():
        values = flow.log_prob(x, classes)
        assert flow.sample((3,), classes).shape == (3, 6, 2)
        torch.testing.assert_close(values[1:2], flow.log_prob(x[1:2], torch.tensor([1])))
        assert flow.transport(x, context=classes).x.shape == (6, 2)
        assert flow(classes).log_prob(x).equal(values)
    assert FlowMatching(target="sampled")(flow, Batch(x, classes), rng()).loss.isfinite()
    result = likelihood(flow, [Batch(x, classes)])
    assert result.nll == pytest.approx(float(-values.mean()), abs=1e-4)
    path = flows.NeuralODE(ByClass()).trajectory(x, [0.0, 1.0], classes)
    assert path.states.shape == (6, 2, 2)


def test_a_field_of_this_package_computes_with_whole_numbers():
    flow = CNF(MLP((2,), context_shape=(3,), hidden=[8]), solver=ODESolver("rk4", step_size=0.5))
    x, context = torch.randn(6, 2, generator=rng()), torch.eye(3).repeat(2, 1)
    for given in (context.long(), context.bool(), context.double()):
        torch.testing.assert_close(flow.log_prob(x, given), flow.log_prob(x, context))
        losses = [FlowMatching(target="sampled")(flow, Batch(x, c), rng()).loss for c in (given, context)]
        torch.testing.assert_close(*losses)
        paths = [flows.NeuralODE(flow.field)(x, [0.0, 1.0], c) for c in (given, context)]
        torch.testing.assert_close(*paths)


def settings(tmp_path, data, steps=400):
    return {
        "data": {"_target_": f"flows.datasets.{data}", "num_validation": 200, "num_test": 1000},
        "transform": {"_target_": "flows.transforms.Standardise"},
        "field": {"_target_": "flows.fields.MLP", "hidden": [32, 32], "activation": "tanh"},
        "divergence": {"_target_": "flows.divergence.Analytic"},
        "solver": {"_target_": "flows.ODESolver", "method": "rk4", "step_size": 0.2},
        "objective": {
            "flow_matching": {
                "_target_": "flows.training.Stage",
                "objective": {"_target_": "flows.objectives.FlowMatching", "target": "marginal", "num_queries": 64},
                "steps": steps,
                "batch_size": 128,
                "learning_rate": 1e-2,
            }
        },
        "optimizer": {"_target_": "torch.optim.Adam", "_partial_": True},
        "optimization": {"ema_decay": 0.98},
        "hardware": {"accelerator": "cpu"},
        "reporting": {**QUIET, "validate_every": 0, "checkpoint_every": 0},
        "evaluation": {"_target_": "flows.evaluation.DensityEvaluator", "solver_error_points": 0},
        "seed": 0,
        "output_dir": str(tmp_path / "run"),
    }


@pytest.mark.parametrize(("data", "gap"), [("GaussianMean", 0.1), ("MoonsByClass", 0.35)])
def test_training_learns_the_density_given_the_context(tmp_path, data, gap):
    """The gap without the context would be log 2 of the moons, and log 5 of the Gaussian."""
    summary = build_trainer(settings(tmp_path, data)).fit()
    assert -0.05 < summary.metrics["gap"] < gap
    run = load_run(tmp_path / "run")
    density = get_class(f"flows.datasets.{data}")()
    assert run.context_shape == density.context_shape == run.flow.field.context_shape
    assert run.num_classes == density.num_classes
    context = sampling_contexts(run, lambda: build_dataset(run.config), 500, label=1 if run.num_classes else None)
    drawn = run.flow.sample((), context, rng())
    typical = density.log_prob(drawn, context.to(drawn)).clamp_min(-50).mean()
    assert abs(typical + density.entropy) < 1
    assert load_flow(tmp_path / "run").field.context_shape == density.context_shape


def test_flow_and_data_must_agree_on_contexts(tmp_path):
    class Plain(torch.nn.Module):
        event_shape = (2,)

        def forward(self, t, x):
            return x

    conditional, plain = MoonsByClass(), small_gaussian()
    cases = [
        (Linear((2,)), conditional, "Linear takes none; choose a field with a context_shape"),
        (Plain(), conditional, r"Plain takes none; .* give your own a third argument"),
        (MLP((2,), (4,), context_shape=(3,)), conditional, r"was built for contexts of shape \(3,\)"),
        (MLP((2,), (4,), context_shape=(2,)), plain, "'gaussian' has none"),
    ]
    stages = {"flow_matching": Stage(FlowMatching(), steps=1)}
    for field, dataset, message in cases:
        with pytest.raises(ValueError, match=message):
            Trainer(CNF(field), dataset, stages, output_dir=tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_the_context_that_a_user_asks_for():
    assert chosen_context((3,), 3) is None
    assert chosen_context((3,), 3, label=2).tolist() == [0, 0, 1]
    assert chosen_context((3,), 3, values=[0, 0, 0]).tolist() == [0, 0, 0]
    assert chosen_context((1,), None, values=0.5).tolist() == [0.5]
    for arguments, message in [
        ((None, None, 1), "unconditional and takes neither"),
        (((2,), None, 1), "no classes but .* numbers; give a context instead"),
        (((2,), 2, 2), "class must be a whole number from 0 to 1, got 2"),
        (((2,), 2, 0, [1.0, 0.0]), "not both"),
        (((2,), None, None, [1.0]), "context must have 2 numbers, got 1"),
        (((2,), None, None, "x"), "context must be a list of numbers, got 'x'"),
    ]:
        with pytest.raises(ValueError, match=message):
            chosen_context(*arguments)


def test_samples_of_a_class_are_shown_beside_data_of_that_class():
    density = MoonsByClass(num_validation=500)
    upper = comparable_points(density, chosen_context((2,), 2, 0).expand(7, 2))
    assert 150 < len(upper) < 350
    assert density.log_prob(upper, torch.tensor([1.0, 0.0])).min() > -15
    assert len(comparable_points(density, density.contexts(7))) == density.num_reference


def test_conditional_flows_have_pictures():
    flow = CNF(MLP((2,), (8,), context_shape=(2,)), solver=ODESolver("euler", step_size=0.5))
    pictures = plots.figures(flow, MoonsByClass(num_reference=50, num_validation=50), rng())
    assert list(pictures) == ["samples", "class_samples", "class_densities"]
    assert list(plots.figures(flow, GaussianMean(num_reference=50), rng())) == ["samples"]


def test_the_density_of_a_class_is_shown_in_its_column():
    flow = CNF(ShiftByContext(), solver=ODESolver("euler", step_size=1.0))
    figure = plots.class_densities(flow, MoonsByClass(num_validation=50), resolution=20)
    (_, low), (_, right) = ([axes.images[0] for axes in figure.axes[i::2]] for i in (0, 1))
    for label, image in ((0, low), (1, right)):  # N(c, I)
        row, column = divmod(int(image.get_array().argmax()), 20)
        left, end, bottom, top = image.get_extent()
        peak = left + (column + 0.5) / 20 * (end - left), bottom + (row + 0.5) / 20 * (top - bottom)
        assert math.dist(peak, torch.eye(2)[label].tolist()) < (end - left) / 20


def test_maximum_likelihood_takes_contexts():
    flow = CNF(MLP((2,), (8,), context_shape=(2,)), solver=ODESolver("rk4", step_size=0.25))
    batch = MoonsByClass().draw(16, rng())
    loss = MaximumLikelihood()(flow, batch).loss
    torch.testing.assert_close(loss, -flow(batch.context).log_prob(batch.x).mean())


def test_public_names():
    assert {"ConditionalDensity", "GaussianMean", "MoonsByClass", "one_hot"} <= set(flows.datasets.__all__)
