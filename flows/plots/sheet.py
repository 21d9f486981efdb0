"""Pictures of several runs on one sheet."""

from __future__ import annotations

import os
from collections.abc import Mapping

from matplotlib.figure import Figure
from matplotlib.image import imread

WIDTH, COLUMNS = 6.0, 2  # inches a picture; pictures beside each other


def contact_sheet(pictures: Mapping[str, str | os.PathLike[str]]) -> Figure:
    """The image files, each under its title, two beside each other."""
    images = {title: imread(path) for title, path in pictures.items()}
    rows = -(-len(images) // COLUMNS)
    tallest = max(image.shape[0] / image.shape[1] for image in images.values())
    figure = Figure(figsize=(COLUMNS * WIDTH, rows * (WIDTH * tallest + 0.35)), dpi=100, layout="compressed")
    panels = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    for axes in panels:
        axes.set_axis_off()
    for axes, (title, image) in zip(panels, images.items(), strict=False):
        axes.imshow(image, interpolation="antialiased")
        axes.set_title(title, fontsize=11)
    return figure
