"""Outliers: the AUROC against scikit-learn and simulation, shuffling, and scores of a flow in closed form."""

import math

import pytest
import torch
from sklearn.metrics import roc_auc_score

import flows
from flows.datasets import Batch, Gaussian
from flows.evaluation import AUROC, likelihood, outlier_scores, part_batches, shuffled
from flows.transforms import Standardise


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


def test_outliers_of_another_kind():
    dataset = Gaussian([0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]], num_validation=20, num_test=20)
    flow = flows.CNF(Still(), transform=Standardise((2,)))
    data = likelihood(flow, part_batches(flow, dataset, "test", 700)[0])
    with pytest.raises(ValueError, match=r"event_shape of the data 'gaussian', \(2,\), got \(1, 8, 8\) of 'digits'"):
        outlier_scores(flow, dataset, data, "test", flows.datasets.Digits(), 300)
