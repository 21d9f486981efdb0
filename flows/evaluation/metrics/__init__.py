"""Figures that compare a model with data. Those of draws are found by name: `evaluation.metrics=[c2st]`."""

from flows.evaluation.metrics.base import Measurement, SampleMetric, chosen_metrics
from flows.evaluation.metrics.likelihoods import AUROC, BitsPerDim
from flows.evaluation.metrics.predictive import CRPS, Coverage, EnergyScore, PredictiveMetric
from flows.evaluation.metrics.two_sample import (
    C2ST,
    MMD,
    SlicedWasserstein2,
    TwoSampleMetric,
    Wasserstein1,
    Wasserstein2,
)

__all__ = [
    "AUROC",
    "C2ST",
    "CRPS",
    "MMD",
    "BitsPerDim",
    "Coverage",
    "EnergyScore",
    "Measurement",
    "PredictiveMetric",
    "SampleMetric",
    "SlicedWasserstein2",
    "TwoSampleMetric",
    "Wasserstein1",
    "Wasserstein2",
    "chosen_metrics",
]
