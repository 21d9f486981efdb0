"""What a trained flow is worth: likelihoods with error bars, bits per dimension, outliers told from data."""

from flows.evaluation.bits_per_dim import BitsPerDim
from flows.evaluation.likelihood import Likelihood, likelihood, part_batches

__all__ = ["BitsPerDim", "Likelihood", "likelihood", "part_batches"]
