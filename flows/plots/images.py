"""Flows of images: samples, paths, nearest neighbours, classes, interpolations."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from flows.arguments import checked
from flows.checks import whole_number
from flows.datasets import Dataset
from flows.errors import InvalidValueError
from flows.models.cnf import CNF
from flows.models.interpolation import interpolate
from flows.plots.paths import draw_paths
from flows.plots.style import check_classes, points_to_plot, quantiles
from flows.solvers import ODESolver
from flows.writing import write_result

ANY_IMAGE = (None, None, None)
NUM_SAMPLES, NUM_UNSEEN = 64, 1000  # samples drawn; validation images to compare with
NUM_SHOWN = 36  # samples shown: more would be too small in TensorBoard, where a picture is 300 pixels wide
NUM_REAL = 3  # images of a class beside its samples
EVALUATIONS = (1, 2, 4, 8, 16)  # of the field, for samples by Euler's method
GAP, WIDTH, DPI = 0.94, 0.62, 120  # shade of the gaps; inches an image; dots per inch


def is_image(event_shape: Sequence[int]) -> bool:
    """Return whether points of this shape are images: (1, H, W) or (3, H, W)."""
    return len(event_shape) == 3 and event_shape[0] in (1, 3)


def _image_shape(flow: CNF) -> tuple[int, ...]:
    if not is_image(flow.event_shape):
        raise InvalidValueError(f"this plot is for images, (1, H, W) or (3, H, W), got a flow of {flow.event_shape}")
    return flow.event_shape


def shades(data: Tensor) -> tuple[float, float]:
    """Return the values to show as black and white: the quantiles 0.001 and 0.999 of `data`."""
    low, high = quantiles(data.flatten(), (0.001, 0.999)).tolist()
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def tiled(
    images: Tensor,  # (rows, columns, C, H, W), data space
    black: float,
    white: float,
) -> np.ndarray:  # (rows (H + 1) + 1, columns (W + 1) + 1, 3), in [0, 1]
    """Tile images in rows and columns, one pixel apart; NaN marks a missing image."""
    rows, columns, _, height, width = images.shape
    shown = ((images.cpu().double() - black) / (white - black)).clamp(0, 1).nan_to_num(nan=GAP)
    canvas = torch.full((rows, height + 1, columns, width + 1, 3), GAP, dtype=torch.float64)
    canvas[:, 1:, :, 1:] = shown.permute(0, 3, 1, 4, 2).expand(-1, -1, -1, -1, 3)
    canvas = canvas.reshape(rows * (height + 1), columns * (width + 1), 3)
    return torch.nn.functional.pad(canvas, (0, 0, 0, 1, 0, 1), value=GAP).numpy()


def grid(
    images: Tensor,  # (n, C, H, W)
    columns: int | None = None,  # None: about as many as rows
) -> Tensor:  # (rows, columns, C, H, W), the last row filled with NaN
    """Arrange images in reading order."""
    columns = math.ceil(math.sqrt(len(images))) if columns is None else columns
    missing = -len(images) % columns
    filler = images.new_full((missing, *images.shape[1:]), torch.nan)
    return torch.cat([images, filler]).unflatten(0, (-1, columns))


def image_figures(flow: CNF, dataset: Dataset, generator: torch.Generator | None = None) -> dict[str, Figure]:
    """Plot everything for a flow of images; a seed fixes the noise."""
    reference = dataset.reference()
    context = dataset.contexts(NUM_SAMPLES)
    context = None if context is None else context.to(flow.device, flow.dtype)
    with torch.no_grad():
        z = flow.base.sample((NUM_SAMPLES,), generator)
        y = flow.transport(z, (0.0, 1.0), context, log_density=False).x
        drawn = flow.to_data_space(y, context).cpu()
    unseen = next(iter(dataset.validation_batches(NUM_UNSEEN))).x
    pictures = {
        "samples": image_samples(drawn, reference),
        "trajectories": image_trajectories(flow, reference, context, generator=generator),
        "neighbours": neighbours(drawn, reference, unseen),
    }
    if dataset.num_validation > 1:
        pictures["interpolations"] = interpolations(flow, dataset, generator=generator)
    if dataset.num_classes is not None:
        pictures["classes"] = image_classes(flow, dataset, generator=generator)
    pictures["evaluations"] = image_evaluations(flow, reference, context, generator=generator)
    return pictures


@checked
def image_samples(drawn: Tensor, data: Tensor | None, num_images: int = NUM_SHOWN) -> Figure:
    """Plot images of the data, if any, beside samples, in the shades of the data.

    Example:
        ```python
        import torch

        import flows

        flows.plots.image_samples(torch.randint(17, (64, 1, 8, 8)).float(), flows.datasets.Digits().reference())
        ```
    """
    whole_number("num_images", num_images)
    drawn = points_to_plot("drawn", drawn, *ANY_IMAGE)
    data = None if data is None else points_to_plot("data", data, *drawn.shape[1:])
    black, white = shades(drawn if data is None else data)
    panels = {} if data is None else {"data": grid(data[:num_images])}
    panels["flow samples"] = grid(drawn[:num_images])
    columns = sum(images.shape[1] for images in panels.values()) + 1
    rows = max(len(images) for images in panels.values())
    figure = Figure(figsize=(columns * WIDTH, rows * WIDTH + 0.4), dpi=DPI, layout="compressed")
    for axes, (title, images) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        _show(axes, images, black, white)
        axes.set_title(title, fontsize=_text_size(figure))
    return figure


def save_grid(path: str | os.PathLike[str], drawn: Tensor, data: Tensor, most: int = 400) -> None:
    """Write samples as exact pixels, enlarged to about 56 dots a side."""
    pixels = (255 * tiled(grid(drawn[:most]), *shades(data))).round().astype(np.uint8)
    zoom = max(1, 56 // max(drawn.shape[2:]))
    image = Image.fromarray(pixels.repeat(zoom, 0).repeat(zoom, 1))
    write_result(path, lambda file: image.save(file, format="png"))


@checked
def image_trajectories(
    flow: CNF,
    data: Tensor,
    context: Tensor | None = None,  # (num_paths or more, *context)
    num_paths: int = 8,
    times: Sequence[float] = (0.0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0),
    generator: torch.Generator | None = None,
) -> Figure:
    """Plot paths from noise to images: one row a path, one column a time."""
    data = points_to_plot("data", data, *_image_shape(flow))
    whole_number("num_paths", num_paths)
    context = None if context is None else context[:num_paths]
    paths = draw_paths(flow, num_paths, torch.tensor(times), generator, context)  # (T, n, C, H, W)
    return _strips(paths.transpose(0, 1), data, columns=[f"t = {t:g}" for t in times])


@checked
def neighbours(
    drawn: Tensor,  # (n, C, H, W)
    data: Tensor,  # (m, C, H, W), training images
    unseen: Tensor,  # (k, C, H, W), images that were not trained on
    num_rows: int = 8,
    num_neighbours: int = 6,
) -> Figure:
    """Plot samples beside their nearest training images.

    Distances are Euclidean, in data space. Samples of a flow that has memorised its training images are much closer to
    them than unseen images are. The title shows both medians.
    """
    drawn = points_to_plot("drawn", drawn, *ANY_IMAGE)
    data, unseen = (points_to_plot(n, p, *drawn.shape[1:]) for n, p in (("data", data), ("unseen", unseen)))
    whole_number("num_rows", num_rows)
    whole_number("num_neighbours", num_neighbours)
    distances, nearest = _nearest(drawn, data, num_neighbours)
    typical, _ = _nearest(unseen, data, 1)
    rows = torch.cat([drawn[:num_rows].unsqueeze(1).to(data), data[nearest[:num_rows]]], 1)
    ranks = [f"{rank}." for rank in range(2, nearest.shape[1] + 1)]
    names = [f"{distance:.3g}" for distance in distances[:num_rows, 0].tolist()]
    figure = _strips(rows, data, columns=["sample", "nearest", *ranks], rows=names)
    ours, theirs = (float(found[:, 0].median()) for found in (distances, typical))
    title = f"distance to the nearest (also on the left): median\nof samples {ours:.3g}, of unseen images {theirs:.3g}"
    figure.suptitle(title, fontsize=9)
    return figure


@checked
def image_classes(
    flow: CNF, dataset: Dataset, num_each: int = 7, most: int = 10, generator: torch.Generator | None = None
) -> Figure:
    """Plot validation images of each class beside samples, one row a class, all from the same noise."""
    _image_shape(flow)
    check_classes(dataset, "image_classes")
    assert dataset.num_classes is not None  # as checked
    whole_number("num_each", num_each)
    whole_number("most", most)
    classes = min(dataset.num_classes, most)
    context = torch.eye(dataset.num_classes)[:classes].to(flow.device, flow.dtype)
    with torch.no_grad():
        z = flow.base.sample((num_each,), generator).repeat(classes, 1, 1, 1)
        each = context.repeat_interleave(num_each, 0)
        y = flow.transport(z, (0.0, 1.0), each, log_density=False).x
        drawn = flow.to_data_space(y, each).unflatten(0, (-1, num_each)).cpu()
    batch = next(iter(dataset.validation_batches(NUM_UNSEEN)))
    real = drawn.new_full((classes, NUM_REAL + 1, *drawn.shape[2:]), torch.nan)  # the last column parts both
    for label in range(classes):
        found = batch.x[batch.context[:, label] == 1][:NUM_REAL] if batch.context is not None else batch.x[:0]
        real[label, : len(found)] = found.to(real)
    names = [str(name) for name in dataset.class_names or range(classes)][:classes]
    columns = ["", "data", *[""] * (NUM_REAL - 1 + num_each // 2), "samples"]
    return _strips(torch.cat([real, drawn], 1), dataset.reference(), columns=columns, rows=names)


@checked
def image_evaluations(
    flow: CNF,
    data: Tensor,
    context: Tensor | None = None,  # (num_columns or more, *context)
    num_columns: int = 8,
    evaluations: Sequence[int] = EVALUATIONS,
    generator: torch.Generator | None = None,
) -> Figure:
    """Plot samples from the same noise by few evaluations of the field, one row a number of them.

    Rows are Euler's method with that many steps; the last one is the flow's own solver, with its evaluations. Above
    them stand images of the data.
    """
    data = points_to_plot("data", data, *_image_shape(flow))
    num_columns = whole_number("num_columns", num_columns)
    counts = [whole_number("each of evaluations", count) for count in evaluations]
    context = None if context is None else context[:num_columns]
    own = flow.solver
    rows, names = [data[torch.arange(num_columns) % len(data)]], ["data"]
    with torch.no_grad():
        z = flow.base.sample((num_columns,), generator)
        try:
            for solver in [*(ODESolver("euler", step_size=1 / count) for count in counts), own]:
                flow.solver = solver
                end = flow.transport(z, (0.0, 1.0), context, log_density=False)
                rows.append(flow.to_data_space(end.x, context).cpu().to(data))
                names.append(f"{end.statistics.nfe_forward}")
        finally:
            flow.solver = own
    figure = _strips(torch.stack(rows), data, rows=names)
    figure.axes[0].set_ylabel("evaluations of the field", fontsize=_text_size(figure))
    return figure


@checked
def interpolations(
    flow: CNF,
    dataset: Dataset,
    num_rows: int = 6,
    num_columns: int = 9,
    generator: torch.Generator | None = None,  # for dequantisation noise
) -> Figure:
    """Interpolate between validation images along a great circle of their latents.

    Both ends of a row are images of the data. With classes, both have the same class.
    """
    _image_shape(flow)
    whole_number("num_rows", num_rows)
    whole_number("num_columns", num_columns, 2)
    start, end, context = _pairs_of_images(dataset, num_rows)
    start, end = start.to(flow.device, flow.dtype), end.to(flow.device, flow.dtype)
    context = None if context is None else context.to(flow.device, flow.dtype)
    images = interpolate(flow, start, end, num_columns, context, generator).transpose(0, 1)
    return _strips(images, dataset.reference(), columns=["image", *[""] * (num_columns - 2), "image"])


def _pairs_of_images(dataset: Dataset, num_pairs: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return first and last images (n, C, H, W), and the context of both."""
    batch = next(iter(dataset.validation_batches(NUM_UNSEEN)))
    pairs = torch.arange(len(batch.x) // 2 * 2).unflatten(0, (-1, 2))
    if dataset.num_classes is not None and batch.context is not None:
        found = [(batch.context[:, label] == 1).nonzero().flatten()[:2] for label in range(dataset.num_classes)]
        pairs = torch.stack([indices for indices in found if len(indices) == 2] or [*pairs])
    first, second = pairs[:num_pairs].unbind(1)
    return batch.x[first], batch.x[second], None if batch.context is None else batch.context[first]


def _nearest(images: Tensor, data: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return distances (n, count) and indices of the nearest data, nearest first."""
    distances = torch.cdist(images.to(data).flatten(1), data.flatten(1))
    return distances.topk(min(count, len(data)), dim=1, largest=False)


def _strips(
    images: Tensor,  # (rows, columns, C, H, W)
    data: Tensor,
    columns: Sequence[str] = (),
    rows: Sequence[str] = (),
) -> Figure:
    """Plot rows of images in the shades of `data`, with names of columns above and rows on the left."""
    size = (images.shape[1] * WIDTH + 0.5 * bool(rows), images.shape[0] * WIDTH + 0.4)
    figure = Figure(figsize=size, dpi=DPI, layout="compressed")
    axes = figure.subplots()
    _show(axes, images, *shades(data))
    height, width = images.shape[3] + 1, images.shape[4] + 1
    axes.set_xticks([(i + 0.5) * width for i in range(len(columns))], columns)
    axes.set_yticks([(i + 0.5) * height for i in range(len(rows))], rows)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.tick_params(axis="x", labelsize=8 if sum(map(bool, columns)) > 2 else _text_size(figure))
    axes.tick_params(axis="y", labelsize=_text_size(figure))
    return figure


def _text_size(figure: Figure) -> float:
    """Return a size of letters that can be read when the figure is 300 pixels wide."""
    return max(9.0, 1.8 * figure.get_figwidth())


def _show(axes: Axes, images: Tensor, black: float, white: float) -> None:
    axes.imshow(tiled(images, black, white), interpolation="nearest", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
