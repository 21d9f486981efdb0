"""Where a flow starts: the distribution at t = 0."""

from flows.bases.normal import StandardNormal

__all__ = ["StandardNormal"]
