"""Whatever training has saved can be loaded again."""

import math
from pathlib import PurePosixPath

import pytest
import torch
from torch import nn

from flows.training.amounts import check_whole_numbers
from flows.training.fitting import check_optimizer, check_weights
from flows.training.plain import plain_content


def test_a_frozen_mask_may_hold_infinity():
    def masked():
        model = nn.Linear(2, 2)
        model.mask = nn.Parameter(torch.tensor([0.0, -math.inf]), requires_grad=False)
        return model

    model = masked()
    check_weights(model.state_dict(), masked())
    wrong = model.state_dict() | {"bias": torch.tensor([0.0, math.inf])}
    with pytest.raises(ValueError, match="bias holds 1 NaN or infinite of its 2 numbers"):
        check_weights(wrong, masked())


def test_second_moments_that_overflowed_can_be_loaded():
    model = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model.weight.grad, model.bias.grad = torch.full((1, 2), 1e200), torch.ones(1)
    optimizer.step()
    state = optimizer.state_dict()
    assert state["state"][0]["exp_avg_sq"].isinf().all()
    new = torch.optim.Adam(model.parameters(), lr=1e-3)
    check_optimizer(state, new, torch.optim.Adam, 1e-3, 1)
    state["state"] = {}
    with pytest.raises(ValueError, match="the optimiser's state is empty after 3 steps"):
        check_optimizer(state, new, torch.optim.Adam, 1e-3, 3)
    check_optimizer(state, new, torch.optim.Adam, 1e-3, 0)


def test_a_size_is_kept_as_a_tuple():
    kept = plain_content({"shape": torch.zeros(2, 3).shape})["shape"]
    assert kept == (2, 3)
    assert type(kept) is tuple
    with pytest.raises(TypeError, match=r"data\.path .* is a PurePosixPath.*description\(\) of the data"):
        plain_content({"data": {"path": PurePosixPath("x")}})


def test_limits_are_no_amounts():
    check_whole_numbers({"max_steps": 10**12}, "solver")
    with pytest.raises(ValueError, match=r"solver\.width: 1,000,000,000,000 numbers"):
        check_whole_numbers({"width": 10**12}, "solver")
