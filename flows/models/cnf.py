"""The continuous normalizing flow."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

import flows
from flows.arguments import checked
from flows.bases import Base, Frame, as_base
from flows.checks import as_shape, check_number, check_points, fits_in_memory
from flows.conditions import Named
from flows.divergence import Auto, DivergenceEstimator
from flows.divergence.parameters import learned_parts, learned_tensors
from flows.dynamics import AugmentedDynamics, StateDynamics
from flows.encoders import Encoder
from flows.errors import InvalidTypeError, InvalidValueError
from flows.expectations import refusal
from flows.fields import Guided, named_field
from flows.models.distribution import FlowDistribution
from flows.models.examination import examine, foreign_tensors, look_for_jumps
from flows.models.inputs import (
    check_base,
    check_encoder,
    check_place,
    context_ndim,
    contexts_of,
    features_of,
    frame_of,
    in_own_dtype,
    points_of,
)
from flows.models.precision import keeping_complex, suitable_context, working_dtype
from flows.models.results import DataNames, LogProbEstimate, Sample, Transport
from flows.naming import by_name
from flows.path_costs import PathCost, draw_directions
from flows.shares import steps_together
from flows.solvers import ODESolver, Solution, SolverError, as_solver
from flows.transforms import Identity, Transform
from flows.vector_field import BoundField, bind, view_of


@checked(own=("base",))
class CNF(nn.Module):
    r"""A flow that carries its base at t = 0 to the data at t = 1 along dx/dt = v(t, x).

    log p(x) = log p₀(z) + ∫₀¹ −div v(t, x_t) dt + log|det ∂y/∂x|, with y = transform(x), and z reached from y by
    solving from t = 1 back to t = 0. All public methods take and return points of data space, except `transport`.

    With a transform that dequantises, data space is discrete. Then `sample` gives whole numbers, and `log_prob` is
    log p(x + u) − log q(u | x) for one draw of the noise u ~ q, a lower bound of log P(x) in expectation
    (`flows.transforms.Dequantise`); `flows.evaluation.likelihood` tightens the bound with more draws.

    Batches may have any number of leading dimensions. One solve serves the whole batch, so its step sizes do too.
    [Chen et al. 2018, arXiv:1806.07366; Grathwohl et al. 2019, arXiv:1810.01367]

    Args:
        field: a `flows.fields.Field`, or any module with `forward(t, x)` or `forward(t, x, context)`; or the lower-case
            name of a class of `flows.fields`, such as `"mlp"`.
        divergence: the estimator, or its lower-case name such as `"hutchinson"`; by default `Auto()`, the closed form
            of a field that has one and the cheapest affordable estimator for any other. May be replaced at any time.
            Modules and parameters among its options are parameters of the flow.
        solver: settings of the solve, or the name of a method such as `"rk4"`; may be replaced at any time.
        base: the distribution at t = 0: a `flows.bases.Base` or its name such as `"student_t"`, any continuous
            `torch.distributions.Distribution`, or another flow. N(0, I) by default. It is moved to the field's device
            and dtype, and may be replaced before training. Without a density, as `flows.bases.Empirical`, the flow has
            none either.
        transform: data space to flow space, or its name such as `"standardise"`; `Identity()` by default.
        event_shape: shape of a point; needed if `field` does not state one. A whole number d stands for (d,).
        encoder: contexts in data units to the features that the field takes as its context; `None` (default): the field
            takes contexts as they are.

    Raises:
        InvalidTypeError: an argument is of another class.
        InvalidValueError: the event shape is missing, or field, base and `event_shape` disagree about it, or field and
            encoder about the features.

    Example:
        ```python
        import flows

        flow = flows.CNF(flows.fields.MLP((2,), hidden=(64, 64)), solver=flows.ODESolver(rtol=1e-6, atol=1e-6))
        x, log_p = flow.sample_and_log_prob((100,))  # (100, 2), (100,)
        estimate = flow.estimate_log_prob(x)  # .value .standard_error .solver_error .nfe
        ```
    """

    names: DataNames = DataNames()  # what the data are called, once the flow has been trained on some

    def __init__(
        self,
        field: nn.Module | str,
        divergence: DivergenceEstimator | str | None = None,
        solver: ODESolver | str | None = None,
        base: Base | Distribution | nn.Module | str | None = None,
        transform: Transform | str | None = None,
        event_shape: int | Sequence[int] | None = None,
        encoder: Encoder | None = None,
    ) -> None:
        super().__init__()
        field = named_field(field, event_shape)
        self.event_shape = bind(field, event_shape=event_shape).event_shape
        self.field = field
        self.divergence = Auto() if divergence is None else divergence
        self.solver = as_solver(solver)
        self.transform = (
            Identity()
            if transform is None
            else by_name(Transform, transform, "transform", event_shape=self.event_shape)
        )
        self.base: Base = base  # type: ignore[assignment]  (made one below)
        self.encoder = encoder
        if encoder is not None:
            check_encoder(self, encoder)
            encoder.to(self.device, self.dtype)
        check_base(self)

    def __setattr__(self, name: str, value: Any) -> None:
        """Take any base that the constructor takes, to the field's device and dtype."""
        if name == "divergence":  # which may be a module, that the class of this one would register by that name
            return object.__setattr__(self, name, value)
        if name == "base":
            value = as_base(value, self.event_shape)
            weights = list(self.field.parameters())
            if weights:  # noise for a field that was moved to a GPU or to float64
                value.to(weights[0].device, working_dtype(self.field))
        super().__setattr__(name, value)

    def _apply(self, fn, recurse: bool = True):
        """Move or convert all tensors; complex ones keep their imaginary parts."""
        return super()._apply(keeping_complex(fn), recurse)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a flow that was pickled when its options were plain attributes."""
        for name in ("solver", "divergence"):
            if name in state:
                state[f"_{name}"] = state.pop(name)
        super().__setstate__(state)

    @property
    def divergence(self) -> DivergenceEstimator:
        """What estimates the divergence of the field."""
        return self.__dict__["_divergence"]

    @divergence.setter
    def divergence(self, estimator: DivergenceEstimator | str) -> None:
        estimator = by_name(DivergenceEstimator, estimator)
        parts, weights = learned_parts(estimator), list(self.field.parameters())
        modules = [part for part in parts if isinstance(part, nn.Module)]
        own = nn.ParameterList([part for part in parts if isinstance(part, nn.Parameter)])
        learned = nn.ModuleList([*modules, *([own] if len(own) else [])])
        if weights and len(learned):
            learned.to(weights[0].device, working_dtype(self.field))
        self.__dict__["_divergence"] = estimator  # not by nn.Module, which would take no other kind in its place
        self.__dict__["_modules"].pop("estimator", None)
        if len(learned):
            self.estimator = learned

    @property
    def solver(self) -> ODESolver:
        """The settings of a solve."""
        return self._solver

    @solver.setter
    def solver(self, solver: ODESolver | str) -> None:
        self._solver = as_solver(solver)

    @property
    def device(self) -> torch.device:
        """Where the flow computes."""
        return self.base.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its points."""
        return self.base.dtype

    @checked(own=("context",))
    def forward(self, context: Tensor | Named | None = None) -> FlowDistribution:
        """The distribution over data space, given the context: `flow(context).log_prob(x)`."""
        return FlowDistribution(self, contexts_of(self, context))

    @checked(own=("contexts",))
    def fit_ends(
        self,
        points: Tensor,  # (n, *event), training data in data space
        contexts: Tensor | Named | None = None,  # (n, *context), of the points, for a base that depends on them
    ) -> CNF:
        """Fit the transform, then the base in flow space, to training data; return the flow.

        Call it once before training; a run from the shell does so itself. The field is not trained.

        Raises:
            InvalidValueError: transform or base cannot be fitted to them.
        """
        self.transform.fit(points)
        return self.fit_base(points, contexts)

    @checked(own=("contexts",))
    def fit_base(
        self,
        points: Tensor,  # (n, *event), training data in data space
        contexts: Tensor | Named | None = None,  # (n, *context), of the points
    ) -> CNF:
        """Fit the base alone, to what a fitted transform makes of training data; return the flow."""
        if not self.base.needs_fit:
            return self
        generator = torch.Generator(self.device).manual_seed(0)  # of dequantisation noise

        def to_flow_space(x: Tensor) -> Tensor:
            x = x.to(self.device, torch.promote_types(x.dtype, self.dtype))
            self.transform.check(x)
            return self.transform(x, generator)[0].to(self.dtype)

        tensors = contexts_of(self, contexts, "contexts")
        given = {} if self.base.context_shape is None else {"contexts": tensors}
        with torch.no_grad():
            self.base.fit(to_flow_space(points), to_flow_space, **given)
        return self

    @checked(own=("context",))
    def to_flow_space(
        self,
        x: Tensor,  # (B, *event), data space
        context: Tensor | Named | None = None,  # (B, *context)
        generator: torch.Generator | None = None,  # of dequantisation noise
        rounded: bool = True,
    ) -> Tensor:  # (B, *event)
        """Points where the ODE has them at t = 1: transformed, and in units of a base that depends on the context.

        With `rounded=False`, `x` holds whole numbers with their noise x + u, and none is added."""
        context = contexts_of(self, context)
        if rounded:
            return self._to_flow_space(x, context, generator)
        y = self.transform.from_unrounded(x).to(self.dtype)
        frame = frame_of(self, context, (len(y),))
        return y if frame is None else frame.relative(y)[0]

    def _to_flow_space(self, x: Tensor, context: Tensor | None, generator: torch.Generator | None) -> Tensor:
        """The same for arguments that are known to be right, as in each step of flow matching."""
        transform = self.transform
        if type(transform) is Identity:
            check_points("x", x, self.event_shape)
            y = x.to(self.dtype)
        else:
            y = transform(x, generator)[0].to(self.dtype)
        frame = frame_of(self, context, (y.shape[0],))
        return y if frame is None else frame.relative(y)[0]

    @checked(own=("context",))
    def to_data_space(
        self,
        y: Tensor,  # (B, *event), flow space
        context: Tensor | Named | None = None,  # (B, *context)
        rounded: bool = True,
    ) -> Tensor:  # (B, *event)
        """The inverse of `to_flow_space`.

        With `rounded=False`, whole numbers keep their noise x + u, and so the derivative with respect to `y`."""
        frame = frame_of(self, contexts_of(self, context), (y.shape[0],))  # len(y) would fix the batch of an export
        y = y if frame is None else frame.absolute(y)[0]
        return self.transform.inverse(y)[0] if rounded else self.transform.unrounded(y)

    @checked
    def guided(self, weight: float) -> CNF:
        """This flow under classifier-free guidance (`Guided`); it shares all modules.

        Its samples and its `log_prob` are those of the guided ODE, whose divergence is known as well as the flow's own.

        Raises:
            InvalidValueError: the field takes no context, or the base depends on it.
        """
        if self.base.context_shape is not None:
            raise InvalidValueError(
                f"guidance leads away from the flow without a context, and the base {type(self.base).__name__} depends "
                "on the context; sample without guidance, or train with base=normal and context_dropout=0.1"
            )
        guided = Guided(self.field, weight)
        parts = (self.divergence, self.solver, self.base, self.transform, self.event_shape, self.encoder)
        flow = CNF(guided, *parts)
        flow.names = self.names
        return flow

    def to_hub(self, repo: str, **options: Any) -> str:
        """Upload the flow to the Hugging Face Hub; see `flows.to_hub`."""
        return flows.to_hub(self, repo, **options)

    @property
    def context_shape(self) -> tuple[int, ...] | None:
        """Shape of one context; `None` where the field states none."""
        return self.bind().context_shape if self.encoder is None else self.encoder.context_shape

    def bind(
        self,
        context: Tensor | None = None,  # (B, *features)
    ) -> BoundField:
        """The field as one solve sees it, with a context that is encoded already; see `encode`.

        `flow.divergence.bind(flow.bind())` states the cost and the exactness of the divergence of this flow."""
        view = view_of(self.field, context, self.event_shape).in_units(self.transform)
        view.check_times(0.0, 1.0)
        return view

    @checked(own=("context",))
    def encode(
        self,
        context: Tensor | Named,  # (B, *context)
    ) -> Tensor:  # (B, *features)
        """What the field takes as its context: the encoder's features, or the context itself."""
        given = contexts_of(self, context)
        if given is None:
            raise InvalidTypeError(refusal("context", None, Tensor))
        return suitable_context(given if self.encoder is None else self.encoder(given), self.bind())

    @checked(own=("context",))
    def log_prob(
        self,
        x: Tensor,  # (*batch, *event), data space
        context: Tensor | Named | None = None,  # (*batch, *context), or fewer batch dimensions to broadcast
        generator: torch.Generator | None = None,  # of dequantisation noise and probes
    ) -> Tensor:  # (*batch), nats
        """log p(x) in nats; for discrete data, a lower bound.

        Points may be float64 whatever the flow's dtype is: the transform gets all their digits.

        With a stochastic estimator this is the mean over its probes.

        Raises:
            ValueError: `x` has another event shape, or holds values on which the transform is not defined, NaN
                and infinite ones among them.
            SolverError: the solve cannot go on.
        """
        return self._estimate(x, context, generator, solver_error=False).value

    @checked(own=("context",))
    def estimate_log_prob(
        self,
        x: Tensor,  # (*batch, *event), data space
        context: Tensor | Named | None = None,
        generator: torch.Generator | None = None,
        solver_error: bool = True,
        path_costs: Sequence[PathCost] = (),
        base_time: float = 0.0,
        rows: slice | None = None,
    ) -> LogProbEstimate:
        """log p(x) with its standard error and its solver error.

        The solver error compares with a second solve from the same probes, by `ODESolver.tighter`: at tolerances
        100 times tighter (or steps a tenth as long), which costs more than the value itself. It is NaN where that solve
        fails. Training may have `path_costs` integrated in the same solve, and end it at another `base_time` than 0.
        With `rows`, only these of the points (B, *event) are solved, with the random numbers that they have among all.
        So processes share a batch.
        """
        check_number("base_time", base_time, below=1)
        return self._estimate(x, context, generator, solver_error, path_costs, base_time, rows)

    def _estimate(
        self,
        x: Tensor,
        context: Tensor | Named | None,
        generator: torch.Generator | None,
        solver_error: bool,
        path_costs: Sequence[PathCost] = (),
        base_time: float = 0.0,
        rows: slice | None = None,
    ) -> LogProbEstimate:
        self.base.require_density()
        points, batch_shape = points_of(self, x)
        context = contexts_of(self, context)
        frame = frame_of(self, context, batch_shape)
        context = features_of(self, context, batch_shape)
        self.transform.check(points)
        y, terms = self.transform.account(points, generator)
        y, terms = in_own_dtype(self, y), {name: in_own_dtype(self, term) for name, term in terms.items()}
        if frame is not None:
            y, terms["base"] = frame.relative(y)
        if rows is not None:
            context, batch_shape = None if context is None else context[rows], (len(points[rows]),)
        estimator = self.divergence.bind(self.bind(context))
        y, terms, probes, directions = self._drawn(estimator, y, terms, path_costs, generator, rows)
        dynamics = AugmentedDynamics(estimator, probes, path_costs, directions)
        tensors, times = self._differentiated(estimator.field, y, probes, estimator), (1.0, base_time)
        with steps_together(rows):
            solution = self.solver.solve(dynamics, dynamics.initial_state(y), times, tensors)
            estimates = self._log_densities(solution)
        value, error = estimates.mean(0), None
        if solver_error:
            with torch.no_grad(), steps_together(rows):
                reference = self._reference(estimator, probes, y, times)
                error = (value - reference).abs().reshape(batch_shape)
        standard_error = estimator.standard_error(estimates.detach())
        integrals = dynamics.path_costs(solution.end[2:], times)
        terms = {name: term.reshape(batch_shape) for name, term in ({"model": value} | terms).items()}
        return LogProbEstimate(
            value=reduce(torch.add, terms.values()),
            standard_error=standard_error.reshape(batch_shape),
            solver_error=error,
            nfe=solution.statistics.nfe_forward,
            statistics=solution.statistics,
            terms=terms,
            path_costs={name: integral.reshape(batch_shape) for name, integral in integrals.items()},
        )

    @checked(own=("context",))
    def sample(
        self,
        shape: int | Sequence[int] = (),  # n stands for (n,)
        context: Tensor | Named | None = None,  # (*batch, *context)
        generator: torch.Generator | None = None,
    ) -> Tensor:  # (*shape, *event), or (*shape, *batch, *event) with a context
        """Draw from the flow, without computing a divergence.

        Differentiable where autograd records and the data are continuous."""
        z, context, full_shape, frame = self._base_points(shape, context, generator)
        field = self.bind(context)
        examine(self.base, field, z)
        dynamics = StateDynamics(field)
        solution = self.solver.solve(dynamics, dynamics.initial_state(z), (0.0, 1.0), self._differentiated(field, z))
        y = solution.end[0] if frame is None else frame.absolute(solution.end[0])[0]
        return self.transform.inverse(y)[0].reshape(*full_shape, *self.event_shape)

    @checked(own=("context",))
    def sample_and_log_prob(
        self,
        shape: int | Sequence[int] = (),
        context: Tensor | Named | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw from the flow, with the log-density of each draw.

        For discrete data it is log p(x + u) − log q(u | x) at the point x + u that was rounded to x: u comes from the
        flow, not from q, so this is no lower bound of log P(x) but, in expectation, an upper one.
        """
        drawn = self.draw(shape, context, generator)
        return drawn.x, drawn.log_prob

    @checked(own=("context",))
    def draw(
        self,
        shape: int | Sequence[int] = (),
        context: Tensor | Named | None = None,
        generator: torch.Generator | None = None,
        path_costs: Sequence[PathCost] = (),
        rows: slice | None = None,
    ) -> Sample:
        """`sample_and_log_prob` with standard errors and path costs; `rows` as in `estimate_log_prob`."""
        self.base.require_density()
        z, context, full_shape, frame = self._base_points(shape, context, generator)
        if rows is not None:
            context, full_shape = None if context is None else context[rows], (len(z[rows]),)
            frame = None if frame is None else frame.part(rows)
        estimator = self.divergence.bind(self.bind(context))
        z, _, probes, directions = self._drawn(estimator, z, {}, path_costs, generator, rows)
        dynamics = AugmentedDynamics(estimator, probes, path_costs, directions)
        tensors, times = self._differentiated(estimator.field, z, probes, estimator), (0.0, 1.0)
        with steps_together(rows):
            solution = self.solver.solve(dynamics, dynamics.initial_state(z), times, tensors)
            log_base = self.base.log_prob(z)
        y, changes, *integrals = solution.end
        change = changes.mean(0)
        if frame is not None:
            y, log_det = frame.absolute(y)
            change = change - log_det
        x, log_det = self.transform.inverse(y)
        error = estimator.standard_error(changes.detach())
        costs = dynamics.path_costs(integrals, times)
        return Sample(
            x=x.reshape(*full_shape, *self.event_shape),
            log_prob=(log_base + change - log_det).reshape(full_shape),
            standard_error=error.reshape(full_shape),
            path_costs={name: integral.reshape(full_shape) for name, integral in costs.items()},
            statistics=solution.statistics,
        )

    @checked(own=("times", "context"))
    def transport(
        self,
        x: Tensor,  # (*batch, *event), flow space
        times: Tensor | Sequence[float] = (1.0, 0.0),
        context: Tensor | Named | None = None,
        generator: torch.Generator | None = None,
        log_density: bool = True,
    ) -> Transport:
        """Carry points of flow space along the ODE, through all `times`.

        Two times give the end alone; more give the state at every time, the first included. The transform is
        not applied: a data point `x` has its latent at `transport(flow.to_flow_space(x, context), context=context).x`.
        """
        points, batch_shape = points_of(self, x)
        points = in_own_dtype(self, points)
        context = features_of(self, contexts_of(self, context), batch_shape)
        bound, probes, estimator = self.bind(context), None, None
        if log_density:
            estimator = self.divergence.bind(bound)
            examine(self.base, bound, points, estimator)
            probes = estimator.draw_probes(points, generator)
            dynamics = AugmentedDynamics(estimator, probes)
        else:
            examine(self.base, bound, points)
            dynamics = StateDynamics(bound)
        state = dynamics.initial_state(points)
        solution = self.solver.solve(dynamics, state, times, self._differentiated(bound, points, probes, estimator))
        pick = (lambda states: states[-1]) if len(times) == 2 else (lambda states: states)
        leading = () if len(times) == 2 else (len(times),)
        moved = pick(solution.states[0]).reshape(*leading, *batch_shape, *self.event_shape)
        change = None
        if log_density:
            change = pick(solution.states[1].mean(1)).reshape(*leading, *batch_shape)
        return Transport(moved, change, solution.statistics)

    def _drawn(
        self,
        estimator: DivergenceEstimator,
        y: Tensor,  # (B, *event)
        terms: dict[str, Tensor],  # (B,) each
        path_costs: Sequence[PathCost],
        generator: torch.Generator | None,
        rows: slice | None,
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None, Tensor | None]:
        """Points, terms, probes and directions of the rows, from draws for all points."""
        chosen = y if rows is None else y[rows]
        examine(self.base, estimator.field, chosen, estimator)
        probes = estimator.draw_probes(y, generator)
        directions = draw_directions(path_costs, y, generator)
        if rows is not None:
            probes, directions = (None if drawn is None else drawn[:, rows] for drawn in (probes, directions))
            terms = {name: term[rows] for name, term in terms.items()}
        return chosen, terms, probes, directions

    def _reference(
        self, estimator: DivergenceEstimator, probes: Tensor | None, y: Tensor, times: Sequence[float]
    ) -> Tensor:  # (B,)
        """The log-density by a much tighter solve; NaN if it fails even at a tenth of the tolerances.

        Processes that share the batch fail together, and try again together.
        """
        for solver in (self.solver.tighter(), self.solver.tighter(10.0)):
            again = AugmentedDynamics(estimator.fresh(), probes)
            with contextlib.suppress(SolverError):
                return self._log_densities(solver.solve(again, again.initial_state(y), times)).mean(0)
        return y.new_full((len(y),), torch.nan)

    def _log_densities(self, solution: Solution) -> Tensor:  # (K, B)
        """The K estimates of log p(y) from a solve that began at y and ended at the base."""
        z, change, *_ = solution.end  # change: log p(z) − log p(y)
        return self.base.log_prob(z) - change

    def _differentiated(
        self,
        field: BoundField,
        x: Tensor,
        probes: Tensor | None = None,
        estimator: DivergenceEstimator | None = None,
    ) -> list[Tensor]:
        """What a solve from `x` may need gradients of, beside its state."""
        learned = [] if estimator is None else learned_tensors(estimator)
        given = [tensor for tensor in (field.context, probes) if tensor is not None]
        stated = [*self.field.parameters(), *learned, *given]
        if self.solver.gradient == "backprop" or not torch.is_grad_enabled():
            return stated
        tensors = [*stated, *foreign_tensors(field, x, stated)]
        if self.solver.gradient == "adjoint":
            look_for_jumps(self.base, field, x, [*self.field.parameters(), *tensors[len(stated) :]])
        return tensors

    def _base_points(
        self, shape: int | Sequence[int], context: Tensor | Named | None, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor | None, tuple[int, ...], Frame | None]:
        """Base points (n, *event), the features of each, the full batch shape of the draw, and the frame of each."""
        full_shape = as_shape("shape", shape, at_least=0)
        context = contexts_of(self, context)
        if context is not None:
            full_shape += tuple(context.shape[: context.ndim - context_ndim(self, context)])
        check_place(self, "flow", self.base._like)
        if self.device.type == "cpu":
            num_bytes = math.prod(full_shape) * math.prod(self.event_shape) * self.dtype.itemsize
            fits_in_memory(f"shape: samples of shape {full_shape}", num_bytes)
        z = self.base.sample((math.prod(full_shape),), generator)
        frame = frame_of(self, context, full_shape)
        return z, features_of(self, context, full_shape), full_shape, frame
