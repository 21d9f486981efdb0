"""Curves of a run, and pictures of several runs on one sheet."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.image import imread

from flows.arguments import checked
from flows.checks import existing_path
from flows.errors import FileError, InvalidValueError
from flows.plots.style import DATA, FLOW, MUTED, tidy

Curves = Mapping[str, Sequence[tuple[int, float]]]  # (step, value) pairs of each metric
SHEET_COLUMNS, SHEET_WIDTH = 2, 6.0  # pictures in a row; inches of a picture


@checked
def curves(metrics: Curves, entropy: float | None = None, stages: Sequence[int] = ()) -> Figure:
    """Plot losses, NLL and field evaluations over the steps of a run.

    The losses of flow matching and of the likelihood have panels of their own. Any other loss is shown if both are
    missing. The band around the validation NLL is its standard error. Unresolved validations are left out; the title
    counts them.

    Args:
        metrics: of the whole run.
        entropy: of the data in nats, drawn beside the NLL. Default: none.
        stages: number of steps of each stage; dotted lines separate the stages.

    Example:
        ```python
        import flows

        flows.plots.curves({"train/loss": [(0, 2.0), (10, 1.0)]})
        ```
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
    drawn = {name for name, curve in metrics.items() if any(value for _, value in curve)}
    present = {title: [line for line in lines if line[0] in drawn] for title, lines in panels.items()}
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
            errors = dict(metrics.get("validation/nll_se", ())) if name == "validation/nll" else {}
            if errors.keys() == set(steps):
                around = [(value - errors[step], value + errors[step]) for step, value in metrics[name]]
                axes.fill_between(steps, *zip(*around, strict=True), color=colour, alpha=0.2, linewidth=0)
        for number, end in enumerate(list(itertools.accumulate(stages))[:-1]):
            label = "next stage" if number == 0 else None
            axes.axvline(end, color=MUTED, linestyle=":", linewidth=1, label=label)
        if title.startswith("NLL") and entropy is not None:
            axes.axhline(entropy, color=MUTED, linestyle="--", linewidth=1, label="entropy of the data")
        if title.startswith("NLL") and (unresolved := len(metrics.get("validation/nll_unresolved", ()))):
            title = f"{title}\n({unresolved} validation{'s' if unresolved > 1 else ''} unresolved)"
        axes.set(xlabel="step", title=title)
        axes.legend(frameon=False, fontsize=8)
        axes.grid(alpha=0.25)
        tidy(axes)
    return figure


def _read(path: str | os.PathLike[str]) -> np.ndarray:
    found = existing_path("pictures", path, "picture")
    try:
        return imread(found)
    except (OSError, SyntaxError, ValueError) as error:  # a damaged PNG raises any of these
        raise FileError(f"{found} cannot be read as a picture ({error}); make it again, or leave it out") from error


@checked
def contact_sheet(pictures: Mapping[str, str | os.PathLike[str]]) -> Figure:
    """Show image files with their titles, two in a row.

    Example:
        ```python
        import flows

        flow = flows.CNF(flows.fields.MLP((2,), hidden=(8,)))
        flows.plots.scatter(flow.sample((100,)), None).savefig("samples.png")
        sheet = flows.plots.contact_sheet({"first": "samples.png", "second": "samples.png"})
        ```
    """
    if not pictures:
        raise InvalidValueError("pictures must name at least one image file, got none")
    images = {title: _read(path) for title, path in pictures.items()}
    rows = -(-len(images) // SHEET_COLUMNS)
    tallest = max(image.shape[0] / image.shape[1] for image in images.values())
    size = (SHEET_COLUMNS * SHEET_WIDTH, rows * (SHEET_WIDTH * tallest + 0.35))
    figure = Figure(figsize=size, dpi=100, layout="compressed")
    panels = list(figure.subplots(rows, SHEET_COLUMNS, squeeze=False).flat)
    for axes in panels:
        axes.set_axis_off()
    for axes, (title, image) in zip(panels, images.items(), strict=False):
        axes.imshow(image, interpolation="antialiased")
        axes.set_title(title, fontsize=11)
    return figure
