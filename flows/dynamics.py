"""The ODE of a flow: positions, and the change of log-density beside them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from flows.arguments import checked
from flows.divergence import Auto, DivergenceEstimator, FieldSample
from flows.divergence.parameters import learned_tensors
from flows.errors import InvalidValueError
from flows.path_costs import PathCost
from flows.promises import without_gradients
from flows.solvers import Compilable, NotCompilableError, State
from flows.vector_field import BoundField, checked_value

PIECE = 2500  # samples of a large batch that a CPU's thread evaluates at once: about 0.75 of the time of 10,000


def piece_size() -> int:
    """Samples of a large batch that are evaluated at once on a CPU."""
    return PIECE * torch.get_num_threads()


def differentiable(
    estimates: Tensor,  # of the divergence
    estimator: DivergenceEstimator,  # which took them
) -> Tensor:
    """The estimates, whose backward pass says so if the field's divergence cannot be differentiated."""
    if not estimates.requires_grad:
        return estimates
    mode = str(getattr(estimator, "estimator", estimator).mode)
    for view in estimator.field.strangers:
        reason = view.traits.refuses_gradients.get(mode)
        if reason:
            estimates = without_gradients(estimates, reason, view.traits.forget)
    return estimates


@checked
class AugmentedDynamics:
    r"""d/dt (x, ℓ, c) = (v(t, x), −div v(t, x), rates), the instantaneous change of variables.

    ℓ has one row for each of the K estimates of the divergence. The rows are integrated side by side, so that their
    spread gives the standard error of the log-density. This is the only place where the sign of the divergence is
    turned. [Chen et al. 2018, arXiv:1806.07366]

    The object lives for one solve.

    Args:
        estimator: bound to the field; see `DivergenceEstimator.bind`.
        probes: what `estimator.draw_probes` returned for this solve.
        costs: path costs, whose rates are integrated as further components, (B,) each.
        directions: what `flows.path_costs.draw_directions` returned for them.

    Raises:
        ValueError: two costs have the same name.
    """

    def __init__(
        self,
        estimator: DivergenceEstimator,
        probes: Tensor | None,
        costs: Sequence[PathCost] = (),
        directions: Tensor | None = None,
    ) -> None:
        self.estimator = estimator
        self.probes = probes
        self.costs = checked_costs(costs)
        self.directions = directions

    @property
    def component_names(self) -> tuple[str, ...]:
        """The names of the components of the state."""
        return "state", "log_density", *(cost.name for cost in self.costs)

    def initial_state(
        self,
        x: Tensor,  # (B, *event)
    ) -> State:  # (B, *event), (K, B), and (B,) for each cost
        """The points, with no change of log-density and no costs yet."""
        return x, x.new_zeros(self.estimator.num_estimates, len(x)), *(x.new_zeros(len(x)) for _ in self.costs)

    def __call__(self, t: Tensor, state: State) -> State:
        x = state[0]
        if self.directions is None:
            sample = self._in_pieces(t, x) if self._is_large(t, x) else self.estimator(t, x, self.probes)
        else:
            sample = self.estimator.with_jacobian_norm(t, x, self.probes, self.directions)
        rates = [cost.rate(self.estimator.field, t, x, sample) for cost in self.costs]
        derivatives = (sample.value, -differentiable(sample.estimates, self.estimator), *rates)
        # Autocast computes them in fewer digits.
        return tuple(derivative.to(x) for derivative in derivatives)

    def leading(self, t: Tensor, state: State) -> Tensor:
        """v(t, x) alone, for stages of a step whose divergence has no weight in its result."""
        x = state[0]
        return checked_value(self.estimator.field.velocity(t, x), x).to(x)

    def _is_large(self, t: Tensor, x: Tensor) -> bool:
        """Whether an evaluation without gradients would leave the processor's cache, and can be cut."""
        if (
            len(x) < 2 * piece_size()
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or x.device.type != "cpu"
        ):
            return False
        return self.probes is None and t.ndim == 0 and _treats_samples_alone(self.estimator.field)

    def _in_pieces(self, t: Tensor, x: Tensor) -> FieldSample:
        """The evaluation in pieces of the batch, whose samples do not depend on each other."""
        samples = [self.estimator(t, piece) for piece in x.tensor_split(round(len(x) / piece_size()))]
        value = torch.cat([sample.value for sample in samples])
        return FieldSample(value, torch.cat([sample.estimates for sample in samples], dim=1))

    def path_costs(self, components: Sequence[Tensor], times: Sequence[float]) -> dict[str, Tensor]:
        """The costs by name, as integrals over |dt|, from the components at the end of a solve through `times`."""
        sign = 1 if times[-1] > times[0] else -1
        return {cost.name: sign * component for cost, component in zip(self.costs, components, strict=True)}

    @property
    def jumps(self) -> Tensor | Sequence[float]:
        """The times at which the field jumps, onto which the solver steps."""
        return self.estimator.field.jumps

    def fresh(self) -> AugmentedDynamics:
        """The same dynamics without the tensors that the bound field keeps from earlier evaluations."""
        return AugmentedDynamics(self.estimator.fresh(), self.probes, self.costs, self.directions)

    def compilable(self) -> Compilable:
        """What compiled steps need to know; see `flows.ODESolver`."""
        estimator, costs = self.estimator, self.costs
        field = estimator.field
        shared = _compilable(field, (field.context, self.probes, self.directions), costs)
        if learned_tensors(estimator):
            raise NotCompilableError(f"{type(estimator).__name__} has parameters of its own")
        if any(reason for view in field.strangers for reason in view.traits.refuses_gradients.values()):
            raise NotCompilableError(f"the divergence of the field {field.name} has no gradient")

        def rebuild(tensors: Sequence[Tensor]) -> AugmentedDynamics:
            context, probes, directions = shared.rebuild(tensors)
            return AugmentedDynamics(estimator.bind(field.given(context)), probes, costs, directions)

        alone = self.probes is None and self.directions is None and _treats_samples_alone(field)
        forward = shared.forward_mode or estimator.mode == "forward"
        key = (shared.key, _hashable(estimator), self.estimator.num_estimates)
        return replace(shared, key=key, rebuild=rebuild, forward_mode=forward, piece=piece_size() if alone else 0)

    def observe(self, derivatives: State) -> dict[str, Tensor]:
        """The standard error of the divergence at one time, the root mean square over the batch, if there is one."""
        if self.estimator.num_estimates == 1 or self.estimator.is_exact:
            return {}
        return {"divergence_standard_error": self.estimator.standard_error(derivatives[1]).square().mean().sqrt()}


