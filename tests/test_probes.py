"""Probe families: second moments, variances, what orthogonality buys, and the price of asking for too many."""

import pytest
import torch
from problems import assert_unbiased, assert_variance, on_shape

from flows.divergence import (
    Coordinates,
    Gaussian,
    Hutchinson,
    Orthonormal,
    ProbeFamily,
    Rademacher,
    Sphere,
    divergence,
)

FAMILIES = [Rademacher(), Gaussian(), Sphere(), Orthonormal(), Coordinates()]
WITHOUT_REPLACEMENT = [Orthonormal(), Coordinates()]
DRAWS = 20_000
D = 5

every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: type(family).__name__)
dependent_family = pytest.mark.parametrize("family", WITHOUT_REPLACEMENT, ids=lambda family: type(family).__name__)


def draw(family, num_probes, d=D, count=DRAWS, seed=0):
    """(K, count, d)."""
    return family.draw(num_probes, torch.empty(count, d), torch.Generator().manual_seed(seed))


def quadratic_forms(family, num_probes, jacobian, seed=0):
    """εᵀJε, (K, draws)."""
    probes = draw(family, num_probes, len(jacobian), seed=seed)
    return torch.einsum("kni,ij,knj->kn", probes, jacobian, probes)


@every_family
@pytest.mark.parametrize("num_probes", [1, 3, 5])
def test_second_moment_is_the_identity(family, num_probes):
    """Entry by entry, for each of the K probes by itself."""
    for probe in draw(family, num_probes):
        for i in range(D):
            for j in range(i):
                assert_unbiased(probe[:, i] * probe[:, j], 0.0)
            assert_unbiased(probe[:, i].square(), 1.0)


@every_family
@pytest.mark.parametrize("num_probes", [1, 2, 4, 5])
def test_mean_and_variance_are_the_stated_ones(family, num_probes):
    jacobian = torch.randn(D, D)
    forms = quadratic_forms(family, num_probes, jacobian)
    stated = family.variance(jacobian, num_probes)
    if on_shape(Hutchinson(num_probes, family), (D,)).is_exact:
        assert stated.abs() < 1e-12
        torch.testing.assert_close(forms.mean(0), jacobian.trace().expand(DRAWS))
        return
    assert_unbiased(forms.mean(0), jacobian.trace())
    assert_variance(forms.mean(0), stated)


@every_family
@pytest.mark.parametrize("num_probes", [2, 4])
def test_spread_factor_gives_the_standard_error(family, num_probes):
    """The mean over draws of (spread factor)² spread²/K is the variance of the mean."""
    jacobian = torch.randn(D, D)
    forms = quadratic_forms(family, num_probes, jacobian)
    squared_errors = family.spread_factor(num_probes, D) ** 2 * forms.var(0) / num_probes
    assert_unbiased(squared_errors, family.variance(jacobian, num_probes))
    reported = on_shape(Hutchinson(num_probes, family), (D,)).standard_error(forms)
    torch.testing.assert_close(reported.square(), squared_errors)


@pytest.mark.parametrize(
    ("family", "jacobian"),
    [
        (Rademacher(), torch.tensor([[1.0, 2, 0], [-2, 5, 3], [0, -3, 7]])),
        (Sphere(), torch.tensor([[2.0, 2, 0], [-2, 2, 3], [0, -3, 2]])),
        (Orthonormal(), torch.tensor([[2.0, 2, 0], [-2, 2, 3], [0, -3, 2]])),
        (Coordinates(), torch.tensor([[2.0, 9, 1], [4, 2, 3], [5, 8, 2]])),
    ],
    ids=lambda value: type(value).__name__,
)
def test_no_noise_where_the_table_says_so(family, jacobian):
    """Signs: S diagonal. Sphere and frames: S = cI. Coordinates: an equal diagonal."""
    jacobian = jacobian.to(torch.get_default_dtype())
    forms = quadratic_forms(family, 1, jacobian)
    torch.testing.assert_close(forms, jacobian.trace().expand_as(forms))
    assert family.variance(jacobian, 1).abs() < 1e-12


@every_family
def test_variance_takes_batches_of_jacobians(family):
    jacobians = torch.randn(2, 3, D, D)
    batched = family.variance(jacobians, 2)
    assert batched.shape == (2, 3)
    torch.testing.assert_close(batched[1, 2], family.variance(jacobians[1, 2], 2))


def test_sphere_has_constant_length_and_frames_are_orthogonal():
    torch.testing.assert_close(draw(Sphere(), 2).square().sum(-1), torch.full((2, DRAWS), float(D)))
    for family in WITHOUT_REPLACEMENT:
        frames = draw(family, 4).movedim(1, 0)
        torch.testing.assert_close(frames @ frames.mT, D * torch.eye(4).expand(DRAWS, 4, 4), rtol=0, atol=1e-10)


def test_frames_are_uniform():
    """Signs included: the mean of the first probe is zero, which Householder's QR alone does not give."""
    frames = draw(Orthonormal(), 2)
    for i in range(D):
        assert_unbiased(frames[0, :, i], 0.0)
        assert_unbiased(frames[0, :, i].pow(4), 3 * D / (D + 2))  # of a point on the sphere


@dependent_family
def test_all_probes_are_exact_and_more_are_an_error(family):
    x = torch.randn(3, 4)
    matrix = torch.randn(4, 4)
    estimator = Hutchinson(4, family)
    value = divergence(lambda x: x @ matrix.T, x, estimator=estimator)
    torch.testing.assert_close(value, matrix.trace().expand(3))
    assert on_shape(estimator, (4,)).is_exact
    assert not on_shape(estimator, (5,)).is_exact
    assert not on_shape(estimator, (2, 3)).is_exact
    name = type(family).__name__
    message = rf"{name} has at most d = 4 probes for an event of dimension 4, got num_probes = 5"
    with pytest.raises(ValueError, match=message):
        divergence(torch.sin, x, estimator=Hutchinson(5, family))
    with pytest.raises(ValueError, match=message):
        _ = on_shape(Hutchinson(5, family), (2, 2)).is_exact


@dependent_family
def test_one_dimension_is_exact(family):
    assert on_shape(Hutchinson(1, family), (1,)).is_exact
    assert family.variance(torch.randn(1, 1), 1) == 0
    x = torch.randn(3, 1)
    torch.testing.assert_close(divergence(torch.sin, x, estimator=Hutchinson(1, family)), x.cos()[:, 0])


@pytest.mark.parametrize("name", ["rademacher", "gaussian", "sphere", "orthonormal", "coordinates"])
def test_every_family_has_a_name(name):
    family = Hutchinson(probes=name).probes
    assert isinstance(family, ProbeFamily)
    assert type(family).__name__.lower() == name


def test_an_abstract_family_is_not_offered():
    with pytest.raises(ValueError, match="one of coordinates, gaussian, orthonormal, rademacher"):
        Hutchinson(probes="withoutreplacement")
