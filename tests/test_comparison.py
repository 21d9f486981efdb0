"""The comparison of estimators: its figures against dense Jacobians and formulas, and its advice."""

import dataclasses
import math

import pytest
import torch
from problems import Convolutions, at_work, dense_divergence, dense_jacobian, perceptron

import flows
from flows.compare import Row, advise, as_dict, as_text, compare, error_against_cost
from flows.compare.accuracy import Accuracy, Truth, summarise
from flows.compare.candidates import labelled
from flows.compare.cost import affordable, case
from flows.compare.figure import pareto_front
from flows.compare.measure import Comparison
from flows.compare.memory import peak_memory
from flows.compare.trajectory import Trajectory, trajectory_of
from flows.divergence import (
    Analytic,
    Auto,
    Bottleneck,
    DivergenceEstimator,
    Exact,
    FieldSample,
    Hutchinson,
    HutchPlusPlus,
    Probing,
    XTrace,
    bind,
    linearise,
)

QUICK = {"times": (1.0, 0.5), "draws": 40, "seconds": 0.8}
ALL = {
    "analytic": Analytic(),
    "auto": Auto(),
    "bottleneck": Bottleneck(),
    "exact": Exact(),
    "hutch_plus_plus": HutchPlusPlus(),
    "hutchinson": Hutchinson(),
    "probing": Probing(),
    "xtrace": XTrace(),
}


class Ones(DivergenceEstimator):
    """The popular mistake: the sum of all entries of the Jacobian."""

    def __call__(self, t, x, probes):
        value, products = linearise(self.field, t, x)
        return FieldSample(value, products(torch.ones_like(x)[None]).flatten(2).sum(2))


@dataclasses.dataclass(frozen=True)
class Overconfident(Hutchinson):
    """Noise that states to be exact."""

    @property
    def is_exact(self):
        return True


def flow_of(field):
    return flows.CNF(field, Exact(), flows.ODESolver("rk4", step_size=0.25))


def jacobians_along(flow, x):
    """Dense Jacobians at the points of the comparison, (T, n, d, d)."""
    trajectory = trajectory_of(flow, x, QUICK["times"])
    pairs = zip(trajectory.times, trajectory.x, strict=True)
    return torch.stack([dense_jacobian(flow.field, t, y) for t, y in pairs]).detach()


def rows_of(comparison):
    return {row.label: row for row in comparison.rows}


@pytest.fixture(scope="module")
def on_a_perceptron():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    field = perceptron((16,), (24, 24)).double()
    x = torch.randn(20, 16, dtype=torch.float64)
    estimators = ALL | {"ones": Ones(), "over": Overconfident(2), "wide": Bottleneck(exact=True)}
    return flow_of(field), x, compare(flow_of(field), x, estimators, budgets=(1, 4), **QUICK)


@pytest.fixture(scope="module")
def on_an_image():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    field = Convolutions((1, 9, 9), 2).double()
    x = torch.randn(12, 1, 9, 9, dtype=torch.float64)
    return compare(flow_of(field), x, ALL, budgets=(1, 4), **QUICK)


def test_trajectories_are_those_of_the_flow():
    matrix = torch.randn(3, 3)
    transform = flows.transforms.Standardise((3,)).fit(torch.randn(20, 3) * 3 + 1)
    solver = flows.ODESolver(rtol=1e-10, atol=1e-10)
    flow = flows.CNF(flows.fields.Linear((3,), matrix, torch.zeros(3)), solver=solver, transform=transform)
    x = torch.randn(5, 3)
    for times in ((0.0, 0.25, 1.0), (1.0, 0.0), (0.5,)):
        found = trajectory_of(flow, x, times)
        assert found.times.tolist() == sorted(times, reverse=True)
        for t, state in zip(found.times, found.x, strict=True):
            expected = transform(x)[0] @ torch.linalg.matrix_exp(-(1 - t) * matrix).T
            torch.testing.assert_close(state, expected, rtol=0, atol=1e-7)
    for wrong in ((), (0.5, 1.5), (-0.1,)):
        with pytest.raises(ValueError, match=r"times must be one or more numbers from 0 \(noise\) to 1 \(data\)"):
            trajectory_of(flow, x, wrong)


