"""Objectives: what training minimises."""

from flows.objectives import couplings, paths
from flows.objectives.base import LossOutput, Objective
from flows.objectives.couplings import Coupling
from flows.objectives.derivative_matching import DerivativeMatching
from flows.objectives.few_steps import Distillation, Reflow
from flows.objectives.flow_matching import FlowMatching
from flows.objectives.maximum_likelihood import MaximumLikelihood
from flows.objectives.paths import ProbabilityPath
from flows.objectives.reverse_kl import ReverseKL
from flows.objectives.trajectory_matching import TrajectoryMatching

__all__ = [
    "Coupling",
    "DerivativeMatching",
    "Distillation",
    "FlowMatching",
    "LossOutput",
    "MaximumLikelihood",
    "Objective",
    "ProbabilityPath",
    "Reflow",
    "ReverseKL",
    "TrajectoryMatching",
    "couplings",
    "paths",
]
