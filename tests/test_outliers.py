"""Outliers: the AUROC against scikit-learn and simulation, shuffling, and scores of a flow in closed form."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

import flows
from flows.datasets import Batch, Gaussian
from flows.evaluation import (
    AUROC,
    compressed_length,
    likelihood,
    outlier_scores,
    part_batches,
    plain,
    shuffled,
)
from flows.transforms import Compose, Dequantise, NormalMarginals, Standardise


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("ties", [False, True])
def test_auroc_is_that_of_scikit_learn(ties):
    outliers, data = torch.randn(70, generator=rng(1)) + 0.7, torch.randn(90, generator=rng(2))
    if ties:
        outliers, data = outliers.round(), data.round()
    labels = torch.cat([torch.ones(70), torch.zeros(90)])
    expected = roc_auc_score(labels, torch.cat([outliers, data]))
    assert AUROC.of(outliers, data).value == pytest.approx(expected, abs=1e-12)
    assert AUROC.of(data, outliers).value == pytest.approx(1 - expected, abs=1e-12)


def test_standard_error_of_the_auroc_is_its_deviation_over_repetitions():
    generator = rng()
    draws = [
        AUROC.of(torch.randn(40, generator=generator) + 1, torch.randn(80, generator=generator)) for _ in range(600)
    ]
    values = torch.tensor([draw.value for draw in draws])
    errors = torch.tensor([draw.standard_error for draw in draws])
    assert errors.mean() == pytest.approx(values.std().item(), rel=0.1)
    expected = torch.special.ndtr(torch.tensor(0.5**0.5))  # P(N(1, 1) > N(0, 1))
    assert abs(values.mean() - expected) < 4 * values.std() / 600**0.5


def test_perfect_and_useless_scores():
    assert AUROC.of(torch.arange(5) + 10.0, torch.arange(5.0)) == AUROC(1.0, 0.0)
    assert AUROC.of(torch.ones(5), torch.ones(7)) == AUROC(0.5, 0.0)
    with pytest.raises(ValueError, match="needs two outliers and two points of the data, got 1 and 7"):
        AUROC.of(torch.ones(1), torch.ones(7))


def test_shuffling_moves_whole_pixels_each_image_in_its_own_way():
    x = torch.arange(48.0).reshape(1, 3, 4, 4).expand(6, 3, 4, 4)
    (batch,) = shuffled([Batch(x, torch.ones(6, 2))], rng())
    assert torch.equal(batch.context, torch.ones(6, 2))
    assert torch.equal(batch.x.flatten(2).sort(-1).values, x.flatten(2))
    assert torch.equal(batch.x[:, 1] - batch.x[:, 0], torch.full((6, 4, 4), 16.0))
    assert len(batch.x.unique(dim=0)) == 6
    (flat,) = shuffled([Batch(torch.arange(8.0).expand(5, 8))], rng())
    assert torch.equal(flat.x.sort(1).values, torch.arange(8.0).expand(5, 8))
    assert len(flat.x.unique(dim=0)) == 5


class Still(torch.nn.Module):
    """The field of the identity."""

    event_shape = (2,)

    def forward(self, t, x):
        return 0 * x


def test_scores_of_a_normal():
    """Points near the mode are likelier than the data, so the likelihood ranks them last and typicality first."""
    dataset = Gaussian([0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]], num_validation=2000, num_test=2000)
    centre = Gaussian([0.0, 0.0], [[1e-4, 0.0], [0.0, 1e-4]], num_validation=10, num_test=500)
    far = Gaussian([9.0, 9.0], [[1.0, 0.0], [0.0, 1.0]], num_validation=10, num_test=500)
    flow = flows.CNF(Still(), solver=flows.ODESolver("euler", step_size=1.0))
    data = likelihood(flow, part_batches(flow, dataset, "test", 700)[0])
    scores = outlier_scores(flow, dataset, data, "test", centre, 300, rng())
    assert scores.typical_nll == pytest.approx(math.log(2 * math.pi) + 1, abs=0.1)
    assert scores.likelihood.value < 0.01
    assert scores.typicality.value > scores.likelihood.value + 0.5
    assert outlier_scores(flow, dataset, data, "test", far, 300, rng()).likelihood.value > 0.999
    itself = outlier_scores(flow, dataset, data, "test", None, 300, rng())  # a round normal cannot tell
    assert abs(itself.likelihood.value - 0.5) < 4 * itself.likelihood.standard_error
    lines = scores.csv().splitlines()
    assert lines[0] == "nll,typicality,outlier"
    assert [line[-2:] for line in lines[1:]] == [",0"] * 2000 + [",1"] * 500
    assert float(lines[1].split(",")[0]) == pytest.approx(data.values[0].item(), rel=1e-6)
    assert scores.as_dict()["auroc_nll"] == scores.likelihood.value


def noisy_images(num_levels=16):
    """Independent pixels: half are 0, the others have any level. Blank paper is much likelier than an image."""
    x = torch.randint(num_levels, (120, 1, 4, 4), generator=rng()) * torch.randint(2, (120, 1, 4, 4), generator=rng(1))
    x[:, 0, 0, 0] = torch.arange(120) % num_levels
    parts = flows.datasets.LabelledImages(x).split(validation_fraction=0.25, test_fraction=0.25)
    return flows.datasets.Images(parts, num_levels=num_levels)


def test_a_likelihood_ratio_finds_what_is_likelier_because_it_is_simpler():
    """p(x) is the product of the shares of the levels, so blank images have the least NLL of all."""
    dataset = noisy_images()
    levels = NormalMarginals((1, 4, 4), 16)
    transform = Compose(dequantise=Dequantise(16), marginals=levels).fit(dataset.reference())
    field = flows.fields.Linear((1, 4, 4), torch.zeros(16, 16))
    flow = flows.CNF(field, transform=transform, solver=flows.ODESolver("euler", step_size=1.0))
    data = likelihood(flow, part_batches(flow, dataset, "test", 30)[0], rng())
    scores = outlier_scores(flow, dataset, data, "test", "plain", 30, rng())
    assert scores.name == "images, plain"
    assert scores.likelihood.value < 0.05
    assert scores.ratio is not None
    assert scores.ratio.value > 0.95
    assert scores.as_dict()["auroc_ratio"] == scores.ratio.value
    assert "by NLL minus compressed length" in dict(scores.table())["AUROC"]
    assert scores.csv().splitlines()[0] == "nll,typicality,ratio,outlier"
    figure = flows.plots.outlier_scores(scores.scored(), scores.name)
    assert [axes.get_title().split("\n")[0] for axes in figure.axes] == list(scores.scored())
    normal = Gaussian([0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]], num_validation=20, num_test=20)
    with pytest.raises(ValueError, match="outliers=plain needs images of whole numbers, and 'gaussian' is continuous"):
        outlier_scores(flow, normal, data, "test", "plain", 30)


def test_plain_images_have_the_most_frequent_level():
    x = torch.tensor([[[[3.0, 3.0], [3.0, 1.0]]], [[[0.0, 5.0], [5.0, 5.0]]]])
    (batch,) = plain([Batch(x)])
    assert torch.equal(batch.x[:, 0, 0, 0], torch.tensor([3.0, 5.0]))
    assert all(len(image.unique()) == 1 for image in batch.x)


def test_noise_cannot_be_compressed_and_blank_paper_can():
    """A lossless code of noise takes at least its entropy, n log L nats."""
    noise, blank = torch.randint(256, (1, 1, 32, 32), generator=rng()), torch.zeros(1, 1, 32, 32)
    assert float(compressed_length(noise, 256)) > 1024 * math.log(256)
    assert float(compressed_length(blank, 256)) < 0.1 * 1024 * math.log(256)
    wide = torch.randint(1000, (1, 500), generator=rng())
    assert float(compressed_length(wide, 1000)) > 500 * math.log(1000)


def test_outliers_of_another_kind():
    dataset = Gaussian([0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]], num_validation=20, num_test=20)
    flow = flows.CNF(Still(), transform=Standardise((2,)))
    data = likelihood(flow, part_batches(flow, dataset, "test", 700)[0])
    with pytest.raises(ValueError, match=r"event_shape of the data 'gaussian', \(2,\), got \(1, 8, 8\) of 'digits'"):
        outlier_scores(flow, dataset, data, "test", flows.datasets.Digits(), 300)


def test_outliers_where_the_density_is_0_are_told_apart_and_counted():
    """A uniform base on a box has no density outside: those points rank above all data, whatever the others do."""
    dataset = Gaussian([0.5, 0.5], [[1e-2, 0.0], [0.0, 1e-2]], num_validation=50, num_test=50)
    edge = Gaussian([1.5, 0.5], [[1e-2, 0.0], [0.0, 1e-2]], num_validation=10, num_test=60)
    box = flows.bases.Uniform((2,), -0.5, 1.5)
    flow = flows.CNF(Still(), base=box, solver=flows.ODESolver("euler", step_size=1.0))
    data = likelihood(flow, part_batches(flow, dataset, "test", 50)[0])
    scores = outlier_scores(flow, dataset, data, "test", edge, 60)
    outside = int((edge.held_out("test").x.abs() > 1.5).any(1).sum())
    assert 0 < outside < 60
    assert scores.likelihood.value == pytest.approx((outside + 0.5 * (60 - outside)) / 60)  # ties inside count half
    assert f"NLL infinite for {outside}, where the density is 0" in dict(scores.table())["outliers"]
    assert "for the others (60 points)" in dict(scores.table())["outliers"]
    assert (scores.as_dict()["outlier_nll"], scores.as_dict()["outliers_infinite"]) == (None, outside)
    figure = flows.plots.outlier_scores(scores.scored(), scores.name)
    assert f"{outside} of 60 infinite" in figure.axes[0].get_legend().get_texts()[1].get_text()
    with pytest.raises(ValueError, match="50 of 50 points have a log-density that is NaN or infinite"):
        likelihood(flow, [Batch(torch.full((50, 2), 9.0))])  # for data it stays an error


def test_parts_of_unresolved_bits_are_kept_apart():
    dataset = noisy_images()
    transform = Compose(dequantise=Dequantise(16), standardise=Standardise((1, 4, 4))).fit(dataset.reference())
    field = flows.fields.Linear((1, 4, 4), torch.zeros(16, 16))
    flow = flows.CNF(field, transform=transform, solver=flows.ODESolver("euler", step_size=1.0))
    data = likelihood(flow, part_batches(flow, dataset, "test", 30)[0], rng())
    metrics = replace(data, solver_error=9.0).metrics()
    assert metrics["bits_per_dim_parts"] is None
    assert sum(metrics["bits_per_dim_parts_unresolved"].values()) == pytest.approx(data.bits_per_dim.value)


def test_plots_of_infinite_scores():
    many, none = torch.full((5,), math.inf), torch.zeros(5)
    for outliers in (many, -many, torch.cat([none, many])):
        figure = flows.plots.outlier_scores({"NLL": (none, outliers, AUROC.of(outliers, none))})
        assert sum(patch.get_height() for patch in figure.axes[0].patches) == pytest.approx(2)  # both shares are whole
    with pytest.raises(ValueError, match="scores must be numbers or infinite, and 1 of 10 are NaN"):
        AUROC.of(torch.tensor([math.nan, 1.0, 2.0, 3.0, 4.0]), none)


def test_outliers_from_a_folder_of_pictures(run, tmp_path):
    """From files to a report: a folder of one's own is converted, and too few pictures are named."""
    generator = np.random.default_rng(0)
    for name, number, size in (("photos", 40, 8), ("others", 10, 10)):
        (tmp_path / name).mkdir()
        for i in range(number):
            pixels = generator.integers(0, 256, (size, size), dtype="uint8")
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    small = ["field=mlp", "field.hidden=[4]", "solver=euler", "solver.step_size=0.5", "steps=1", "evaluation.points=2"]
    quiet = ["reporting.progress_bar=false", "reporting.plot_every=null", "hardware.accelerator=cpu"]
    code, _, err = run("train", "data=images", "data.path=photos", *small, *quiet, "output_dir=run")
    assert code == 0, err
    evaluate = ["evaluate", "checkpoint=run", "output=o.json"]
    others = ["data@outliers=images", "outliers.path=others"]
    for settings, words in (
        (others, "(1, 8, 8), got (1, 10, 10) of 'images'; files of images are converted by outliers.size=[8,8]"),
        ([*others, "outliers.size=[8,8]"], "the test part of 'images' has 1; give more, or cut off a larger part"),
        (["outliers.path=others"], "none is chosen; choose one as well, such as data@outliers=images outliers.path=o"),
        (["outliers=others"], "for your own images data@outliers=images outliers.path=FOLDER; got 'others'"),
    ):
        code, _, err = run(*evaluate, *settings)
        assert code == 2
        assert words in err
    code, out, err = run(
        *evaluate, *others, "outliers.size=[8,8]", "outliers.test_fraction=0.6", "solver.step_size=0.01"
    )
    assert code == 0, err
    assert "images, test, NLL" in out
    assert "AUROC" in out
