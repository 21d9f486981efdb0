"""Divergence estimators: one contract, from exact traces to stochastic ones."""

from flows.divergence.analytic import Analytic
from flows.divergence.auto import Auto
from flows.divergence.autodiff import linearise
from flows.divergence.base import DivergenceEstimator, FieldSample
from flows.divergence.bottleneck import Bottleneck
from flows.divergence.check import EstimatorCheck, EstimatorCheckError, check_estimator
from flows.divergence.exact import Exact
from flows.divergence.function import divergence
from flows.divergence.hutchinson import Hutchinson
from flows.divergence.low_rank import HutchPlusPlus, XTrace
from flows.divergence.probes import Coordinates, Gaussian, Orthonormal, ProbeFamily, Rademacher, Sphere
from flows.divergence.probing import Probing
from flows.vector_field import BoundField, VectorField, bind

__all__ = [
    "Analytic",
    "Auto",
    "Bottleneck",
    "BoundField",
    "Coordinates",
    "DivergenceEstimator",
    "EstimatorCheck",
    "EstimatorCheckError",
    "Exact",
    "FieldSample",
    "Gaussian",
    "HutchPlusPlus",
    "Hutchinson",
    "Orthonormal",
    "ProbeFamily",
    "Probing",
    "Rademacher",
    "Sphere",
    "VectorField",
    "XTrace",
    "bind",
    "check_estimator",
    "divergence",
    "linearise",
]
