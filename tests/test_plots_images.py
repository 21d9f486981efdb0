"""Pictures of image flows: that each pixel stands where it should, in the shade that it has."""

import matplotlib.image
import numpy as np
import pytest
import torch

import flows
from flows import plots
from flows.datasets import Batch, Dataset
from flows.fields import ConvNet
from flows.plots.images import grid, is_image, shades, tiled
from flows.samples import save_samples
from flows.transforms import Standardise


@pytest.fixture(autouse=True)
def _no_layout():
    """Figures are drawn as in a run here."""


class Squares(Dataset):
    """4 x 4 images, dark with one bright quarter, which is their class; levels 0 and 10."""

    name = "squares"
    event_shape = (1, 4, 4)
    num_validation = num_test = 12

    def __init__(self, conditional=False, channels=1):
        self.event_shape = (channels, 4, 4)
        labels = torch.arange(60) % 4
        images = torch.zeros(60, channels, 2, 2, 2, 2)
        images[torch.arange(60), :, labels // 2, :, labels % 2] = 10
        self._images = images.flatten(4, 5).flatten(2, 3) + 0.1 * torch.rand(60, channels, 4, 4)
        if conditional:
            self.num_classes, self.context_shape = 4, (4,)
        self._contexts = torch.eye(4)[labels] if conditional else None

    def train_stream(self, *arguments):
        raise NotImplementedError

    def held_out(self, split):
        return Batch(self._images, self._contexts)[:12]

    def reference(self):
        return self._images[12:].clone()


def small_flow(dataset, field=None):
    transform = Standardise(dataset.event_shape).fit(dataset.reference())
    field = ConvNet(dataset.event_shape, (4,), context_shape=dataset.context_shape) if field is None else field
    return flows.CNF(field, solver=flows.ODESolver("rk4", step_size=0.25), transform=transform)


def shown(figure, panel=0):
    return np.asarray(figure.axes[panel].images[0].get_array())


def cell(pixels, row, column, size=4):
    """One image of the canvas, a shade a pixel."""
    start, left = 1 + row * (size + 1), 1 + column * (size + 1)
    return pixels[start : start + size, left : left + size]


@pytest.mark.parametrize("channels", [1, 3])
def test_tiles_hold_their_images(channels):
    images = torch.rand(5, channels, 4, 3) * 20 - 5
    pixels = tiled(grid(images, 2), -5.0, 15.0)
    assert pixels.shape == (3 * 5 + 1, 2 * 4 + 1, 3)
    for i, image in enumerate(images):
        row, column = divmod(i, 2)
        found = pixels[1 + 5 * row : 5 + 5 * row, 1 + 4 * column : 4 + 4 * column]
        expected = ((image + 5) / 20).expand(3, -1, -1).permute(1, 2, 0)
        assert found == pytest.approx(expected.numpy())
    frame = pixels[::5].flatten()
    assert set(frame) == {pixels[0, 0, 0]}
    assert (pixels[11:15, 5:8] == pixels[0, 0, 0]).all()  # the place of the missing sixth image


def test_shades_are_those_of_the_data():
    assert shades(torch.cat([torch.zeros(50), torch.full((50,), 16.0)])) == (0, 16)
    assert shades(torch.full((4,), 3.0)) == (2.5, 3.5)
    assert is_image((1, 8, 8))
    assert is_image((3, 8, 8))
    assert not is_image((2, 8, 8))
    assert not is_image((4, 3))


@pytest.mark.parametrize("conditional", [False, True])
def test_images_get_their_pictures_from_fixed_noise(conditional):
    torch.manual_seed(0)
    dataset = Squares(conditional)
    flow = small_flow(dataset)
    draw = lambda: plots.figures(flow, dataset, torch.Generator().manual_seed(3))  # noqa: E731
    first, again = draw(), draw()
    names = [
        "samples",
        "trajectories",
        "neighbours",
        "interpolations",
        *(["classes"] if conditional else []),
        "evaluations",
    ]
    assert list(first) == names
    for name in names:
        assert np.array_equal(shown(first[name], -1), shown(again[name], -1)), name
    assert [axes.get_title() for axes in first["samples"].axes] == ["data", "flow samples"]


def test_paths_run_from_noise_to_samples():
    """With a field that is zero the noise stays; each column is one time, each row one path."""
    dataset = Squares()

    class Rest(torch.nn.Module):
        event_shape = (1, 4, 4)

        def forward(self, t, x):
            return 0 * x

    flow = small_flow(dataset, Rest())
    figure = plots.image_trajectories(flow, dataset.reference(), num_paths=3, times=(0.0, 0.5, 1.0))
    pixels = shown(figure)
    assert pixels.shape == (3 * 5 + 1, 3 * 5 + 1, 3)
    for row in range(3):
        first, *rest = (cell(pixels, row, column) for column in range(3))
        assert all(other == pytest.approx(first, abs=1e-6) for other in rest)
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["t = 0", "t = 0.5", "t = 1"]


def test_neighbours_are_the_nearest():
    data = torch.rand(30, 1, 4, 4)
    drawn = data[[7, 3]] + 1e-3
    figure = plots.neighbours(drawn, data, torch.rand(5, 1, 4, 4), num_rows=2, num_neighbours=3)
    pixels, (black, white) = shown(figure), shades(data)
    expected = ((data[[7, 3], 0] - black) / (white - black)).clamp(0, 1)
    for row in range(2):
        assert cell(pixels, row, 1)[..., 0] == pytest.approx(expected[row].numpy())
    distances = (drawn.flatten(1)[:, None] - data.flatten(1)).norm(dim=2).sort(1).values
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [f"{d:.3g}" for d in distances[:, 0]]
    assert f"of samples {distances[:, 0].median():.3g}, of unseen images" in figure.get_suptitle()


def test_interpolations_begin_and_end_at_images_of_one_class():
    dataset = Squares(conditional=True)
    dataset._images = dataset._images + 5 * torch.rand(60, 1, 4, 4)
    flow = small_flow(dataset)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    flow.solver = flows.ODESolver(rtol=1e-6, atol=1e-6)
    pixels = shown(plots.interpolations(flow, dataset, num_rows=4, num_columns=5))
    images, (black, white) = dataset._images, shades(dataset.reference())
    for label in range(4):
        for column, image in ((0, images[label]), (4, images[label + 4])):
            expected = ((image[0] - black) / (white - black)).clamp(0, 1)
            assert cell(pixels, label, column)[..., 0] == pytest.approx(expected.numpy(), abs=1e-3)
    assert np.abs(cell(pixels, 0, 2) - cell(pixels, 0, 0)).max() > 0.1


def test_each_class_has_a_row():
    class Painter(torch.nn.Module):
        """Carries everything to the bright quarter of the class."""

        event_shape, context_shape = (1, 4, 4), (4,)

        def forward(self, t, x, context):
            target = torch.zeros(len(x), 1, 4, 4)
            for label, (row, column) in enumerate([(0, 0), (0, 2), (2, 0), (2, 2)]):
                target[context[:, label] == 1, :, row : row + 2, column : column + 2] = 10
            return 50 * (target - x)

    dataset = Squares(conditional=True)
    flow = flows.CNF(Painter(), solver=flows.ODESolver("rk4", step_size=0.02))
    figure = plots.image_classes(flow, dataset, num_each=3)
    pixels = shown(figure)
    for label, quarter in enumerate([np.s_[:2, :2], np.s_[:2, 2:], np.s_[2:, :2], np.s_[2:, 2:]]):
        for column in (0, 1, 2, 4, 5, 6):  # images of the data, a gap, samples
            image = cell(pixels, label, column)[..., 0]
            assert image[quarter].min() > 0.9
            assert image.sum() == pytest.approx(4, abs=0.5)
        assert set(cell(pixels, label, 3).flatten()) == {pixels[0, 0, 0]}
    names = lambda: [label.get_text() for label in figure.axes[0].get_yticklabels()]  # noqa: E731
    assert names() == ["0", "1", "2", "3"]
    dataset.class_names = ("ant", "bee", "cod", "dab")
    figure = plots.image_classes(flow, dataset, num_each=3)
    assert names() == ["ant", "bee", "cod", "dab"]


def test_few_evaluations_are_those_of_euler():
    """With the velocity 1 - 2 t, Euler's method ends 1/n away from where it began."""

    class Turn(torch.nn.Module):
        event_shape = (1, 4, 4)

        def forward(self, t, x):
            return torch.ones_like(x) * (1 - 2 * t)

    data = torch.rand(20, 1, 4, 4)
    flow = flows.CNF(Turn(), solver=flows.ODESolver("rk4", step_size=0.5))
    figure = plots.images.image_evaluations(
        flow, data, num_columns=3, evaluations=(1, 2), generator=torch.Generator().manual_seed(0)
    )
    pixels, (black, white) = shown(figure), shades(data)
    z = flow.base.sample((3,), torch.Generator().manual_seed(0))
    for row, shift in ((1, 1.0), (2, 0.5), (3, 0.0)):
        for column in range(3):
            expected = ((z[column, 0] + shift - black) / (white - black)).clamp(0, 1)
            assert cell(pixels, row, column)[..., 0] == pytest.approx(expected.numpy(), abs=1e-6)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["data", "1", "2", "8"]
    assert flow.solver == flows.ODESolver("rk4", step_size=0.5)


def test_samples_of_images_are_shown_beside_the_data(tmp_path):
    figure = plots.samples(torch.rand(10, 3, 4, 4), torch.rand(20, 3, 4, 4))
    figure.savefig(tmp_path / "samples.png")
    assert [axes.get_title() for axes in figure.axes] == ["data", "flow samples"]
    assert shown(figure, 1).shape == (3 * 5 + 1, 4 * 5 + 1, 3)


def test_a_grid_of_samples_has_exact_pixels(tmp_path):
    """Levels 0 to 16, 8 x 8 pixels of 7 dots each and a dot of frame, times 7."""
    data = torch.randint(17, (300, 1, 8, 8)).double()
    plots.save_samples(tmp_path / "grid.png", data[:5], data)
    pixels = (255 * matplotlib.image.imread(tmp_path / "grid.png")).round()
    assert pixels.shape == (7 * (2 * 9 + 1), 7 * (3 * 9 + 1), 3)
    small = pixels[::7, ::7, 0]
    assert (small.repeat(7, 0).repeat(7, 1) == pixels[..., 0]).all()
    for i in range(5):
        row, column = divmod(i, 3)
        found = small[1 + 9 * row : 9 + 9 * row, 1 + 9 * column : 9 + 9 * column]
        assert (found == (data[i, 0] * 255 / 16).round().numpy()).all()
    plots.save_samples(tmp_path / "points.png", torch.randn(9, 2), torch.randn(9, 2))
    assert matplotlib.image.imread(tmp_path / "points.png").shape[:2] == (576, 1080)


@pytest.mark.parametrize(("num_levels", "kind"), [(17, "uint8"), (256, "uint8"), (1000, "uint16"), (None, "float64")])
def test_discrete_samples_are_saved_as_whole_numbers(tmp_path, num_levels, kind):
    drawn = torch.randint(num_levels or 5, (20, 1, 4, 4)).double()
    save_samples(tmp_path / "samples.npy", drawn, num_levels=num_levels)
    saved = np.load(tmp_path / "samples.npy")
    assert saved.dtype == kind
    assert (saved == drawn.numpy()).all()
