"""Measurements of this package, also beside others: `python -m benchmarks --help`.

Times are medians of runs that alternate in one process, and are stated as ratios.
"""
