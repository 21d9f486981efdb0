"""Measure accuracy and cost of estimators on a flow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flows.arguments import checked
from flows.checks import can_be_finished, check_number
from flows.compare.accuracy import Accuracy, Truth, accuracy, truth
from flows.compare.candidates import Candidate, gather
from flows.compare.cost import affordable, case, time_ratio
from flows.compare.memory import peak_memory
from flows.compare.trajectory import Trajectory, trajectory_of
from flows.divergence import DivergenceEstimator
from flows.errors import InvalidValueError
from flows.models.cnf import CNF
from flows.progress import new_bar

EVALUATIONS_PER_ROW = 30  # roughly
MAX_TRAINING_PRODUCTS = 128  # more are not measured in training: the graph would not fit


@dataclass(frozen=True)
class Row:
    """One setting of an estimator. Times and memory are of one evaluation, on `points` points."""

    label: str
    kind: str  # the label without its numbers
    products: int  # Jacobian products an evaluation
    exact: bool  # states to be exact, and is, up to rounding
    accuracy: Accuracy
    points: int  # fewer than asked for where time or memory is short
    seconds: float  # without gradients
    ratio: float  # of that to a bare evaluation of the field
    training_seconds: float | None  # forward and backward; None: too expensive to train with
    training_ratio: float | None  # of that to the bare field, forward and backward
    memory: float  # peak, bytes a point, without gradients
    training_memory: float | None  # forward and backward
    ratio_spread: float | None = None  # how much the ratio differs from turn to turn, half the distance of quartiles
    training_ratio_spread: float | None = None


@dataclass(frozen=True)
class Comparison:
    """The figures of a comparison."""

    rows: list[Row]  # by estimator, then by products
    not_applicable: dict[str, str]  # the estimators that do not apply, with the reason
    chosen: dict[str, str]  # the estimators that choose another, with its label
    truth: Truth
    field: str
    event_shape: tuple[int, ...]
    times: list[float]
    points: int
    device: str
    dtype: str
    configured: str | None = None  # the label of the setting that the flow itself has, if it was measured


@checked
def compare(
    flow: CNF,
    x: Tensor,  # (n, *event), data space
    estimators: Mapping[str, DivergenceEstimator],
    budgets: Sequence[int] = (1, 4, 9, 25),
    times: Sequence[float] = (1.0, 0.75, 0.5, 0.25, 0.0),
    context: Tensor | None = None,  # (n, *context)
    draws: int = 32,
    seconds: float = 10.0,
    memory: float = 2.0,
    seed: int = 0,
    progress: bool = False,
    configured: DivergenceEstimator | None = None,
) -> Comparison:
    """Measure estimators on a flow, along the trajectories of `x`.

    Args:
        estimators: by name; each is measured as it is and at every budget (see
            `flows.divergence.DivergenceEstimator.with_budget`).
        budgets: Jacobian products an evaluation.
        times: from 0 (noise) to 1 (data).
        draws: of the probes, at every point and time.
        seconds: rough limit for one setting; slow ones use fewer draws, then fewer points.
        memory: GiB that one evaluation may take; more expensive settings use fewer points.
        seed: of the probes, and of the noise that discrete data take.
        progress: whether to show a progress bar after two seconds.
        configured: a setting to measure as it is beside the others, such as `flow.divergence`.

    Raises:
        ValueError: fewer than two points, a bad budget or time, or no estimator applies.
    """
    _check(x, budgets, draws, seconds, memory)
    trajectory = trajectory_of(flow, x, times, context, torch.Generator(x.device).manual_seed(seed))
    candidates = gather(estimators, budgets, flow.field, trajectory, configured)
    exact = truth(flow.field, trajectory, candidates.measured)
    rows = []
    with new_bar(candidates.measured, desc="estimators", delay=2, leave=False, disable=not progress) as bar:
        for candidate in bar:
            bar.set_postfix_str(candidate.label, refresh=False)
            rows.append(_row(candidate, flow.field, trajectory, exact, draws, seconds, memory, seed))
    return Comparison(
        rows=rows,
        not_applicable=candidates.left_out,
        chosen=candidates.chosen,
        truth=exact,
        field=type(flow.field).__name__,
        event_shape=flow.event_shape,
        times=trajectory.times.tolist(),
        points=len(x),
        device=str(x.device),
        dtype=str(x.dtype).removeprefix("torch."),
        configured=candidates.configured,
    )


def _row(
    candidate: Candidate,
    field: nn.Module,
    trajectory: Trajectory,
    exact: Truth,
    draws: int,
    seconds: float,
    memory: float,
    seed: int,
) -> Row:
    estimator = candidate.estimator.bind(trajectory.bind(field))
    products = estimator.cost
    trains = products <= MAX_TRAINING_PRODUCTS
    memory_bytes = memory * 2**30 if trains else None
    trajectory = affordable(field, trajectory, estimator, memory_bytes, seconds / EVALUATIONS_PER_ROW)
    points = trajectory.x.shape[1]
    rounding = 1e4 * torch.finfo(trajectory.x.dtype).eps * exact.jacobian_norm
    generator = torch.Generator(trajectory.x.device).manual_seed(seed)
    measured = accuracy(
        estimator, field, trajectory, exact.divergence[:, :points], rounding, draws, seconds / 4, generator
    )
    middle = trajectory.at(len(trajectory.times) // 2)
    timed = middle if products else trajectory  # closed forms share what they compute once a solve
    probes = estimator.draw_probes(timed.x[0], generator)
    costs = {}
    for training in (False, True) if trains else (False,):
        bare, run = (case(field, timed, one, probes, training) for one in (None, estimator))
        cost = time_ratio(bare, run, seconds / 20)
        peak = peak_memory(case(field, middle, estimator, probes, training), timed.x.device)
        costs[training] = (cost.seconds / len(timed.times), cost.ratio, peak / points, cost.spread)
    return Row(
        label=candidate.label,
        kind=candidate.kind,
        products=products,
        exact=estimator.is_exact and measured.rmse <= rounding,
        accuracy=measured,
        points=points,
        seconds=costs[False][0],
        ratio=costs[False][1],
        memory=costs[False][2],
        training_seconds=costs[True][0] if trains else None,
        training_ratio=costs[True][1] if trains else None,
        training_memory=costs[True][2] if trains else None,
        ratio_spread=costs[False][3],
        training_ratio_spread=costs[True][3] if trains else None,
    )


def _check(x: Tensor, budgets: Sequence[int], draws: int, seconds: float, memory: float) -> None:
    if len(x) < 2:
        raise InvalidValueError(f"at least two points are needed to compare on, got {len(x)}")
    if not budgets or any(isinstance(b, bool) or not isinstance(b, int) or b < 1 for b in budgets):
        raise InvalidValueError(
            f"budgets must be whole numbers of products >= 1, such as [1, 4, 16], got {list(budgets)}"
        )
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 2:
        raise InvalidValueError(f"draws must be a whole number >= 2, got {draws!r}")
    for name, value in (("seconds", seconds), ("memory", memory)):
        check_number(name, value, above=0)
    can_be_finished(f"seconds: a row of {seconds:g} seconds", seconds)