def test_truth_and_scale_are_those_of_the_dense_jacobian(on_a_perceptron):
    flow, x, comparison = on_a_perceptron
    jacobians = jacobians_along(flow, x)
    dense = jacobians.diagonal(dim1=2, dim2=3).sum(2)
    truth = comparison.truth
    torch.testing.assert_close(truth.divergence, dense, rtol=0, atol=1e-12)
    assert (truth.by, truth.checked_points) == ("Analytic", 20)
    assert truth.check < 1e-12
    assert truth.spread == pytest.approx(float(dense.var(1).mean().sqrt()))
    norm = float(jacobians.square().sum((2, 3)).mean().sqrt())
    assert truth.jacobian_norm == pytest.approx(norm, rel=0.2)  # estimated with one probe a point


def test_standard_deviations_are_those_of_the_formulas(on_a_perceptron):
    flow, x, comparison = on_a_perceptron
    jacobian = jacobians_along(flow, x).flatten(0, 1)
    for estimator in (Hutchinson(1), Hutchinson(4), Probing(1), Probing(4)):
        row = rows_of(comparison)[labelled([estimator, Hutchinson(7), Probing(7)])[0].label]
        expected = float(at_work(estimator, flow.field).variance(jacobian).mean().sqrt())
        assert row.accuracy.sd == pytest.approx(expected, rel=0.15)
        assert row.accuracy.rmse == pytest.approx(expected, rel=0.15)


def test_every_unbiased_estimator_is_found_to_be_so(on_a_perceptron, on_an_image):
    for comparison in (on_a_perceptron[2], on_an_image):
        for label, row in rows_of(comparison).items():
            assert row.accuracy.unbiased == (label != "Ones"), label
    rows = rows_of(on_a_perceptron[2])
    assert {label for label, row in rows.items() if row.exact} == {"Analytic", "Exact"}
    exact = {label: row.products for label, row in rows_of(on_an_image).items() if row.exact}
    assert exact == {"Exact": 81, "Probing(stride=3)": 9, "Probing(stride=5)": 25}  # the last as given


def test_a_bias_shows_in_figures_and_words(on_a_perceptron):
    flow, x, comparison = on_a_perceptron
    row = rows_of(comparison)["Ones"]
    error = jacobians_along(flow, x).sum((2, 3)) - comparison.truth.divergence
    assert row.accuracy.bias == pytest.approx(float(error.mean()), abs=1e-9)
    assert row.accuracy.rmse == pytest.approx(float(error.square().mean().sqrt()), abs=1e-9)
    assert (row.accuracy.sd, row.accuracy.bias_error, row.accuracy.draws) == (0, 0, 1)
    text = as_text(comparison, advise(comparison))
    (line,) = [line for line in text.splitlines() if line.startswith("Ones")]
    assert f"{row.accuracy.bias:+.2g} BIASED" in line
    assert text.count("BIASED") == 1


def test_a_bias_that_cancels_over_the_points_is_found():
    noise = torch.randn(30, 2, 50)
    assert summarise(noise, 1e-9).unbiased
    assert not summarise(noise + 0.9, 1e-9).unbiased
    sides = torch.ones(2, 50)
    sides[:, ::2] = -1
    assert abs(summarise(noise + sides, 1e-9).bias) < 0.1
    assert not summarise(noise + sides, 1e-9).unbiased


def test_summaries_are_calibrated():
    """The error bar of the bias is the spread of the bias over repetitions."""
    found = [summarise(torch.randn(8, 2, 10) * torch.linspace(0.1, 3, 10), 1e-9) for _ in range(400)]
    biases = torch.tensor([one.bias for one in found])
    bars = torch.tensor([one.bias_error for one in found])
    assert float(biases.std() / bars.square().mean().sqrt()) == pytest.approx(1, abs=0.15)
    assert sum(one.unbiased for one in found) > 395
    spread = torch.linspace(0.1, 3, 10).square().mean().sqrt()
    assert float(torch.tensor([one.sd for one in found]).mean()) == pytest.approx(float(spread), rel=0.05)


def test_a_wrong_claim_of_exactness_is_not_believed(on_a_perceptron):
    row = rows_of(on_a_perceptron[2])["Overconfident(num_probes=2)"]
    assert not row.exact
    assert row.accuracy.sd > 0.1
    assert on_a_perceptron[2].truth.by == "Analytic"
    flow, x, _ = on_a_perceptron
    comparison = compare(flow, x, {"over": Overconfident(2)}, budgets=(1,), **QUICK)
    assert comparison.truth.by == "Exact"  # the check caught it
    dense = dense_divergence(flow.field, comparison.truth.divergence.new_tensor(1.0), x)
    torch.testing.assert_close(comparison.truth.divergence[0], dense.detach(), rtol=0, atol=1e-12)