@checked
class StateDynamics:
    """d/dt (x, c) = (v(t, x), rates), for samples and trajectories without a density.

    Args:
        field: bound to its context.
        costs, directions: as for `AugmentedDynamics`.
        starts: (B,), added to the times of each sample, so that samples with different starts are solved together.
        whole: the dynamics of all samples, where processes share them; steps end at the jumps of all.
    """

    def __init__(
        self,
        field: BoundField,
        costs: Sequence[PathCost] = (),
        directions: Tensor | None = None,
        starts: Tensor | None = None,
        whole: StateDynamics | None = None,
    ) -> None:
        self.field = field
        self.costs = checked_costs(costs)
        self.directions = directions
        self.starts = starts
        self.whole = whole
        self.estimator = None if directions is None else Auto().bind(field)  # of the Jacobian's norm

    @property
    def component_names(self) -> tuple[str, ...]:
        """The names of the components of the state."""
        return "state", *(cost.name for cost in self.costs)

    def initial_state(self, x: Tensor) -> State:
        """The points, with no costs yet."""
        return x, *(x.new_zeros(len(x)) for _ in self.costs)

    def __call__(self, t: Tensor, state: State) -> State:
        x = state[0]
        if self.starts is not None:
            t = self.starts + t
        if not self.costs:
            return (checked_value(self.field.velocity(t, x), x),)
        if self.estimator is None or self.directions is None:
            sample = FieldSample(checked_value(self.field.velocity(t, x), x), x.new_zeros(0, len(x)))
        else:
            probes = self.estimator.draw_probes(x, torch.Generator(x.device).manual_seed(0))
            sample = self.estimator.with_jacobian_norm(t, x, probes, self.directions)
        rates = [cost.rate(self.field, t, x, sample) for cost in self.costs]
        return tuple(derivative.to(x) for derivative in (sample.value, *rates))

    def leading(self, t: Tensor, state: State) -> Tensor:
        """The velocity alone, for stages of a step whose rates have no weight in its result."""
        return self(t, state)[0] if not self.costs else StateDynamics(self.field, starts=self.starts)(t, state)[0]

    def compilable(self) -> Compilable:
        """What compiled steps need to know; see `flows.ODESolver`."""
        field, costs = self.field, self.costs
        shared = _compilable(field, (field.context, self.directions, self.starts), costs)

        def rebuild(tensors: Sequence[Tensor]) -> StateDynamics:
            context, directions, starts = shared.rebuild(tensors)
            return StateDynamics(field.given(context), costs, directions, starts)

        alone = self.directions is None and self.starts is None and _treats_samples_alone(field)
        return replace(shared, rebuild=rebuild, piece=piece_size() if alone else 0)

    def path_costs(self, components: Sequence[Tensor], sign: int = 1) -> dict[str, Tensor]:
        """The costs by name, as integrals over |dt|, from the components at the end of a solve."""
        return {cost.name: sign * component for cost, component in zip(self.costs, components, strict=True)}

    @property
    def jumps(self) -> Tensor | Sequence[float]:
        """The times at which the field jumps for any of the samples, as the solver counts them."""
        if self.whole is not None:
            return self.whole.jumps
        jumps = self.field.jumps
        if self.starts is None or not len(jumps):
            return jumps
        return torch.as_tensor(jumps, dtype=torch.float64) - self.starts[:, None].to("cpu", torch.float64)

    @property
    def time_offset(self) -> float:
        """The largest number that is added to times."""
        if self.whole is not None:
            return self.whole.time_offset
        return 0.0 if self.starts is None or not len(self.starts) else float(self.starts.abs().max())

    def fresh(self) -> StateDynamics:
        """The same dynamics without the tensors that the bound field keeps from earlier evaluations."""
        return StateDynamics(self.field.fresh(), self.costs, self.directions, self.starts, self.whole)

    def part(self, rows: slice, field: BoundField) -> StateDynamics:
        """The dynamics of some samples, with the field bound to their contexts."""
        directions = None if self.directions is None else self.directions[:, rows]
        return StateDynamics(field, self.costs, directions, None if self.starts is None else self.starts[rows], self)


