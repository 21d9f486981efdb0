"""Training objectives."""

from flows.objectives.base import LossOutput, Objective
from flows.objectives.flow_matching import FlowMatching
from flows.objectives.maximum_likelihood import MaximumLikelihood

__all__ = ["FlowMatching", "LossOutput", "MaximumLikelihood", "Objective"]
