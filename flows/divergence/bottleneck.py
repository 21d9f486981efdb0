"""Trace estimation inside the narrowest layer of a network."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flows.divergence.autodiff import Mode, check_mode, linearise_map, products_per_call
from flows.divergence.base import DivergenceEstimator, FieldSample, VectorField, checked_value, declared, field_name
from flows.divergence.exact import basis_trace
from flows.divergence.probes import ProbeFamily, Rademacher
from flows.errors import InvalidTypeError, InvalidValueError
from flows.naming import by_name


@dataclass(frozen=True)
class Bottleneck(DivergenceEstimator):
    r"""div v = tr(J_dec J_enc) = tr(J_enc J_dec) ≈ ε_kᵀ J_enc J_dec ε_k with ε in ℝᴴ, for v = decode ∘ encode.

    ``encode: ℝᵈ → ℝᴴ`` ends at the narrowest layer of the field. The variance is that of the probe family
    (:mod:`flows.divergence.probes`) for the H × H matrix J_enc J_dec in the place of J: smaller where H < d and
    the spectrum of J is flat. With ``exact=True`` the H basis vectors take the place of the probes, and the
    result is exact.

    Cost: one product a probe, H of them if exact. At H >= d nothing is wrong, and nothing gained.

    Source: Grathwohl et al. 2019, arXiv:1810.01367, section 3.1.1.

    Args:
        num_probes: K >= 1; not used if exact.
        probes: a :class:`ProbeFamily` or its lower-case name.
        exact: whether to take all H basis vectors instead of probes.
        mode: ``"reverse"`` or ``"forward"`` Jacobian products.
        chunk_size: products in one vectorised call; ``None``: 1 in reverse, 16 in forward mode.

    Raises:
        TypeError: the field has no ``encode(t, x)``, ``decode(t, h)`` and ``bottleneck_width``; the message names
            what to choose instead.
    """

    num_probes: int = 1
    probes: ProbeFamily | str = Rademacher()  # noqa: RUF009 (stateless)
    exact: bool = False
    mode: Mode = "reverse"
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        if self.num_probes < 1:
            raise InvalidValueError(
                f"num_probes must be >= 1, got {self.num_probes}; for no sampling noise set exact=True"
            )
        check_mode(self.mode, self.chunk_size)
        object.__setattr__(self, "probes", by_name(ProbeFamily, self.probes))

    def draw_probes(
        self, x: Tensor, generator: torch.Generator | None = None, field: object | None = None
    ) -> Tensor | None:  # (K, B, H)
        if self.exact:
            return None
        return self.probes.draw(self.num_probes, x.new_empty(len(x), _width(field)), generator)

    def __call__(self, field: VectorField, t: Tensor, x: Tensor, probes: Tensor | None) -> FieldSample:
        width = _width(field)
        code, encoder = linearise_map(lambda y: field.encode(t, y), x, self.mode, self.chunk_size)
        if code.shape != (len(x), width):
            raise InvalidValueError(
                f"encode(t, x) must return one code a point, of shape {(len(x), width)} by the field's "
                f"bottleneck_width, got {tuple(code.shape)}"
            )
        value, decoder = linearise_map(lambda h: field.decode(t, h), code, self.mode, self.chunk_size)
        checked_value(value, x)
        first, second = (encoder, decoder) if self.mode == "reverse" else (decoder, encoder)
        if self.exact:
            trace = basis_trace(lambda u: second(first(u)), code, products_per_call(self.mode, self.chunk_size))
            return FieldSample(value, trace.unsqueeze(0))
        return FieldSample(value, (second(first(probes)) * probes).sum(2))

    @property
    def num_estimates(self) -> int:
        return 1 if self.exact else self.num_probes

    def cost(self, event_shape: tuple[int, ...], field: object | None = None) -> int:
        return _width(field) if self.exact else self.num_probes

    def with_budget(self, num_products: int, event_shape: tuple[int, ...], field: object | None = None) -> Bottleneck:
        if self.exact:
            return self
        return replace(self, num_probes=max(1, min(num_products, _width(field))))

    def is_exact(self, event_shape: tuple[int, ...], field: object | None = None) -> bool:
        """Whether ``exact`` is set, or the probes of this family fill the bottleneck of the field."""
        return self.exact or (field is not None and self._factor(field) == 0)

    def standard_error(self, estimates: Tensor, event_shape: tuple[int, ...], field: object | None = None) -> Tensor:
        return super().standard_error(estimates, event_shape, field) * (0 if self.exact else self._factor(field))

    def _factor(self, field: object | None) -> float:
        return self.probes.spread_factor(self.num_probes, _width(field))


def _width(field: object | None) -> int:
    """H of the field."""
    width = declared(field, "bottleneck_width")
    if width is None:
        name = "no field" if field is None else field_name(field)
        raise InvalidTypeError(
            "Bottleneck() needs a field with encode(t, x), decode(t, h) and bottleneck_width, such as "
            f"flows.fields.MLP, and got {name}; choose Hutchinson(num_probes=...) or Exact(), which take any field"
        )
    return width