def _treats_samples_alone(field: BoundField) -> bool:
    """Whether no sample depends on others, and nothing but the state differs between them."""
    return field.context is None and field.traits.built_in


def _compilable(field: BoundField, tensors: Sequence[Tensor | None], costs: Sequence[PathCost]) -> Compilable:
    """What is the same for all dynamics of a field; `rebuild` puts `None` back where tensors were missing.

    Raises:
        NotCompilableError: the field is no module, or evaluations have to heal its habits.
    """
    module = field.field
    if not isinstance(module, nn.Module):
        raise NotCompilableError(f"the field {field.name} is no torch.nn.Module, so its tensors are not known")
    for view in field.strangers:
        traits = view.traits
        if traits.copies_inputs or traits.copies_output or traits.frozen_buffers:
            raise NotCompilableError(f"the field {view.name} writes into its tensors")

    def rebuild(given: Sequence[Tensor]) -> list[Tensor | None]:
        rest = iter(given)
        return [None if tensor is None else next(rest) for tensor in tensors]

    present = tuple(tensor is not None for tensor in tensors)
    key = (field.event_shape, tuple(map(_hashable, costs)), present)
    return Compilable(key, module, [tensor for tensor in tensors if tensor is not None], rebuild, bool(costs))


def _hashable(options: object) -> Hashable:
    """Options of a class of their own, to be compared.

    Raises:
        NotCompilableError: they cannot be compared.
    """
    try:
        hash(options)
    except TypeError:
        raise NotCompilableError(f"the options of {type(options).__name__} cannot be hashed") from None
    return type(options), options  # pyright: ignore[reportReturnType]


def checked_costs(costs: Sequence[PathCost]) -> tuple[PathCost, ...]:
    """The costs, each of which must be there once."""
    names = [cost.name for cost in costs]
    if len(set(names)) < len(names):
        raise InvalidValueError(f"each path cost can be given once, got {', '.join(names)}")
    return tuple(costs)
