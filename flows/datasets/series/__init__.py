"""Time series: one's own, and those of dynamical systems."""
