"""What a trained flow is worth: likelihoods with error bars, bits per dimension, outliers told from data."""

from flows.evaluation.bits_per_dim import BitsPerDim
from flows.evaluation.importance import ImportanceWeights, importance_weights
from flows.evaluation.likelihood import Likelihood, likelihood, part_batches
from flows.evaluation.outliers import AUROC, OutlierScores, outlier_scores, shuffled

__all__ = [
    "AUROC",
    "BitsPerDim",
    "ImportanceWeights",
    "Likelihood",
    "OutlierScores",
    "importance_weights",
    "likelihood",
    "outlier_scores",
    "part_batches",
    "shuffled",
]