def test_what_does_not_apply_is_listed_with_its_reason(on_a_perceptron, on_an_image):
    perceptron_out = on_a_perceptron[2].not_applicable
    assert perceptron_out == {"wide": "costs 24 products here, more than the 16 of Exact()"}
    assert set(on_an_image.not_applicable) == {"analytic", "bottleneck"}
    text = as_text(on_an_image, advise(on_an_image))
    assert "  analytic: Analytic() needs a field with value_and_divergence(t, x), and Convolutions has none" in text
    assert "  bottleneck: Bottleneck() needs a field with encode(t, x), decode(t, h) and bottleneck_width" in text
    assert on_a_perceptron[2].chosen == {"auto": "Analytic"}
    assert "auto is Probing(stride=3) here" in text
    with pytest.raises(ValueError, match=r"none of the estimators applies: analytic: Analytic\(\) needs a field"):
        compare(flow_of(Convolutions((1, 4, 4), 1)), torch.randn(3, 1, 4, 4), {"analytic": Analytic()}, **QUICK)


def test_chosen_estimators_go_by_the_label_of_their_row():
    flow = flow_of(Convolutions((1, 7, 7), 4))  # for which Auto() is Probing() as it is by default
    comparison = compare(flow, torch.randn(2, 1, 7, 7), {"auto": Auto(), "p": Probing(2)}, budgets=(1,), **QUICK)
    assert comparison.chosen == {"auto": "Probing(stride=5)"}
    assert "Probing(stride=5)" in rows_of(comparison)


def test_the_exact_and_cheap_one_is_recommended(on_a_perceptron, on_an_image):
    advice = advise(on_a_perceptron[2])
    assert (advice.training, advice.evaluation) == ("Analytic", "Analytic")
    assert advice.evaluation_reason.startswith("exact at ")
    assert advice.evaluation_reason.endswith(" field evaluations")
    advice = advise(on_an_image)
    assert (advice.training, advice.evaluation) == ("Probing(stride=3)", "Probing(stride=3)")
    assert advice.training_reason.startswith("exact at 9 products, ")


def row(label, time, sd, products=1, exact=False, unbiased=True, training=True):
    accuracy = Accuracy(0.0, 0.0, sd, sd, unbiased, 2)
    figures = (3.0 * time, 3.0 * time, 1.0) if training else (None, None, None)
    return Row(label, label, products, exact, accuracy, 2, time, time, figures[0], figures[1], 1.0, figures[2])


def comparison_of(*rows, spread=1.0, norm=1.0):
    truth = Truth(torch.zeros(1, 2), "Exact", 2, 0.0, norm, spread)
    return Comparison(list(rows), {}, {}, truth, "MLP", (2,), [1.0], 2, "cpu", "float64")


def test_advice_weighs_noise_against_the_spread_of_the_points():
    noisy, exact = row("Hutchinson", 2.0, sd=1.0), row("Exact", 30.0, sd=0.0, products=30, exact=True)
    calm = advise(comparison_of(noisy, exact, spread=1.0))  # noise doubles the variance, exactness costs 15 times more
    assert (calm.training, calm.evaluation) == ("Hutchinson", "Exact")
    assert calm.training_reason == (
        "a standard deviation of 1, against 1 between points, at 1 product, 6.0 field evaluations forward and "
        "backward; Exact is exact at 90.0"
    )
    assert calm.evaluation_reason == "exact at 30 products, 30.0 field evaluations"
    loud = advise(comparison_of(noisy, exact, spread=0.1))  # 100 times the variance
    assert loud.training == "Exact"
    poor = advise(comparison_of(noisy, row("More", 9.0, 0.4), exact), affordable=10.0)
    assert poor.evaluation == "More"
    assert poor.evaluation_reason.endswith("; Exact is exact at 30.0")
    untrainable = row("Exact", 300.0, sd=0.0, products=300, exact=True, training=False)
    assert advise(comparison_of(noisy, untrainable, spread=0.1)).training == "Hutchinson"


