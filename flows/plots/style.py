"""What all pictures share: colours, and axes without clutter."""

from __future__ import annotations

from matplotlib.axes import Axes

DATA, FLOW, MUTED = "#3b5b92", "#e8684a", "#9aa3b2"  # colours of the data, the flow, and the rest
DENSITY, TIME = "magma", "plasma"  # colour maps


def tidy(axes: Axes) -> None:
    """Muted ticks and frame."""
    axes.tick_params(labelsize=8, color=MUTED)
    for spine in axes.spines.values():
        spine.set_color(MUTED)
