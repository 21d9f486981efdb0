"""Pictures: which there are, that they show what they say, and that they leave no trace."""

import sys

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection
from small_run import small_flow, small_gaussian, small_table

import flows
from flows import plots
from flows.cli import sweeps
from flows.datasets import Gaussian, Table
from flows.plots.plane import square
from flows.plots.style import quantiles


@pytest.fixture(autouse=True)
def _no_layout():
    """Figures are drawn as in a run here."""


class ZeroField(torch.nn.Module):
    event_shape = (2,)

    def forward(self, t, x):
        return 0 * x


def test_points_of_the_plane_get_four_pictures(monkeypatch):
    dataset = small_gaussian()
    pictures = plots.figures(small_flow(dataset), dataset, torch.Generator().manual_seed(0))
    assert list(pictures) == ["samples", "density", "trajectories", "evolution"]


def test_other_vectors_get_pairs_of_features():
    dataset = Table(torch.randn(60, 6), columns=list("abcdef"))
    flow = small_flow(dataset)
    (name,) = pictures = plots.figures(flow, dataset, torch.Generator().manual_seed(0))
    assert name == "samples"
    shown = [axes for axes in pictures[name].axes if axes.axison]
    assert len(shown) == 10  # four histograms, six pairs
    labels = {axes.get_xlabel() for axes in shown} | {axes.get_ylabel() for axes in shown}
    assert labels == {"a", "b", "c", "d", ""}


def test_a_single_feature_gets_a_histogram():
    figure = plots.samples(torch.randn(50, 1), torch.randn(60, 1))
    assert len(figure.axes) == 1


def test_a_conditional_flow_has_no_picture_of_its_own():
    field = flows.fields.MLP((2,), hidden=(4,), context_shape=(1,))
    assert plots.figures(flows.CNF(field), small_gaussian()) == {}


def test_the_density_is_shown_where_it_is():
    """A standard normal seen through a transform: pixels are compared with the closed form, axes included."""
    dataset = Gaussian([3.0, -1.0], [[1.0, 0.0], [0.0, 0.25]], num_reference=5000)
    transform = flows.transforms.Standardise((2,))
    transform.mean.copy_(torch.tensor([3.0, -1.0]))
    transform.sd.copy_(torch.tensor([1.0, 0.5]))
    figure = plots.density(flows.CNF(ZeroField(), transform=transform), dataset, resolution=20)
    data, flow = (axes.images[0] for axes in figure.axes[:2])
    assert np.asarray(flow.get_array()) == pytest.approx(np.asarray(data.get_array()), abs=1e-12)
    left, right, bottom, top = flow.get_extent()
    assert right - left == pytest.approx(top - bottom)
    centres = torch.cartesian_prod(
        torch.tensor(np.linspace(left, right, 41)[1::2]), torch.tensor(np.linspace(bottom, top, 41)[1::2])
    )
    expected = dataset.log_prob(centres).exp().reshape(20, 20).T
    assert np.asarray(flow.get_array()) == pytest.approx(expected.numpy(), abs=1e-12)
    assert data.get_clim() == flow.get_clim()
    mass = expected.sum() * (right - left) * (top - bottom) / 400
    assert float(mass) == pytest.approx(1, abs=0.02)


def test_densities_say_what_they_were_evaluated_with():
    dataset = small_gaussian()
    for name, expected in ((None, []), ("Analytic", ["evaluated with Analytic"])):
        figure = plots.density(small_flow(dataset), dataset, resolution=4, evaluated_with=name)
        assert [text.get_text() for axes in figure.axes for text in axes.texts] == expected


def test_data_without_a_density_is_shown_as_a_histogram():
    dataset = small_table()
    figure = plots.density(small_flow(dataset), dataset, resolution=8)
    image = figure.axes[0].images[0]
    left, right, bottom, top = image.get_extent()
    area = (right - left) * (top - bottom) / np.asarray(image.get_array()).size
    assert float(np.asarray(image.get_array()).sum() * area) == pytest.approx(1, abs=0.05)
    assert figure.axes[0].get_title() == "61 data points"


def test_paths_begin_at_the_base_and_end_at_samples_in_data_space():
    """With v = c the paths are straight: from z to z + c in flow space, standardised back into data space."""

    class Drift(torch.nn.Module):
        event_shape = (2,)

        def forward(self, t, x):
            return 0 * x + torch.tensor([2.0, 0.0])

    transform = flows.transforms.Standardise((2,))
    transform.mean.copy_(torch.tensor([10.0, 0.0]))
    transform.sd.copy_(torch.tensor([3.0, 1.0]))
    data = torch.randn(100, 2) * torch.tensor([3.0, 1.0]) + torch.tensor([16.0, 0.0])
    flow = flows.CNF(Drift(), transform=transform)
    figure = plots.trajectories(flow, data, num_paths=7, num_times=5, generator=torch.Generator().manual_seed(0))
    axes = figure.axes[0]
    (lines,) = [artist for artist in axes.collections if isinstance(artist, LineCollection)]
    start, end = (np.asarray(artist.get_offsets()) for artist in axes.collections if artist is not lines)
    z = flow.base.sample((7,), torch.Generator().manual_seed(0))
    assert start == pytest.approx((z * transform.sd + transform.mean).numpy(), abs=1e-12)
    assert end == pytest.approx(start + np.array([6.0, 0.0]), abs=1e-8)
    assert len(lines.get_segments()) == 7 * 4
    assert axes.get_aspect() == 1


