"""The ODE of a flow: positions, and the change of log-density beside them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor

from flows.divergence import DivergenceEstimator, VectorField
from flows.divergence.base import checked_value
from flows.errors import InvalidValueError
from flows.path_costs import PathCost
from flows.solvers import State

T = TypeVar("T")


class AugmentedDynamics:
    r"""d/dt (x, ℓ, c) = (v(t, x), −div v(t, x), rates), the instantaneous change of variables.

    ℓ has one row for each of the K estimates of the estimator; the rows are integrated side by side, so that
    their spread gives the standard error of the log-density. This is the only place where the sign of the
    divergence is turned. [Chen et al. 2018, arXiv:1806.07366]

    The object lives for one solve: field, estimator and probes are fixed.

    Args:
        field: ``(t, x) -> v``, bound to its context.
        estimator: how the divergence is computed.
        probes: what ``estimator.draw_probes`` returned for this solve.
        costs: path costs, whose rates are integrated as further components, (B,) each.
        directions: what :func:`flows.path_costs.draw_directions` returned for them.

    Raises:
        ValueError: two costs have the same name.
    """

    def __init__(
        self,
        field: VectorField,
        estimator: DivergenceEstimator,
        probes: Tensor | None,
        costs: Sequence[PathCost] = (),
        directions: Tensor | None = None,
    ) -> None:
        self.field = field
        self.estimator = estimator
        self.probes = probes
        self.costs = tuple(costs)
        self.directions = directions
        names = [cost.name for cost in self.costs]
        if len(set(names)) < len(names):
            raise InvalidValueError(f"each path cost can be given once, got {', '.join(names)}")

    @property
    def component_names(self) -> tuple[str, ...]:
        """What the solver calls the components of the state."""
        return "state", "log_density", *(cost.name for cost in self.costs)

    def initial_state(
        self,
        x: Tensor,  # (B, *event)
    ) -> State:  # (B, *event), (K, B), and (B,) for each cost
        """The points with no change of log-density and no costs yet."""
        return x, x.new_zeros(self.estimator.num_estimates, len(x)), *(x.new_zeros(len(x)) for _ in self.costs)

    def __call__(self, t: Tensor, state: State) -> State:
        x = state[0]
        if self.directions is None:
            sample = self.estimator(self.field, t, x, self.probes)
        else:
            sample = self.estimator.with_jacobian_norm(self.field, t, x, self.probes, self.directions)
        rates = [cost.rate(self.field, t, x, sample) for cost in self.costs]
        derivatives = (sample.value, -sample.estimates, *rates)
        # Autocast computes them in fewer digits.
        return tuple(derivative.to(x) for derivative in derivatives)

    def path_costs(self, components: Sequence[Tensor], times: Sequence[float]) -> dict[str, Tensor]:
        """The costs by name from what a solve through ``times`` has made of them: integrals over |dt|."""
        sign = 1 if times[-1] > times[0] else -1
        return {cost.name: sign * component for cost, component in zip(self.costs, components, strict=True)}

    def fresh(self) -> AugmentedDynamics:
        """The same dynamics without what the bound field keeps from earlier evaluations."""
        return _fresh(self)

    def observe(self, derivatives: State) -> dict[str, Tensor]:
        """The standard error of the divergence at one time, the root mean square over the batch, if it has one."""
        event_shape = tuple(derivatives[0].shape[1:])
        if self.estimator.num_estimates == 1 or self.estimator.is_exact(event_shape, self.field):
            return {}
        errors = self.estimator.standard_error(derivatives[1], event_shape, self.field)
        return {"divergence_standard_error": errors.square().mean().sqrt()}


class StateDynamics:
    """d/dt x = v(t, x) alone, for sampling and trajectories without a density."""

    component_names = ("state",)

    def __init__(self, field: VectorField) -> None:
        self.field = field

    def initial_state(self, x: Tensor) -> State:
        """The points."""
        return (x,)

    def __call__(self, t: Tensor, state: State) -> State:
        return (checked_value(self.field(t, state[0]), state[0]).to(state[0]),)

    def fresh(self) -> StateDynamics:
        """The same dynamics without what the bound field keeps from earlier evaluations."""
        return _fresh(self)


def _fresh(dynamics: T) -> T:
    renewed = copy.copy(dynamics)
    if hasattr(dynamics.field, "fresh"):
        renewed.field = dynamics.field.fresh()
    return renewed
