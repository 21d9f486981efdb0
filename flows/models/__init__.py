"""Models that solve an ODE of a field, and their results."""

from flows.models.cnf import CNF
from flows.models.distribution import FlowDistribution
from flows.models.neural_ode import NeuralODE
from flows.models.results import LogProbEstimate, Sample, Trajectory, Transport

__all__ = ["CNF", "FlowDistribution", "LogProbEstimate", "NeuralODE", "Sample", "Trajectory", "Transport"]
