"""How good is a trained model? Evaluators, and the likelihoods, weights and scores that they report."""

from flows.evaluation.calibration import Calibration
from flows.evaluation.density import DensityEvaluator, FlowEvaluator
from flows.evaluation.distance import DistanceEvaluator, PathEnergy
from flows.evaluation.energy import EnergyEvaluator, ImportanceWeights, importance_weights
from flows.evaluation.evaluator import Evaluation, Evaluator, Report, aligned, default_evaluator, seeded
from flows.evaluation.likelihood import Likelihood, likelihood, part_batches
from flows.evaluation.metrics import (
    AUROC,
    C2ST,
    CRPS,
    MMD,
    BitsPerDim,
    Coverage,
    EnergyScore,
    Measurement,
    PredictiveMetric,
    SampleMetric,
    SlicedWasserstein2,
    TwoSampleMetric,
    Wasserstein1,
    Wasserstein2,
)
from flows.evaluation.outliers import OutlierScores, compressed_length, outlier_scores, plain, shuffled
from flows.evaluation.parameters import ParameterEstimate, fitted_parameters, parameter_estimates
from flows.evaluation.posterior import PosteriorEvaluator
from flows.evaluation.rows import RowScores
from flows.evaluation.trajectory import TrajectoryEvaluator

__all__ = [
    "AUROC",
    "C2ST",
    "CRPS",
    "MMD",
    "BitsPerDim",
    "Calibration",
    "Coverage",
    "DensityEvaluator",
    "DistanceEvaluator",
    "EnergyEvaluator",
    "EnergyScore",
    "Evaluation",
    "Evaluator",
    "FlowEvaluator",
    "ImportanceWeights",
    "Likelihood",
    "Measurement",
    "OutlierScores",
    "ParameterEstimate",
    "PathEnergy",
    "PosteriorEvaluator",
    "PredictiveMetric",
    "Report",
    "RowScores",
    "SampleMetric",
    "SlicedWasserstein2",
    "TrajectoryEvaluator",
    "TwoSampleMetric",
    "Wasserstein1",
    "Wasserstein2",
    "aligned",
    "compressed_length",
    "default_evaluator",
    "fitted_parameters",
    "importance_weights",
    "likelihood",
    "outlier_scores",
    "parameter_estimates",
    "part_batches",
    "plain",
    "seeded",
    "shuffled",
]
