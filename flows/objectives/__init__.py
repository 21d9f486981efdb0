"""Objectives: what training minimises."""

from flows.objectives import couplings, paths
from flows.objectives.base import LossOutput, Objective
from flows.objectives.couplings import Coupling
from flows.objectives.flow_matching import FlowMatching
from flows.objectives.maximum_likelihood import MaximumLikelihood
from flows.objectives.paths import ProbabilityPath
from flows.objectives.reverse_kl import ReverseKL

__all__ = [
    "Coupling",
    "FlowMatching",
    "LossOutput",
    "MaximumLikelihood",
    "Objective",
    "ProbabilityPath",
    "ReverseKL",
    "couplings",
    "paths",
]
