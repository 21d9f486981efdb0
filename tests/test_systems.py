"""Dynamical systems against conserved quantities and closed forms."""

import pytest
import torch

from flows.datasets import DynamicalSystem, Lorenz, LotkaVolterra, Pendulum, Spiral, TwoBody

SYSTEMS = (Spiral, LotkaVolterra, Pendulum, Lorenz, TwoBody)


@pytest.mark.parametrize("kind", [LotkaVolterra, Pendulum, TwoBody])
def test_conserved_quantities_stay_constant(kind):
    system = kind(num_series=12)
    values = system.conserved(system.truth)
    assert values
    for quantity in values.values():
        assert quantity.shape == system.truth.shape[:2]
        assert float((quantity - quantity[:, :1]).abs().max()) < 1e-7
        assert float(quantity[:, 0].std()) > 1e-2  # it tells solutions apart


@pytest.mark.parametrize("kind", SYSTEMS)
def test_times_are_inside_the_span_and_test_series_go_beyond(kind):
    for irregular in (False, True):
        system = kind(num_series=12, num_times=20, irregular=irregular)
        for split in ("train", "validation", "test"):
            batch = system.part(split)
            assert batch.mask.all()
            assert not batch.times[:, 0].any()
            end = system.span + system.beyond * (split == "test")
            assert float(batch.times.max()) <= end * (1 + 1e-12)
            assert torch.equal(system.true_states(split), batch.x)  # without noise
        assert batch.times.shape[1] > 20
        assert isinstance(system, DynamicalSystem)
