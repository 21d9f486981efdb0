"""The steps of an ODE solve over time."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from flows.arguments import checked
from flows.plots.style import DATA, FLOW, MUTED, tidy
from flows.solvers import SolverStatistics

COLOURS = (DATA, FLOW, "#4c9f70", "#c9a227")


@checked
def steps(statistics: SolverStatistics, purpose: str | None = None) -> Figure:
    """Plot the size of every step over t.

    Colours show the component that limited a step; crosses are rejected steps. For a stochastic estimator, a second
    panel shows the standard error of the divergence.

    Args:
        purpose: of the solve, for the title. Default: not shown.

    Example:
        ```python
        import torch

        import flows

        flow = flows.CNF(flows.fields.MLP((2,)))
        with torch.no_grad():
            flows.plots.steps(flow.estimate_log_prob(torch.randn(10, 2)).statistics)
        ```
    """
    times, errors = statistics.curve("divergence_standard_error")
    rows = 2 if times else 1
    figure = Figure(figsize=(5.6, 2.6 * rows + 0.4), dpi=120, layout="constrained")
    axes, *more = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    components = sorted({attempt.component for attempt in statistics.attempts if attempt.component is not None})
    for component in components or [None]:
        colour = DATA if component is None else COLOURS[components.index(component) % len(COLOURS)]
        for accepted, marker in ((True, "o"), (False, "x")):
            found = [a for a in statistics.attempts if a.component == component and a.accepted == accepted]
            if found:
                name = "step" if component is None else f"limited by the {component.replace('_', '-')}"
                label = name if accepted else f"rejected, {name}"
                axes.plot([a.t for a in found], [abs(a.dt) for a in found], marker, color=colour, ms=4, label=label)
    axes.set(yscale="log", ylabel="step size")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend(frameon=False, fontsize=7)
    shortest = statistics.shortest
    counts = f"{statistics.accepted} steps accepted, {statistics.rejected} rejected"
    title = f"{'' if purpose is None else f'{purpose}: '}{counts}, {statistics.nfe_forward} evaluations"
    if shortest is not None and shortest.sample is not None:
        title += f"\nshortest: {abs(shortest.dt):.1e} at t = {shortest.t:.3f}, sample {shortest.sample}"
    axes.set_title(title, fontsize=9)
    for lower in more:
        lower.plot(times, errors, "-o", color=MUTED, ms=3, linewidth=1)
        lower.set(ylabel="standard error of div v")
        lower.yaxis.set_major_locator(MaxNLocator(5))
    (more or [axes])[-1].set_xlabel("t")
    for each in (axes, *more):
        each.grid(alpha=0.25)
        tidy(each)
    return figure