def test_curves_show_the_floor():
    metrics = {"train/velocity_error": [(1, 2.0), (2, 1.5)], "validation/nll": [(2, 3.0)], "train/loss": [(1, 2.0)]}
    figure = plots.curves(metrics, entropy=2.5)
    assert [axes.get_title() for axes in figure.axes] == ["square errors of flow matching", "NLL in nats"]
    assert [line.get_label() for line in figure.axes[0].lines] == ["velocity"]
    assert [line.get_label() for line in figure.axes[1].lines] == ["validation", "entropy of the data"]
    assert [axes.get_title() for axes in plots.curves({"train/loss": [(1, 2.0)]}).axes] == ["loss"]
    assert plots.curves({}).axes == []


def test_curves_show_errors_and_stages_and_leave_out_what_is_zero_throughout():
    metrics = {
        "validation/nll": [(2, 3.0), (4, 2.5)],
        "validation/nll_se": [(2, 0.25), (4, 0.125)],
        "train/nfe_forward": [(4, 20.0)],
        "train/nfe_backward": [(4, 0.0)],
    }
    likelihood, evaluations = plots.curves(metrics, stages=[3, 1]).axes
    (band,) = likelihood.collections
    assert {tuple(corner) for corner in band.get_paths()[0].vertices} == {(2, 2.75), (2, 3.25), (4, 2.375), (4, 2.625)}
    for axes, labelled in ((likelihood, ["validation"]), (evaluations, ["training, forward"])):
        *lines, boundary = axes.lines
        assert [line.get_label() for line in lines] == labelled
        assert list(boundary.get_xdata()) == [3, 3]


def test_figures_can_be_saved_and_leave_no_global_state(tmp_path):
    flow, dataset = small_flow(small_gaussian()), small_gaussian()
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
    before = torch.get_rng_state()
    figure = plots.evolution(flow, dataset.reference(), num_points=50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)
    figure.savefig(tmp_path / "evolution.png")
    pixels = matplotlib.image.imread(tmp_path / "evolution.png")
    assert pixels.shape[:2] == (348, 1500)
    assert [axes.get_title() for axes in figure.axes] == ["t = 0", "t = 0.25", "t = 0.5", "t = 0.75", "t = 1"]
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_pictures_of_samples_without_data():
    for shape, panels in (((2,), 1), ((3,), 9), ((1, 4, 4), 1)):
        drawn = torch.randn(30, *shape)
        assert len(plots.samples(drawn, None).axes) == panels
        assert len(plots.samples(drawn, drawn + 1).axes) == (panels if shape == (3,) else 2)


def test_the_range_of_very_many_points():
    """More than torch.quantile takes."""
    many = torch.tensor([[0.0, 1.0]]).expand(2**24 + 1, 2)
    low, high = square(many)
    assert low[0] <= 0 <= high[0]
    assert torch.equal(quantiles(many[:, 1], (0.1, 0.9)), torch.ones(2).double())
    few = torch.randn(1000)
    levels = torch.tensor([0.25, 0.5])
    assert torch.equal(quantiles(few, levels.tolist()), torch.quantile(few.double(), levels.double()))


def test_pictures_of_several_runs_on_one_sheet(tmp_path):
    for name, size in (("a", 2), ("b", 3), ("c", 4)):
        plots.scatter(torch.randn(9, 2), None if size == 2 else torch.randn(9, 2)).savefig(tmp_path / name)
    sheet = plots.contact_sheet({f"run {name}": tmp_path / f"{name}.png" for name in "abc"})
    figures = {"test_bits_per_dim": 1.9, "test_bits_per_dim_se": 0.01}
    assert sweeps._title("run a", figures) == "run a, 1.9000 ± 0.0100 bits/dim"
    assert sweeps._title("run a", {"test_gap": 0.1, **figures}) == "run a, gap 0.1000 nats"
    assert [axes.get_title() for axes in sheet.axes if axes.images] == ["run a", "run b", "run c"]
    sheet.savefig(tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size > 10_000


def test_samples_beside_a_single_point_of_the_data_are_in_the_picture():
    drawn = torch.randn(200, 2) + 5
    figure = plots.scatter(drawn, torch.zeros(1, 2))
    low, high = figure.axes[1].get_xlim()
    assert ((drawn[:, 0] > low) & (drawn[:, 0] < high)).double().mean() > 0.95
    assert len(figure.axes[1].collections[0].get_offsets()) == 200
    plots.scatter(torch.zeros(3, 2), torch.zeros(3, 2))  # no warning of equal limits
