"""Transforms between data space and flow space, with log-determinants."""

from flows.transforms.base import Compose, Identity, Transform
from flows.transforms.bounded import Unbounded
from flows.transforms.copula import CopulaNoise
from flows.transforms.dequantise import DequantisationNoise, Dequantise, TruncatedNormalNoise, UniformNoise
from flows.transforms.logit import Logit
from flows.transforms.marginals import NormalMarginals
from flows.transforms.radial import NormalRadius
from flows.transforms.scaling import Standardise, UnitInterval
from flows.transforms.variational import VariationalNoise
from flows.transforms.whiten import Whiten

__all__ = [
    "Compose",
    "CopulaNoise",
    "DequantisationNoise",
    "Dequantise",
    "Identity",
    "Logit",
    "NormalMarginals",
    "NormalRadius",
    "Standardise",
    "Transform",
    "TruncatedNormalNoise",
    "Unbounded",
    "UniformNoise",
    "UnitInterval",
    "VariationalNoise",
    "Whiten",
]
