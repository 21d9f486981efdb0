"""Divergence estimators compared on one flow, along its own trajectories: what each is worth, and what it costs."""

from flows.benchmarks.comparison.advice import Advice, advise
from flows.benchmarks.comparison.figure import error_against_cost
from flows.benchmarks.comparison.measure import Comparison, Row, compare
from flows.benchmarks.comparison.report import as_dict, as_text

__all__ = ["Advice", "Comparison", "Row", "advise", "as_dict", "as_text", "compare", "error_against_cost"]
