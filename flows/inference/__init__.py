"""Simulation-based inference: posteriors from simulations, as distributions of torch."""

from flows.inference.inference import Inference, infer, posterior_flow
from flows.inference.posterior import Posterior

__all__ = ["Inference", "Posterior", "infer", "posterior_flow"]
