"""Coefficients of the Runge-Kutta methods: order conditions by rooted trees, and agreement with torchdiffeq.

[Hairer, Nørsett & Wanner 1993, II.2]
"""

import itertools
import math

import pytest
import torch
from torchdiffeq import odeint

from flows.solvers.runge_kutta import interpolate, take_step
from flows.solvers.tableaux import RUNGE_KUTTA

ADAPTIVE = [name for name, method in RUNGE_KUTTA.items() if method.is_adaptive]
TOLERANCE = {"dopri8": 1e-13, "tsit5": 2e-14}  # published as rationals that are close to the true numbers


def trees(size):
    """All rooted trees with that many nodes. A tree is the sorted tuple of its subtrees."""
    found = set()
    for sizes in partitions(size - 1):
        for subtrees in itertools.product(*map(trees, sizes)):
            found.add(tuple(sorted(subtrees)))
    return found


def partitions(total, largest=None):
    if total == 0:
        yield ()
    for first in range(min(total, largest or total), 0, -1):
        for rest in partitions(total - first, first):
            yield first, *rest


def nodes_of(tree):
    return 1 + sum(map(nodes_of, tree))


def density(tree):
    """γ(t): the weights of an exact solution sum to 1/γ."""
    return nodes_of(tree) * math.prod(map(density, tree))


def elementary_weights(rows, tree):
    """Φ_i(t) of each stage i."""
    values = [1.0] * len(rows)
    for subtree in tree:
        inner = elementary_weights(rows, subtree)
        sums = [sum(a * value for a, value in zip(row, inner, strict=False)) for row in rows]
        values = [value * total for value, total in zip(values, sums, strict=True)]
    return values


def defect(method, weights, order, time=1.0):
    """The largest violation of a condition of that order, for a solution at `time` steps from the start."""
    rows = ((), *method.coefficients)
    return max(
        abs(sum(b * phi for b, phi in zip(weights, elementary_weights(rows, tree), strict=True)) - time**order / g)
        for tree, g in ((tree, density(tree)) for tree in trees(order))
    )


def test_trees_are_counted_as_in_the_literature():
    assert [len(trees(size)) for size in range(1, 9)] == [1, 1, 2, 4, 9, 20, 48, 115]


@pytest.mark.parametrize("name", RUNGE_KUTTA)
def test_rows_sum_to_the_nodes(name):
    method = RUNGE_KUTTA[name]
    assert len(method.nodes) == len(method.coefficients) == len(method.weights) - 1
    for stage, (node, row) in enumerate(zip(method.nodes, method.coefficients, strict=True), start=1):
        assert len(row) == stage
        assert sum(row) == pytest.approx(node, abs=1e-14)


@pytest.mark.parametrize("name", RUNGE_KUTTA)
def test_the_solution_has_the_order_and_no_higher_one(name):
    method = RUNGE_KUTTA[name]
    for order in range(1, method.order + 1):
        assert defect(method, method.weights, order) < TOLERANCE.get(name, 1e-14)
    assert defect(method, method.weights, method.order + 1) > 1e-7


@pytest.mark.parametrize("name", ADAPTIVE)
def test_the_embedded_solution_has_one_order_less(name):
    method = RUNGE_KUTTA[name]
    for order in range(1, method.order):
        assert defect(method, method.embedded, order) < TOLERANCE.get(name, 1e-14)
    assert defect(method, method.embedded, method.order) > 1e-7


@pytest.mark.parametrize("name", ["flow5", "tsit5", "dopri5", "dopri8"])
def test_the_middle_has_order_four(name):
    method = RUNGE_KUTTA[name]
    for order in range(1, 5):
        assert defect(method, method.middle, order, time=0.5) < 1e-13


@pytest.mark.parametrize("name", [name for name in ADAPTIVE if name not in ("flow5", "tsit5")])
def test_one_step_is_that_of_torchdiffeq(name):
    """With tolerances that accept the first step; its two methods of order five and more interpolate alike.

    It has no flow5 and no tsit5.
    """
    method, size = RUNGE_KUTTA[name], 0.3

    def field(t, x):
        return torch.stack([x[:, 1] * t.cos(), -(x[:, 0] ** 2)], 1)

    x = torch.randn(5, 2)
    step = take_step(method, lambda t, state: (field(torch.tensor(t), state[0]),), 0.0, size, (x,))
    times = torch.linspace(0, size, 7, dtype=x.dtype)
    expected = odeint(field, x, times, method=name, rtol=1e3, atol=1e3, options={"first_step": size})
    torch.testing.assert_close(step.end[0], expected[-1], rtol=0, atol=1e-13)
    if method.middle is not None:
        found = torch.stack([interpolate(method, step, t)[0] for t in times.tolist()])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
