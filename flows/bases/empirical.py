"""Data as the start of a flow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flows.arguments import checked
from flows.bases.base import Base
from flows.checks import as_shape, check_points, whole_number
from flows.errors import InvalidValueError


@checked(own=("points", "dataset"))
class Empirical(Base):
    """A data set as the source: each draw is one of its points, chosen at random.

    It has no density, so flows between two data sets are trained by flow matching and judged by a distance.

    The points are kept with the flow, in flow space. Those of a data set come in data units, and `fit` takes them
    through the flow's transform; those given as `points` are in flow space already.

    Args:
        event_shape: shape of a point. Default: that of `points` or `dataset`.
        points: (n, *event), in flow space.
        dataset: takes the training points of a data set, `dataset.reference()`, instead.
        max_points: at most so many are kept, evenly spaced. Default: 100,000.
        num_points: how many points a checkpoint holds; the run gives it. Default: `None`.

    Raises:
        InvalidValueError: there are no points, they have another shape, or not all are finite.

    Example:
        ```python
        import flows

        base = flows.bases.Empirical(dataset=flows.datasets.Moons())
        flow = flows.CNF(flows.fields.MLP((2,)), base=base)
        flow.fit_ends(flows.datasets.EightGaussians().reference())
        objective = flows.objectives.FlowMatching(coupling="optimal_transport")
        ```
    """

    points: Tensor

    def __init__(
        self,
        event_shape: int | Sequence[int] | None = None,
        points: Tensor | None = None,
        dataset: Any = None,
        max_points: int = 100_000,
        num_points: int | None = None,
    ) -> None:
        if points is not None and dataset is not None:
            raise InvalidValueError("give points or a dataset, not both")
        shape = event_shape
        if shape is None:
            shape = getattr(dataset, "event_shape", None) if points is None else tuple(points.shape[1:])
        if shape is None:
            raise InvalidValueError("Empirical needs points (n, *event), a dataset, or an event_shape")
        super().__init__(shape)
        self.max_points = whole_number("max_points", max_points)
        self.dataset, self.source = dataset, getattr(dataset, "name", None)
        if dataset is not None and tuple(dataset.event_shape) != self.event_shape:
            raise InvalidValueError(
                f"the source {dataset.name!r} has points of shape {tuple(dataset.event_shape)}, and the data of shape "
                f"{self.event_shape}; a flow leads from points to points of the same shape"
            )
        kept = torch.zeros(num_points or 0, *self.event_shape) if points is None else self._checked(points)
        self._ready = points is not None
        self.register_buffer("points", kept)

    @property
    def needs_fit(self) -> bool:
        return self.dataset is not None or not self._ready

    def sample(self, shape: int | Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        if not self._ready:
            raise InvalidValueError(
                "Empirical has no points yet; call flow.fit_ends(data.reference()), which takes the points of its "
                "dataset to flow space, or give points"
            )
        shape = as_shape("shape", shape, at_least=0)
        device = self.device if generator is None else generator.device
        index = torch.randint(len(self.points), shape, generator=generator, device=device).to(self.device)
        return self.points[index].to(self.dtype)

    def why_no_density(self) -> str:
        named = "" if self.source is None else f" (of {self.source!r})"
        return super().why_no_density().replace(" is a source", f"{named} is a source", 1)

    def fit(self, points: Tensor, to_flow_space: Callable[[Tensor], Tensor] | None = None) -> Empirical:
        """Take the points of the data set to flow space; the points given here are not used."""
        if self.dataset is not None:
            source = self.dataset.reference()
            with torch.no_grad():
                moved = source if to_flow_space is None else to_flow_space(source)
            self.points = self._checked(moved).to(self.device, self.dtype)
            self._ready, self.dataset = True, None  # copies of the flow need not copy the data
        return self

    def _checked(self, points: Tensor) -> Tensor:
        check_points("points", points, self.event_shape, at_least=1, finite=True)
        return points[:: -(-len(points) // self.max_points)].detach().clone()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **options: Any) -> None:
        given = state_dict.get(f"{prefix}points")
        if given is not None and given.shape[1:] == self.points.shape[1:] and len(given):
            self.points = torch.zeros_like(given, device=self.device, dtype=self.points.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args, **options)
        self._ready = len(self.points) > 0
