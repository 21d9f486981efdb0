"""Trace estimation in the narrowest layer of a network."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flows.arguments import checked
from flows.divergence.autodiff import Mode, check_mode, linearise, products_per_call
from flows.divergence.base import DivergenceEstimator, FieldSample
from flows.divergence.exact import basis_trace
from flows.divergence.probes import ProbeFamily
from flows.errors import InvalidTypeError, InvalidValueError
from flows.naming import by_name
from flows.vector_field import BoundField, VectorField, checked_value


@checked
@dataclass(frozen=True)
class Bottleneck(DivergenceEstimator):
    r"""div v = tr(J_dec J_enc) = tr(J_enc J_dec) ≈ ε_kᵀ J_enc J_dec ε_k with ε in ℝᴴ, for v = decode ∘ encode.

    `encode: ℝᵈ → ℝᴴ` ends at the narrowest layer of the field. The variance is that of the probe family
    (`flows.divergence.probes`) for the H × H matrix J_enc J_dec in the place of J: smaller where H < d and
    the spectrum of J is flat. With `exact=True` the H basis vectors take the place of the probes, and the
    result is exact.

    Cost: one product a probe, H of them if exact. At H >= d it is correct, but gains nothing.

    Source: Grathwohl et al. 2019, arXiv:1810.01367, section 3.1.1.

    Args:
        num_probes: K >= 1; not used if exact.
        probes: a `ProbeFamily` or its lower-case name.
        exact: whether to take all H basis vectors instead of probes.
        mode: `"reverse"` or `"forward"` Jacobian products.
        chunk_size: products in one vectorised call; `None`: 1 in reverse, 16 in forward mode.

    Raises:
        TypeError: the field has no `encode(t, x)`, `decode(t, h)` and `bottleneck_width`; the message names
            what to choose instead.

    Example:
        ```python
        import torch

        import flows
        from flows.divergence import Bottleneck

        field = flows.fields.MLP((64,), hidden=(16,))  # 64 → 16 → 64: probes of 16 entries do
        flow = flows.CNF(field, divergence=Bottleneck(num_probes=4))
        flow.log_prob(torch.randn(10, 64))
        ```
    """

    num_probes: int = 1
    probes: ProbeFamily | str = "rademacher"
    exact: bool = False
    mode: Mode = "reverse"
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        if self.num_probes < 1:
            raise InvalidValueError(
                f"num_probes must be >= 1, got {self.num_probes}; for no sampling noise set exact=True"
            )
        check_mode(self.mode, self.chunk_size)
        object.__setattr__(self, "probes", by_name(ProbeFamily, self.probes, "probes"))

    def draw_probes(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor | None:  # (K, B, H)
        if self.exact:
            return None
        return self.family.draw(self.num_probes, x.new_empty(len(x), self._parts[2]), generator)

    def __call__(self, t: Tensor, x: Tensor, probes: Tensor | None = None) -> FieldSample:
        encode, decode, width = self._parts

        def check_code(code: Tensor, x: Tensor) -> Tensor:
            if code.shape != (len(x), width):
                raise InvalidValueError(
                    f"encode(t, x) must return one code a point, of shape {(len(x), width)} by the field's "
                    f"bottleneck_width, got {tuple(code.shape)}"
                )
            return code

        code, encoder = linearise(encode, t, x, self.mode, self.chunk_size, check_code)
        value, decoder = linearise(decode, t, code, self.mode, self.chunk_size, lambda v, _: checked_value(v, x))
        first, second = (encoder, decoder) if self.mode == "reverse" else (decoder, encoder)
        if probes is None:
            trace = basis_trace(lambda u: second(first(u)), code, products_per_call(self.mode, self.chunk_size))
            return FieldSample(value, trace.unsqueeze(0))
        return FieldSample(value, (second(first(probes)) * probes).sum(2))

    @property
    def num_estimates(self) -> int:
        return 1 if self.exact else self.num_probes

    @property
    def cost(self) -> int:
        return self._parts[2] if self.exact else self.num_probes

    def with_budget(self, num_products: int, field: BoundField) -> Bottleneck:
        if self.exact:
            return self
        return replace(self, num_probes=max(1, min(num_products, _parts(field)[2])))

    @property
    def is_exact(self) -> bool:
        """Whether `exact` is set, or the probes of this family fill the bottleneck of the field."""
        return self.exact or self._spread_factor == 0

    def standard_error(self, estimates: Tensor) -> Tensor:
        return super().standard_error(estimates) * (0 if self.exact else self._spread_factor)

    @property
    def family(self) -> ProbeFamily:
        """The probe family, as an object."""
        return by_name(ProbeFamily, self.probes)

    @property
    def _spread_factor(self) -> float:
        return self.family.spread_factor(self.num_probes, self._parts[2])

    @property
    def _parts(self) -> tuple[VectorField, VectorField, int]:
        return _parts(self.field)


def _parts(field: BoundField) -> tuple[VectorField, VectorField, int]:
    """encode, decode and H of the field."""
    if field.encode is None or field.decode is None or field.bottleneck_width is None:
        raise InvalidTypeError(
            "Bottleneck() needs a field with encode(t, x), decode(t, h) and bottleneck_width, such as "
            f"flows.fields.MLP, and got {field.name}; choose Hutchinson(num_probes=...) or Exact(), which take any"
        )
    return field.encode, field.decode, field.bottleneck_width