def test_advice_shuns_bias_and_does_not_trust_small_differences():
    exact = row("Exact", 3.0, sd=0.0, products=2, exact=True)
    closed = row("Analytic", 3.3, sd=0.0, products=0, exact=True)
    wrong = row("Ones", 1.0, sd=0.1, unbiased=False)
    advice = advise(comparison_of(wrong, exact, closed))
    assert (advice.training, advice.evaluation) == ("Analytic", "Analytic")
    with pytest.raises(ValueError, match="every estimator measured is biased on this field; add Exact"):
        advise(comparison_of(wrong))
    nothing = advise(comparison_of(exact, closed, norm=0.0))
    assert nothing.training == "Analytic"
    assert nothing.training_reason.startswith("the Jacobian of this field is zero everywhere")


def test_an_untrained_convolution_is_recognised():
    field = flows.fields.ConvNet((1, 4, 4), hidden=(4,))  # its last layer starts at zero
    comparison = compare(flow_of(field), torch.randn(3, 1, 4, 4), {"hutchinson": Hutchinson()}, budgets=(1,), **QUICK)
    assert comparison.truth.jacobian_norm == 0
    assert "zero everywhere (untrained?)" in as_text(comparison, advise(comparison))
    error_against_cost(comparison).draw_without_rendering()


def test_pareto_front():
    points = [(1, 9), (2, 5), (2, 6), (3, 5), (4, 1), (9, 0), (1, 10)]
    assert pareto_front(points) == [0, 1, 4, 5]
    cloud = torch.rand(200, 2).tolist()
    front = set(pareto_front(cloud))
    for index, (cost, error) in enumerate(cloud):
        beaten = any(c <= cost and e <= error and (c < cost or e < error) for c, e in cloud)
        assert (index in front) != beaten


def test_memory_is_what_was_allocated():
    kibi = 1024

    def run():
        one = torch.zeros(100 * kibi, dtype=torch.uint8)
        two = torch.zeros(50 * kibi, dtype=torch.uint8)
        del one
        three = torch.zeros(80 * kibi, dtype=torch.uint8)
        return len(two) + len(three)

    assert peak_memory(run, torch.device("cpu")) == 150 * kibi


def test_the_profiler_is_silent(capfd):
    peak_memory(lambda: torch.zeros(3), torch.device("cpu"))
    assert capfd.readouterr() == ("", "")


def test_cases_leave_the_field_as_it_was():
    field = perceptron((3,))
    trajectory = Trajectory(torch.tensor([0.0, 1.0]), torch.randn(2, 4, 3))
    calls = []
    field.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    case(field, trajectory)()
    assert calls == [False, False]
    probes = at_work(Hutchinson(), field).draw_probes(trajectory.x[0])
    case(field, trajectory, Hutchinson(), probes, training=True)()
    assert calls[2:] == [True, True]
    assert all(parameter.grad is None for parameter in field.parameters())


def test_points_are_cut_to_memory_and_time():
    field = perceptron((6,))
    trajectory = Trajectory(torch.tensor([0.5]), torch.randn(1, 200, 6))
    plenty = affordable(field, trajectory, Exact(), 2**30, 60.0)
    assert plenty.x.shape[1] == 200
    limit = 200_000
    fewer = affordable(field, trajectory, Exact(), limit, 60.0)
    assert 2 < fewer.x.shape[1] < 200
    assert peak_memory(case(field, fewer, Exact(), training=True), torch.device("cpu")) < limit
    assert affordable(field, trajectory, Exact(), None, 1e-9).x.shape[1] == 2


def test_fewer_points_are_reported():
    flow, estimators = flow_of(perceptron((40,))), {"e": Exact(), "h": Hutchinson()}
    comparison = compare(flow, torch.randn(50, 40), estimators, budgets=(1,), memory=1e-3, **QUICK)
    rows = rows_of(comparison)
    assert rows["Exact"].points < rows["Hutchinson"].points
    lines = as_text(comparison, advise(comparison)).splitlines()
    assert any(line.startswith("Exact ") and line.endswith(f" {rows['Exact'].points}") for line in lines)


def test_labels_tell_settings_apart():
    estimators = [
        Hutchinson(1),
        Hutchinson(4),
        Hutchinson(4, "gaussian"),
        Hutchinson(4),
        Exact(),
        Exact("forward"),
        Ones(),
    ]
    found = labelled(estimators)
    assert [one.label for one in found] == [
        "Hutchinson(num_probes=1)",
        "Hutchinson(num_probes=4)",
        "Hutchinson(num_probes=4, probes=gaussian)",
        "Hutchinson(num_probes=4)",
        "Exact",
        "Exact(mode=forward)",
        "Ones",
    ]
    assert [one.kind for one in found][1:4] == ["Hutchinson", "Hutchinson(probes=gaussian)", "Hutchinson"]


