"""Outliers: the AUROC against scikit-learn and simulation, shuffling, and scores of a flow in closed form."""

import math

import pytest
import torch
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
