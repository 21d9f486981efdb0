"""Simulators: priors, simulations, and the six of the benchmark."""
