"""Where a flow starts: the distribution at t = 0."""

from flows.bases.adapters import FlowBase, TorchDistribution, as_base
from flows.bases.base import Base, NoDensityError
from flows.bases.conditional import ConditionalNormal, Frame
from flows.bases.conditional_mixture import ConditionalMixture, MixtureFrame
from flows.bases.empirical import Empirical
from flows.bases.mixture import Mixture
from flows.bases.normal import Normal
from flows.bases.student_t import StudentT
from flows.bases.uniform import Uniform

__all__ = [
    "Base",
    "ConditionalMixture",
    "ConditionalNormal",
    "Empirical",
    "FlowBase",
    "Frame",
    "Mixture",
    "MixtureFrame",
    "NoDensityError",
    "Normal",
    "StudentT",
    "TorchDistribution",
    "Uniform",
    "as_base",
]
