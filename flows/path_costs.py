"""Path costs, which regularise a flow in training.

A cost is a rate c(t, x). Its integral ∫₀¹ c(t, x_t) dt along the path of each example, times its weight, is added to
the loss. Costs belong to an objective, so computing a log-density or a sample does not compute them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flows.arguments import CheckedMethods, checked
from flows.divergence import FieldSample
from flows.divergence.probes import Rademacher
from flows.errors import InvalidTypeError, InvalidValueError
from flows.vector_field import BoundField


@checked
@dataclass(frozen=True)
class PathCost(CheckedMethods, ABC, checks=("draw_directions",)):
    """A rate c(t, x) >= 0 for each example.

    To add one: subclass it with `name` and `rate`, and give it to an objective as one of its
    `regularizers`.

    Args:
        weight: factor of the integral in the loss (nats per example); 0 turns the cost off.

    Example:
        ```python
        import torch

        import flows
        from flows.path_costs import KineticEnergy

        flow = flows.CNF(flows.fields.MLP((2,)))
        flow.estimate_log_prob(torch.randn(10, 2), path_costs=[KineticEnergy()]).path_costs  # ∫ ‖v‖² dt of each point
        ```
    """

    name: ClassVar[str]  # of the metric and of the component of the solve
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise InvalidValueError(f"the weight of {type(self).__name__} must be >= 0, got {self.weight}")

    @abstractmethod
    def rate(
        self,
        field: BoundField,  # bound to its context
        t: Tensor,  # 0-d
        x: Tensor,  # (B, *event)
        sample: FieldSample,  # of the field there; its squared norm of the Jacobian only for costs with directions
    ) -> Tensor:  # (B,)
        """c(t, x)."""

    def draw_directions(
        self,
        x: Tensor,  # (B, *event); gives shape, dtype and device
        generator: torch.Generator | None = None,
    ) -> Tensor | None:  # (P, B, *event)
        """Directions for the estimator's `with_jacobian_norm`; `None` for costs without the norm."""
        return None


@checked
@dataclass(frozen=True)
class KineticEnergy(PathCost):
    """c = ‖v‖², summed over the event: straight paths at constant speed have the least.

    [Finlay et al. 2020, arXiv:2002.02798; Benamou & Brenier 2000]

    Example:
        ```python
        import flows
        from flows.path_costs import KineticEnergy

        objective = flows.objectives.MaximumLikelihood([KineticEnergy(0.01)])
        ```
    """

    name: ClassVar[str] = "kinetic_energy"

    def rate(self, field: BoundField, t: Tensor, x: Tensor, sample: FieldSample) -> Tensor:
        return sample.value.square().flatten(1).sum(1)


