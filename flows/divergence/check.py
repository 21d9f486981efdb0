"""Checks that an estimator keeps what `DivergenceEstimator` promises."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from flows.arguments import checked
from flows.checks import whole_number
from flows.divergence.base import DivergenceEstimator, FieldSample
from flows.errors import InvalidTypeError, InvalidValueError
from flows.naming import by_name
from flows.vector_field import BoundField, bind

EVENT_SHAPES = ((7,), (4, 3), (2, 6, 6))  # points, a point set, an image
TIME = 0.3
SIGMAS = 4.5  # standard errors that a mean may be off by chance
STATED = (0.65, 1.4)  # mean squared standard error over variance; the error of XTrace is known to be low
ROUNDING = 1e-9  # of the norm of the Jacobian, in float64
SINGLE = 1e-3  # the same in float32
BLOCKS = 24  # groups of draws whose gradients are compared


class EstimatorCheckError(InvalidValueError):
    """An estimator breaks a promise; the message names the check and its figures.

    ```python
    from flows.divergence import EstimatorCheckError, Hutchinson, check_estimator

    try:
        check_estimator(Hutchinson(2), event_shapes=[(2,)], draws=500)
    except EstimatorCheckError as error:
        print(error)
    ```
    """


@checked
@dataclass(frozen=True)
class EstimatorCheck:
    """One check that was passed.

    ```python
    from flows.divergence import check_estimator

    first = check_estimator("exact", event_shapes=[(2,)])[0]
    print(first.name, first.event_shape, first.figures)
    ```
    """

    name: str
    event_shape: tuple[int, ...]
    figures: str

    def __str__(self) -> str:
        return f"{self.name:10} {self.event_shape!s:12} {self.figures}"


@checked
def check_estimator(
    estimator: DivergenceEstimator | str,
    field: nn.Module | None = None,
    event_shapes: Sequence[Sequence[int]] = EVENT_SHAPES,
    draws: int = 10_000,
    seed: int = 0,
) -> list[EstimatorCheck]:
    """Check an estimator against the dense Jacobian of a small field, in float64 and float32.

    | check | what must hold |
    |---|---|
    | shapes | value (B, *event) and K estimates (K, B), for batches of one and several |
    | probes | they come from the generator alone, and are all that is random; each sample has its own |
    | batches | an estimate depends on its own sample alone; one time for all or one for each is the same |
    | dtypes | estimates have the dtype of the points, and float32 gives the numbers of float64 |
    | bias | the mean over draws is the trace; an estimator that states to be exact equals it |
    | variance | the squared standard error is the variance in the mean, and `variance(jacobian)` is, if there is one |
    | gradients | the mean has those of the trace, with respect to x and the parameters; none under `no_grad` |
    | norm | `with_jacobian_norm` leaves value and estimates as they are, and its ‖J‖² is right in the mean |
    | budget | `with_budget` returns an estimator that costs no more than asked for, or the cheapest |

    ```python
    from flows.divergence import Hutchinson, check_estimator

    for check in check_estimator(Hutchinson(num_probes=2), event_shapes=[(3,)]):
        print(check)
    ```

    Args:
        estimator: an estimator, or its lower-case name.
        field: a module with `forward(t, x)` and an `event_shape`, where an estimator needs a special one. Default: a
            network with a closed form and a bottleneck, of each event shape.
        event_shapes: shapes of points to check; those of `field` if there is one.
        draws: of the probes at one point. Their number decides how small a bias is found.
        seed: of points, weights and probes.

    Returns:
        The checks that were passed, with their figures.

    Raises:
        EstimatorCheckError: a check failed.
    """
    estimator = by_name(DivergenceEstimator, estimator, "estimator")
    whole_number("draws", draws, 200)
    shapes = event_shapes if field is None else [bind(field).event_shape]
    passed = []
    with torch.random.fork_rng(devices=()):  # nobody else's random numbers change
        torch.manual_seed(seed)
        for shape in map(tuple, shapes):
            case = _Case(estimator, _Specimen(shape).double() if field is None else field, shape, draws, seed)
            passed += [EstimatorCheck(name, shape, check(case)) for name, check in CHECKS.items()]
    return passed


class _Case:
    """An estimator at work on one field at one point."""

    def __init__(
        self, estimator: DivergenceEstimator, field: nn.Module, shape: tuple[int, ...], draws: int, seed: int
    ) -> None:
        self.estimator = estimator
        self.module = field
        self.shape = shape
        self.draws = draws
        self.seed = seed
        like = next(field.parameters(), torch.zeros((), dtype=torch.float64))
        self.x = torch.randn(5, *shape, dtype=torch.float64).to(like)
        self.t = torch.tensor(TIME).to(like)

    def fail(self, check: str, what: str) -> EstimatorCheckError:
        name = type(self.estimator).__name__
        return EstimatorCheckError(f"{name} fails the check {check!r} on points of shape {self.shape}: {what}")

    def require(self, check: str, holds: bool, what: str) -> None:
        if not holds:
            raise self.fail(check, what)

    def generator(self, offset: int = 0) -> torch.Generator:
        return torch.Generator(self.x.device).manual_seed(self.seed + offset)

    @cached_property
    def field(self) -> BoundField:
        return bind(self.module)

    @cached_property
    def bound(self) -> DivergenceEstimator:
        bound = self.estimator.bind(self.field)
        if not isinstance(bound, DivergenceEstimator):
            raise self.fail("shapes", f"bind must return a DivergenceEstimator, got {type(bound).__name__}")
        return bound

    def sample(self, x: Tensor, offset: int = 0) -> FieldSample:
        """One evaluation as a solve makes it."""
        bound = self.estimator.bind(bind(self.module))
        return bound(self.t, x, bound.draw_probes(x, self.generator(offset)))

    @cached_property
    def point(self) -> Tensor:  # (1, *event)
        return self.x[:1]

    @cached_property
    def jacobian(self) -> Tensor:  # (d, d), at the point
        return _dense_jacobian(self.module, self.t, self.point).detach()

    @cached_property
    def trace(self) -> float:
        return float(self.jacobian.diagonal().sum())

    @cached_property
    def scale(self) -> float:
        """What errors are measured by."""
        return float(torch.linalg.matrix_norm(self.jacobian)) or 1.0

    @cached_property
    def many(self) -> Tensor:  # (K, draws), estimates at the point under independent probes
        with torch.no_grad():
            count = self.draws if self.is_noisy else 8
            return self.sample(self.point.expand(count, *self.shape)).estimates.double()

    @cached_property
    def rounding(self) -> float:
        single = self.x.dtype != torch.float64
        return (SINGLE if single else ROUNDING) * self.scale

    @property
    def is_noisy(self) -> bool:
        return not self.bound.is_exact


def _shapes(case: _Case) -> str:
    bound, check = case.bound, "shapes"
    count = bound.num_estimates
    cost = bound.cost
    case.require(
        check, isinstance(count, int) and count >= 1, f"num_estimates is {count!r}, a whole number >= 1 is due"
    )
    case.require(check, isinstance(cost, int) and cost >= 0, f"cost is {cost!r}, a whole number of products is due")
    case.require(check, isinstance(bound.is_exact, bool), f"is_exact is {bound.is_exact!r}, True or False is due")
    for size in (5, 1):
        x = case.x[:size]
        sample = case.sample(x)
        if not isinstance(sample, FieldSample):
            raise case.fail(check, f"a call must return a FieldSample, got {type(sample).__name__}")
        for name, found, shape in (("value", sample.value, x.shape), ("estimates", sample.estimates, (count, size))):
            given = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            case.require(check, given == tuple(shape), f"{name} has the shape {given}, and {tuple(shape)} is due")
            case.require(check, found.dtype == x.dtype, f"{name} is {found.dtype} for points in {x.dtype}")
        error = float((sample.value - case.field(case.t, x)).detach().abs().max())
        case.require(check, error <= case.rounding, f"value is not the velocity of the field, but off by {error:.2g}")
    return f"{count} estimate{'s' * (count > 1)}, {cost} products"


def _dtypes(case: _Case) -> str:
    """Compare with float32 under the same probes."""
    if case.x.dtype != torch.float64 or not isinstance(case.module, _Specimen):
        return f"{case.x.dtype} alone, that of the field"
    probes = case.bound.draw_probes(case.x, case.generator())
    double = case.bound(case.t, case.x, probes).estimates.detach()
    single = case.estimator.bind(bind(case.module.single()))
    if probes is not None and probes.is_floating_point():
        probes = probes.float()
    found = single(case.t.float(), case.x.float(), probes).estimates.detach()
    case.require("dtypes", found.dtype == torch.float32, f"estimates are {found.dtype} for points in torch.float32")
    error = float((found.double() - double).abs().max())
    limit = SINGLE * case.scale * max(1.0, float(double.abs().max()) / case.scale)
    case.require("dtypes", error <= limit, f"float32 and float64 differ by {error:.2g}, more than {limit:.2g}")
    return f"float32 within {error:.0e}"


def _batches(case: _Case) -> str:
    probes = case.bound.draw_probes(case.x, case.generator())
    moved = case.x.clone()
    moved[1:] += 1.0
    with torch.no_grad():
        first, other = (case.estimator.bind(bind(case.module))(case.t, x, probes).estimates for x in (case.x, moved))
        change = float((first[:, 0] - other[:, 0]).abs().max())
        case.require(
            "batches", change <= case.rounding, f"moving the other samples changes an estimate by {change:.2g}"
        )
        try:
            own = case.estimator.bind(bind(case.module))(case.t.expand(len(case.x)), case.x, probes).estimates
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            raise case.fail("batches", f"it does not take a time for each sample, t of shape (B,): {error}") from error
        change = float((first - own).abs().max())
    case.require("batches", change <= case.rounding, f"a time for each sample changes estimates by {change:.2g}")
    return "samples and times do not mix"


def _probes(case: _Case) -> str:
    check, bound = "probes", case.bound
    before = torch.get_rng_state()
    first, again = (bound.draw_probes(case.x, case.generator(1)) for _ in range(2))
    with torch.no_grad():
        one, two = (case.estimator.bind(bind(case.module))(case.t, case.x, first).estimates for _ in range(2))
    untouched = torch.equal(before, torch.get_rng_state())
    same = (first is None and again is None) or (
        isinstance(first, Tensor) and isinstance(again, Tensor) and torch.equal(first, again)
    )
    case.require(
        check, same, "one seed of the generator gives different probes; draw from the generator that is passed"
    )
    case.require(
        check,
        torch.equal(one, two),
        f"two calls with the same probes differ by {float((one - two).abs().max()):.2g}; whatever is random must be in "
        "draw_probes, so that the right-hand side of a solve is one function",
    )
    case.require(check, untouched, "it draws from torch's global random numbers, not from the generator that is passed")
    if not case.is_noisy:
        return "none" if first is None else "not used"
    spread = case.many.std(1)
    case.require(
        check,
        bool((spread > 0).any()) or float((case.many - case.trace).abs().max()) <= case.rounding,
        "all samples of a batch have the same error; draw probes for each sample, (K, B, *event)",
    )
    return f"fixed within a solve; estimates spread by {float(spread.mean()):.2g}"


def _bias(case: _Case) -> str:
    if not case.is_noisy:
        error = float((case.many - case.trace).abs().max())
        limit = case.rounding
        text = f"it states to be exact, and its estimates are off by {error:.2g}; the trace is {case.trace:.4g}"
        case.require("bias", error <= limit, text)
        return f"exact to {error:.0e}; the trace is {case.trace:.3g}"
    means = case.many.mean(0)
    bias, error = float(means.mean()) - case.trace, float(means.std()) / len(means) ** 0.5
    text = (
        f"the mean of {case.draws:,} draws is {float(means.mean()):.4g} ± {error:.2g}, and the trace is "
        f"{case.trace:.4g}: a bias of {abs(bias) / max(error, 1e-300):.1f} standard errors"
    )
    case.require("bias", abs(bias) <= SIGMAS * error + case.rounding, text)
    return f"{bias:+.2g} ± {error:.2g}; the trace is {case.trace:.3g}"


def _variance(case: _Case) -> str:
    check, estimates = "variance", case.many
    stated = case.bound.standard_error(estimates.to(case.x))
    given = tuple(stated.shape) if isinstance(stated, Tensor) else type(stated).__name__
    shape = (estimates.shape[1],)
    case.require(check, given == shape, f"standard_error has the shape {given}, and {shape} is due")
    if not case.is_noisy:
        worst = float(stated.abs().max())
        case.require(check, worst == 0, f"an exact estimator has the standard error 0, got {worst:.2g}")
        return "0"
    means = estimates.mean(0)
    variance = float(means.var())
    if variance <= case.rounding**2:
        return "no noise on this field"
    found = ""
    formula: Callable[[Tensor], Tensor] | None = getattr(case.bound, "variance", None)
    if formula is not None:
        expected = float(formula(case.jacobian))
        fourth = float((means - means.mean()).pow(4).mean())
        error = math.sqrt(max(fourth - variance**2, 0.0) / len(means))
        text = f"variance(jacobian) is {expected:.4g}, and that of {case.draws:,} draws is {variance:.4g} ± {error:.2g}"
        case.require(check, abs(variance - expected) <= SIGMAS * error, text)
        found = f"; formula {expected:.3g}, measured {variance:.3g}"
    if len(estimates) == 1:
        text = "one estimate does not tell its own error, so the standard error must be NaN"
        case.require(check, bool(stated.isnan().all()), text)
        return f"unknown with one estimate{found}"
    ratio = float(stated.double().square().mean()) / variance
    text = (
        f"the squared standard error is {ratio:.2g} times the variance of {variance:.4g} in the mean, and 1 is right "
        f"({STATED[0]:g} to {STATED[1]:g} passes): are the K estimates independent, and each unbiased?"
    )
    case.require(check, STATED[0] < ratio < STATED[1], text)
    return f"stated over measured standard error {math.sqrt(ratio):.2f}{found}"


def _gradients(case: _Case) -> str:
    check, x = "gradients", case.point.clone().requires_grad_()
    parameters = [p for p in case.module.parameters() if p.requires_grad]
    dense = _dense_jacobian(case.module, case.t, x).diagonal().sum()
    leaves = [x, *parameters]
    truth = torch.autograd.grad(dense, leaves, allow_unused=True, materialize_grads=True)
    size = 1 if not case.is_noisy else max(1, case.draws // (4 * BLOCKS))

    def gradient(offset: int) -> Sequence[Tensor]:
        divergence = case.sample(x.expand(size, *case.shape), offset).divergence.mean()
        if not divergence.requires_grad:
            raise case.fail(check, "the estimates do not depend on x and the parameters; a detach() or no_grad() cuts")
        return torch.autograd.grad(divergence, leaves, allow_unused=True, materialize_grads=True)

    with torch.no_grad():
        sample = case.sample(case.x)
    recorded = sample.value.requires_grad or sample.estimates.requires_grad
    case.require(check, not recorded, "a graph is recorded under torch.no_grad()")
    largest = max(float(g.abs().max()) for g in truth) or 1.0
    if not case.is_noisy:
        error = max(float((a - b).abs().max()) for a, b in zip(gradient(0), truth, strict=True))
        text = f"gradients differ from those of the trace by {error:.2g}; the largest entry is {largest:.2g}"
        case.require(check, error <= 100 * case.rounding + 1e-9 * largest, text)
        return f"within {error:.0e}"
    blocks = [gradient(10 + i) for i in range(BLOCKS)]
    found = []
    for name, chosen in (("x", slice(0, 1)), ("the parameters", slice(1, None))):
        own = truth[chosen]
        if not own:
            continue
        for direction in (own, [torch.randn_like(g) for g in own]):
            along = torch.stack([_product(block[chosen], direction) for block in blocks])
            exact, error = float(_product(own, direction)), float(along.std()) / BLOCKS**0.5
            off = float(along.mean()) - exact
            text = (
                f"the gradient with respect to {name}, along one direction, is {float(along.mean()):.4g} ± {error:.2g} "
                f"in the mean, and {exact:.4g} for the trace"
            )
            case.require(check, abs(off) <= (SIGMAS + 1) * error + 100 * case.rounding, text)
            found.append(abs(off) / max(error, 1e-300))
    return f"within {max(found, default=0.0):.1f} standard errors"


def _norm(case: _Case) -> str:
    check, size = "norm", max(50, case.draws // 10)
    x = case.point.expand(size, *case.shape)
    probes = case.bound.draw_probes(x, case.generator())
    directions = torch.randn(2, *x.shape, generator=case.generator(1), dtype=x.dtype, device=x.device) / 2**0.5
    with torch.no_grad():
        plain = case.estimator.bind(bind(case.module))(case.t, x, probes)
        found = case.estimator.bind(bind(case.module)).with_jacobian_norm(case.t, x, probes, directions)
    for name in ("value", "estimates"):
        error = float((getattr(plain, name) - getattr(found, name)).abs().max())
        case.require(check, error <= case.rounding, f"with_jacobian_norm changes the {name} by {error:.2g}")
    norm = found.squared_jacobian_norm
    if norm is None or tuple(norm.shape) != (size,):
        shape = None if norm is None else tuple(norm.shape)
        raise case.fail(check, f"squared_jacobian_norm has the shape {shape}, and {(size,)} is due")
    exact, error = case.scale**2, float(norm.std()) / size**0.5
    off = float(norm.mean()) - exact
    text = f"the squared norm is {float(norm.mean()):.4g} ± {error:.2g} in the mean, and {exact:.4g} is right"
    case.require(check, abs(off) <= SIGMAS * error + 10 * case.rounding * case.scale, text)
    return f"{off:+.2g} ± {error:.2g}"


def _budget(case: _Case) -> str:
    costs = []
    for products in (1, 4, case.field.dimension):
        found = case.bound.with_budget(products, case.field)
        if not isinstance(found, DivergenceEstimator):
            raise case.fail("budget", f"with_budget must return a DivergenceEstimator, got {type(found).__name__}")
        costs.append(found.bind(case.field).cost)
        allowed = max(products, min(costs))
        text = f"with_budget({products}, field) costs {costs[-1]} products"
        case.require("budget", costs[-1] <= allowed, text)
    return f"{', '.join(map(str, costs))} products"


CHECKS: dict[str, Callable[[_Case], str]] = {
    "shapes": _shapes,
    "probes": _probes,
    "batches": _batches,
    "dtypes": _dtypes,
    "bias": _bias,
    "variance": _variance,
    "gradients": _gradients,
    "norm": _norm,
    "budget": _budget,
}


class _Specimen(nn.Module):
    """v = W tanh(U x + c t) of any event shape: a closed form, a bottleneck, and a Jacobian of order one."""

    def __init__(self, event_shape: tuple[int, ...], width: int = 6) -> None:
        super().__init__()
        if not event_shape or any(size < 1 for size in event_shape):
            raise InvalidTypeError(f"event_shapes must hold shapes such as (3,), got {event_shape}")
        size = math.prod(event_shape)
        self.event_shape = event_shape
        self.bottleneck_width = width
        self.inward = nn.Parameter(1.5 * torch.randn(width, size) / size**0.5)
        self.outward = nn.Parameter(torch.randn(size, width) + self.inward.detach().T * size**0.5)  # a large trace
        self.clock = nn.Parameter(torch.randn(width))

    def single(self) -> _Specimen:
        """The same in float32."""
        same = _Specimen(self.event_shape, self.bottleneck_width)
        same.load_state_dict(self.state_dict())
        return same.float()

    def encode(self, t: Tensor, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.inward.T + t.reshape(-1, 1) * self.clock

    def decode(self, t: Tensor, h: Tensor) -> Tensor:
        return (h.tanh() @ self.outward.T).reshape(-1, *self.event_shape)

    def forward(self, t: Tensor, x: Tensor, context: Any = None) -> Tensor:
        return self.decode(t, self.encode(t, x))

    def value_and_divergence(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.encode(t, x)
        diagonal = (self.inward * self.outward.T).sum(1)
        return self.decode(t, h), ((1 - h.tanh().square()) * diagonal).sum(1)


def _dense_jacobian(field: nn.Module, t: Tensor, x: Tensor) -> Tensor:  # (d, d)
    """The Jacobian at one point (1, *event), row by row; differentiable."""
    bound = bind(field)
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().clone().requires_grad_()
        value = bound(t, x).flatten()
        rows = [torch.autograd.grad(entry, x, create_graph=True, materialize_grads=True)[0] for entry in value]
        return torch.stack([row.flatten() for row in rows])


def _product(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(first, second, strict=True)]).sum()
