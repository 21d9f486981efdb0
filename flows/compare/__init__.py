"""Compare divergence estimators on a flow: accuracy and cost along its trajectories."""

from flows.compare.advice import Advice, advise
from flows.compare.figure import error_against_cost
from flows.compare.measure import Comparison, Row, compare
from flows.compare.report import as_dict, as_text

__all__ = ["Advice", "Comparison", "Row", "advise", "as_dict", "as_text", "compare", "error_against_cost"]