@checked
@dataclass(frozen=True)
class JacobianNorm(PathCost):
    r"""c = ‖∂v/∂x‖²_F, or an unbiased estimate of it.

    Free where the divergence estimator has products with probes of its own, ‖Jᵀε‖² (`Hutchinson`, `Probing`),
    or all rows (`Exact`). Otherwise it takes products with directions of its own: in closed form where the
    field has `value_divergence_and_products`, as perceptrons do, else by autograd. These are the basis, which is
    exact, up to `exact_up_to` dimensions, and `num_probes` random signs beyond.
    [Finlay et al. 2020, arXiv:2002.02798]

    Args:
        weight: see `PathCost`.
        num_probes: >= 1.
        exact_up_to: dimensions.

    Example:
        ```python
        import flows
        from flows.path_costs import JacobianNorm

        objective = flows.objectives.MaximumLikelihood([JacobianNorm(0.01)])
        ```
    """

    name: ClassVar[str] = "jacobian_norm"
    num_probes: int = 1
    exact_up_to: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_probes < 1 or self.exact_up_to < 0:
            raise InvalidValueError(
                f"expected num_probes >= 1 and exact_up_to >= 0, got {self.num_probes} and {self.exact_up_to}"
            )

    def draw_directions(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        dimension = math.prod(x.shape[1:])
        if dimension <= self.exact_up_to:
            basis = torch.eye(dimension, dtype=x.dtype, device=x.device)
            return basis.view(dimension, 1, *x.shape[1:]).expand(dimension, *x.shape)
        return Rademacher().draw(self.num_probes, x, generator) / math.sqrt(self.num_probes)

    def rate(self, field: BoundField, t: Tensor, x: Tensor, sample: FieldSample) -> Tensor:
        assert sample.squared_jacobian_norm is not None  # as draw_directions asked for it
        return sample.squared_jacobian_norm


@checked
@dataclass(frozen=True)
class TotalDerivative(PathCost):
    """c = ‖∂v/∂t + (∂v/∂x) v‖², the squared acceleration along a path.

    Cost: one product in forward mode, with the field's own evaluation.

    Example:
        ```python
        import flows
        from flows.path_costs import TotalDerivative

        objective = flows.objectives.MaximumLikelihood([TotalDerivative(0.01)])
        ```
    """

    name: ClassVar[str] = "total_derivative"

    def rate(self, field: BoundField, t: Tensor, x: Tensor, sample: FieldSample) -> Tensor:
        acceleration = torch.func.jvp(field, (t, x), (torch.ones_like(t), sample.value))[1]
        return acceleration.square().flatten(1).sum(1)


@checked
@dataclass(frozen=True)
class HamiltonJacobi(PathCost):
    """c = |∂Φ/∂t − ½ ‖∇Φ‖²| of a field v = −∇Φ, which is zero along the paths of optimal transport.

    For fields with a `potential(t, x, context)`. [Onken et al. 2021, arXiv:2006.00104; Yang & Karniadakis 2020]

    Raises:
        TypeError: the field has no potential.

    Example:
        ```python
        import flows
        from flows.path_costs import HamiltonJacobi

        objective = flows.objectives.MaximumLikelihood([HamiltonJacobi(0.1)])  # for `flows.fields.Potential`
        ```
    """

    name: ClassVar[str] = "hamilton_jacobi"

    def rate(self, field: BoundField, t: Tensor, x: Tensor, sample: FieldSample) -> Tensor:
        potential = field.potential
        if potential is None:
            raise InvalidTypeError(
                f"HamiltonJacobi needs a field with a potential, such as Potential, and {field.name} has none; "
                "for any field use TotalDerivative"
            )
        rate = torch.func.jvp(lambda s: potential(s, x), (t,), (torch.ones_like(t),))[1]
        return (rate - 0.5 * sample.value.square().flatten(1).sum(1)).abs()


@checked
@dataclass(frozen=True)
class CorrectionEnergy(PathCost):
    """c = ‖correction‖², what a network adds to known equations, as the field sees states.

    It keeps the network from imitating terms of the equations. For `Physics` with a correction.

    Raises:
        InvalidTypeError: the field has no correction.

    Example:
        ```python
        import flows
        from flows.equations import pendulum
        from flows.path_costs import CorrectionEnergy

        network = flows.fields.MLP((2,), hidden=(8,))
        field = flows.fields.Physics(pendulum, event_shape=(2,), correction=network)
        objective = flows.objectives.TrajectoryMatching(regularizers=[CorrectionEnergy(0.1)])
        ```
    """

    name: ClassVar[str] = "correction_energy"

    def rate(self, field: BoundField, t: Tensor, x: Tensor, sample: FieldSample) -> Tensor:
        if field.correction is None:
            raise InvalidTypeError(
                f"CorrectionEnergy needs known equations with a network, Physics(correction=...), and {field.name} "
                "has no correction; for any field use KineticEnergy"
            )
        return field.correction(t, x).square().flatten(1).sum(1)


@checked
def draw_directions(
    costs: Iterable[PathCost], x: Tensor, generator: torch.Generator | None = None
) -> Tensor | None:  # (P, B, *event)
    """Directions for all costs: those of the first that needs any."""
    drawn = (cost.draw_directions(x, generator) for cost in costs)
    return next((directions for directions in drawn if directions is not None), None)