def test_the_labels_of_the_picture_do_not_overlap(on_a_perceptron, on_an_image):
    crowd = comparison_of(*(row(f"e{i}", 2 * 1.01**i, sd=0.99**i, products=100 + i) for i in range(8)))
    for comparison in (on_a_perceptron[2], on_an_image, crowd):
        figure = error_against_cost(comparison)
        figure.draw_without_rendering()
        for axes in figure.axes:
            boxes = [text.get_window_extent() for text in axes.texts]
            frame = axes.get_window_extent()
            for index, box in enumerate(boxes):
                assert frame.x0 < box.x0
                assert box.x1 < frame.x1
                assert not any(box.overlaps(other) for other in boxes[index + 1 :])
            (rings,) = axes.collections
            assert len(rings.get_offsets()) == len(boxes)
        entries = [text.get_text() for text in figure.legends[0].get_texts()]
        assert entries == [*dict.fromkeys(row.kind for row in comparison.rows), entries[-1]]
        assert entries[-1].startswith("Pareto front")


def test_figures_are_plain_values(on_a_perceptron):
    import json

    comparison = on_a_perceptron[2]
    broken = dataclasses.replace(comparison.rows[0], ratio=math.nan)
    content = as_dict(dataclasses.replace(comparison, rows=[broken, *comparison.rows[1:]]), advise(comparison))
    read = json.loads(json.dumps(content, allow_nan=False))
    assert read["estimators"][0]["ratio"] is None
    assert read["estimators"][1]["rmse"] == comparison.rows[1].accuracy.rmse
    assert read["not_applicable"] == comparison.not_applicable


def test_conditional_flows_are_compared_at_their_context():
    field = flows.fields.MLP((3,), (8, 8), context_shape=(2,))
    x, context = torch.randn(6, 3), torch.randn(6, 2)
    estimators = {"analytic": Analytic(), "hutchinson": Hutchinson(), "exact": Exact()}
    comparison = compare(flow_of(field), x, estimators, budgets=(1,), context=context, **QUICK)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda y, c: field(torch.tensor(1.0), y[None], c[None])[0]))(
        x, context
    )
    dense = jacobian.diagonal(dim1=1, dim2=2).sum(1).detach()
    torch.testing.assert_close(comparison.truth.divergence[0], dense, rtol=0, atol=1e-12)
    assert rows_of(comparison)["Analytic"].exact


def test_budgets_reach_what_an_estimator_can_do():
    """Known answers for a field of radius 2 on a 9 x 9 image of 3 channels, d = 243."""
    field = Convolutions((3, 9, 9), 2)
    budgets = (1, 2, 4, 12, 27, 100, 243)

    def costs(estimator):
        return [at_work(estimator.with_budget(budget, bind(field)), field).cost for budget in budgets]

    assert costs(Probing()) == [3, 3, 3, 12, 27, 27, 27]
    assert costs(Probing(num_repeats=2)) == [6, 6, 6, 6, 24, 54, 54]
    assert costs(Hutchinson()) == [1, 2, 4, 12, 27, 100, 243]
    assert costs(HutchPlusPlus()) == [3, 3, 3, 12, 27, 99, 243]
    assert costs(XTrace()) == [4, 4, 4, 12, 26, 100, 243]
    assert costs(Exact()) == [243] * 7
    for estimator in (HutchPlusPlus(), XTrace()):
        assert at_work(estimator.with_budget(243, bind(field)), field).is_exact
    assert Bottleneck().with_budget(9, bind(perceptron((12,)))) == dataclasses.replace(Bottleneck(), num_probes=5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"x": torch.zeros(1, 4)}, "at least two points are needed to compare on, got 1"),
        ({"budgets": (0,)}, r"budgets must be whole numbers of products >= 1, such as \[1, 4, 16\], got \[0\]"),
        ({"budgets": ()}, "budgets must be whole numbers"),
        ({"draws": 1}, "draws must be a whole number >= 2, got 1"),
        ({"seconds": 0}, "seconds must be a finite number > 0, got 0"),
        ({"memory": -1}, "memory must be a finite number > 0, got -1"),
    ],
)
def test_errors(settings, message):
    given = {"x": torch.zeros(3, 4), "estimators": ALL, **settings}
    with pytest.raises(ValueError, match=message):
        compare(flow_of(perceptron((4,))), **given)
