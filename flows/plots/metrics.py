"""The curves of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from flows.plots.style import DATA, FLOW, MUTED, tidy

Curves = Mapping[str, Sequence[tuple[int, float]]]  # for each metric its (step, value) pairs


def curves(metrics: Curves, entropy: float | None = None) -> Figure:
    """Loss, negative log-likelihood and evaluations of the field over the steps of a run.

    Of the losses, those of flow matching and the likelihood have panels; any other is shown where both are missing.
    """
    panels = {
        "square errors of flow matching": [
            ("train/velocity_error", DATA, "velocity"),
            ("train/divergence_error", FLOW, "divergence"),
        ],
        "NLL in nats": [("train/nll", DATA, "training"), ("validation/nll", FLOW, "validation")],
        "evaluations of the field": [
            ("train/nfe_forward", DATA, "training, forward"),
            ("train/nfe_backward", MUTED, "training, backward"),
            ("validation/nfe", FLOW, "validation"),
        ],
    }
    present = {title: [line for line in lines if line[0] in metrics] for title, lines in panels.items()}
    present = {title: lines for title, lines in present.items() if lines}
    if "train/velocity_error" not in metrics and "train/nll" not in metrics and "train/loss" in metrics:
        present = {"loss": [("train/loss", DATA, "training")], **present}
    figure = Figure(figsize=(4.2 * max(1, len(present)), 3.4), dpi=120, layout="constrained")
    if not present:
        return figure
    for axes, (title, lines) in zip(figure.subplots(1, len(present), squeeze=False)[0], present.items(), strict=True):
        for name, colour, label in lines:
            steps, values = zip(*metrics[name], strict=True)
            marker = "o" if len(steps) < 30 else None
            axes.plot(steps, values, color=colour, label=label, linewidth=1.4, marker=marker, markersize=3)
        if title.startswith("NLL") and entropy is not None:
            axes.axhline(entropy, color=MUTED, linestyle="--", linewidth=1, label="entropy of the data")
        axes.set(xlabel="step", title=title)
        axes.legend(frameon=False, fontsize=8)
        axes.grid(alpha=0.25)
        tidy(axes)
    return figure
