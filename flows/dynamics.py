"""The ODE of a flow: positions, and the change of log-density beside them."""

from __future__ import annotations

from torch import Tensor

from flows.divergence import DivergenceEstimator, VectorField
from flows.divergence.base import checked_value
from flows.solvers import State


class AugmentedDynamics:
    r"""d/dt (x, ℓ) = (v(t, x), −div v(t, x)), the instantaneous change of variables.

    ℓ has one row for each of the K estimates of the estimator; the rows are integrated side by side, so that
    their spread gives the standard error of the log-density. This is the only place where the sign of the
    divergence is turned. [Chen et al. 2018, arXiv:1806.07366]

    The object lives for one solve: field, estimator and probes are fixed.

    Args:
        field: ``(t, x) -> v``, bound to its context.
        estimator: how the divergence is computed.
        probes: what ``estimator.draw_probes`` returned for this solve.
    """

    def __init__(self, field: VectorField, estimator: DivergenceEstimator, probes: Tensor | None) -> None:
        self.field = field
        self.estimator = estimator
        self.probes = probes

    def initial_state(
        self,
        x: Tensor,  # (B, *event)
    ) -> State:  # (B, *event) and (K, B)
        """The points with no change of log-density yet."""
        return x, x.new_zeros(self.estimator.num_estimates, len(x))

    def __call__(self, t: Tensor, state: State) -> State:
        sample = self.estimator(self.field, t, state[0], self.probes)
        return sample.value.to(state[0]), -sample.estimates.to(state[1])  # autocast computes them in fewer digits


class StateDynamics:
    """d/dt x = v(t, x) alone, for sampling and trajectories without a density."""

    def __init__(self, field: VectorField) -> None:
        self.field = field

    def initial_state(self, x: Tensor) -> State:
        """The points."""
        return (x,)

    def __call__(self, t: Tensor, state: State) -> State:
        return (checked_value(self.field(t, state[0]), state[0]).to(state[0]),)
