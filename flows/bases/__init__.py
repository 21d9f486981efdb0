"""Where a flow starts: the distribution at t = 0."""

from flows.bases.base import Base
from flows.bases.normal import Normal, require_normal

__all__ = ["Base", "Normal", "require_normal"]
