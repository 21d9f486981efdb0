"""Divergence estimators: one contract, from exact traces to stochastic ones."""

from flows.divergence.analytic import Analytic
from flows.divergence.base import DivergenceEstimator, FieldSample, VectorField
from flows.divergence.exact import Exact
from flows.divergence.function import divergence
from flows.divergence.hutchinson import Hutchinson
from flows.divergence.probes import Gaussian, ProbeFamily, Rademacher
from flows.divergence.products import linearise

__all__ = [
    "Analytic",
    "DivergenceEstimator",
    "Exact",
    "FieldSample",
    "Gaussian",
    "Hutchinson",
    "ProbeFamily",
    "Rademacher",
    "VectorField",
    "divergence",
    "linearise",
]
