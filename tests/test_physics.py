"""Known equations with parameters to fit."""

import inspect

import pytest
import torch

from flows import equations

SYSTEMS = {"spiral": 2, "lotka_volterra": 2, "pendulum": 2, "lorenz": 3, "two_body": 4}


@pytest.mark.parametrize("name", SYSTEMS)
def test_divergences_of_known_equations(name):
    function = getattr(equations, name)
    parameters = {p.name: 0.7 + 0.1 * i for i, p in enumerate(inspect.signature(function).parameters.values()) if i > 1}
    x = torch.randn(5, SYSTEMS[name], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = x.new_zeros(())
    jacobians = torch.func.vmap(torch.func.jacrev(lambda y: function(t, y, **parameters)))(x)
    expected = jacobians.diagonal(dim1=1, dim2=2).sum(1)
    found = torch.as_tensor(function.divergence(t, x, **parameters)).expand(len(x))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
