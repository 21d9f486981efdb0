"""The ODE of a flow: positions, and the change of log-density beside them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from flows.arguments import checked
from flows.divergence import DivergenceEstimator
from flows.errors import InvalidValueError
from flows.path_costs import PathCost
from flows.promises import without_gradients
from flows.solvers import State
from flows.vector_field import BoundField, checked_value


def differentiable(
    estimates: Tensor,  # of the divergence
    field: BoundField,
) -> Tensor:
    """The estimates, whose backward pass says so if the field's divergence cannot be differentiated."""
    reasons = [view.traits.refuses_gradients for view in field.strangers]
    if not any(reasons) or not estimates.requires_grad:
        return estimates
    return without_gradients(estimates, " ".join(reasons))


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
        self.costs = tuple(costs)
        self.directions = directions
        names = [cost.name for cost in self.costs]
        if len(set(names)) < len(names):
            raise InvalidValueError(f"each path cost can be given once, got {', '.join(names)}")

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
            sample = self.estimator(t, x, self.probes)
        else:
            sample = self.estimator.with_jacobian_norm(t, x, self.probes, self.directions)
        rates = [cost.rate(self.estimator.field, t, x, sample) for cost in self.costs]
        derivatives = (sample.value, -differentiable(sample.estimates, self.estimator.field), *rates)
        # Autocast computes them in fewer digits.
        return tuple(derivative.to(x) for derivative in derivatives)

    def path_costs(self, components: Sequence[Tensor], times: Sequence[float]) -> dict[str, Tensor]:
        """The costs by name, as integrals over |dt|, from the components at the end of a solve through `times`."""
        sign = 1 if times[-1] > times[0] else -1
        return {cost.name: sign * component for cost, component in zip(self.costs, components, strict=True)}

    def fresh(self) -> AugmentedDynamics:
        """The same dynamics without the tensors that the bound field keeps from earlier evaluations."""
        return AugmentedDynamics(self.estimator.fresh(), self.probes, self.costs, self.directions)

    def observe(self, derivatives: State) -> dict[str, Tensor]:
        """The standard error of the divergence at one time, the root mean square over the batch, if there is one."""
        if self.estimator.num_estimates == 1 or self.estimator.is_exact:
            return {}
        return {"divergence_standard_error": self.estimator.standard_error(derivatives[1]).square().mean().sqrt()}


@checked
class StateDynamics:
    """d/dt x = v(t, x) alone, for sampling and trajectories without a density."""

    component_names = ("state",)

    def __init__(self, field: BoundField) -> None:
        self.field = field

    def initial_state(self, x: Tensor) -> State:
        """The points."""
        return (x,)

    def __call__(self, t: Tensor, state: State) -> State:
        return (checked_value(self.field(t, state[0]), state[0]).to(state[0]),)

    def fresh(self) -> StateDynamics:
        """The same dynamics without the tensors that the bound field keeps from earlier evaluations."""
        return StateDynamics(self.field.fresh())
