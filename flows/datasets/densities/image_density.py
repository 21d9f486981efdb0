"""A density in the plane from the pixels of a picture."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flows.arguments import checked
from flows.checks import check_number, existing_path, whole_number
from flows.datasets.densities.density import Density, check_points
from flows.errors import FileError, InvalidValueError


@checked
class ImageDensity(Density):
    """A density that is constant on each pixel of a picture.

    The longer side of the picture spans [−2, 2]. In pixel i, p(x) = p_i/area with p_i = w_i/Σ_j w_j and
    w = darkness^contrast, or brightness^contrast, both from 0 to 1. Entropy −Σ_i p_i log(p_i/area) nats.

    Args:
        path: any picture that Pillow reads; transparent pixels count as empty. Default: a photograph from scikit-learn,
            `load_sample_image("china.jpg")`.
        dense: "dark" or "bright", where the density is high.
        contrast: exponent of the weights. Above 1, the middle tones become empty.
        resolution: larger pictures are reduced to this number of pixels along the longer side.
        num_validation, num_test, num_reference: see `Density`.

    Raises:
        FileError: there is no such file, or it is no picture.
        InvalidTypeError: a setting has the wrong type.
        InvalidValueError: a setting is out of range, or the picture has a single shade.

    Example:
        ```python
        import flows

        data = flows.datasets.ImageDensity(resolution=32)
        data.sample(100)  # (100, 2)
        ```
    """

    name = "image_density"

    def __init__(
        self,
        path: str | Path | None = None,
        dense: str = "dark",
        contrast: float = 2.0,
        resolution: int = 128,
        num_validation: int = 10_000,
        num_test: int = 100_000,
        num_reference: int = 10_000,
    ):
        super().__init__(num_validation, num_test, num_reference)
        if dense not in ("dark", "bright"):
            raise InvalidValueError(f"dense must be 'dark' or 'bright', got {dense!r}")
        check_number("contrast", contrast, above=0, otherwise="1 takes the shades as they are")
        resolution = whole_number("resolution", resolution, otherwise="it counts pixels")
        shades = _shades(path, resolution, empty=255 if dense == "dark" else 0)
        weight = shades.max() - shades if dense == "dark" else shades - shades.min()
        if weight.max() == 0:
            raise InvalidValueError(
                f"{path or 'the picture'} has a single shade at {shades.shape[1]} x {shades.shape[0]} pixels, so no "
                "pixel is denser than another; choose a picture with dark and bright parts, or a higher resolution"
            )
        weight = (weight / weight.max()) ** contrast
        self.probability = torch.from_numpy(weight / weight.sum())  # (rows, columns), row 0 at the top
        self.pixel = 4 / max(weight.shape)
        log_density = self.probability.log() - 2 * math.log(self.pixel)
        self.entropy = -torch.where(self.probability > 0, self.probability * log_density, 0).sum().item()
        self._log_density = log_density.flatten()
        self._cumulative = self.probability.flatten().cumsum(0)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        level = self._cumulative[-1] * torch.rand(n, generator=generator, dtype=torch.float64)
        # numpy searches in one thread. torch starts all threads, which takes 20 times longer on a busy machine.
        index = torch.from_numpy(np.searchsorted(self._cumulative.numpy(), level.numpy(), side="right"))
        offset = torch.rand(n, 2, generator=generator, dtype=torch.float64)
        x = self._position(index, offset).to(torch.get_default_dtype())
        # Rounding can move a point over an edge into a pixel of density zero. Such a point goes to its pixel's centre.
        moved = (self._index(x)[0] != index).unsqueeze(-1)
        return torch.where(moved, self._position(index, torch.full_like(offset, 0.5)).to(x), x)

    def log_prob(self, x: Tensor) -> Tensor:
        index, inside = self._index(check_points(x))
        log_density = self._log_density.to(x)[index]
        # The zero gives the result a zero gradient, so that callers can differentiate it.
        return torch.where(inside, 0 * x.sum(-1) + log_density, -math.inf)

    def _position(self, index: Tensor, offset: Tensor) -> Tensor:
        """Return points inside pixels: `offset` in [0, 1]² counts from a pixel's lower left corner."""
        rows, columns = self.probability.shape
        across = index % columns + offset[:, 0] - columns / 2
        up = rows / 2 - 1 - index // columns + offset[:, 1]
        return self.pixel * torch.stack([across, up], -1)

    def _index(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the flat index of the pixel around each point, and whether there is one."""
        rows, columns = self.probability.shape
        scaled = x.detach().double() / self.pixel
        column = torch.floor(scaled[..., 0] + columns / 2)
        row = rows - 1 - torch.floor(scaled[..., 1] + rows / 2)
        inside = (column >= 0) & (column < columns) & (row >= 0) & (row < rows)
        return torch.where(inside, row * columns + column, 0).long(), inside


def _shades(path: str | Path | None, resolution: int, empty: int) -> np.ndarray:
    """Read a picture as grey levels 0 to 255, (rows, columns), with at most `resolution` pixels a side."""
    from PIL import Image, ImageOps

    if path is None:
        from sklearn.datasets import load_sample_image

        picture = Image.fromarray(load_sample_image("china.jpg"))
    else:
        path = existing_path("path", path, "picture")
        try:
            with Image.open(path) as file:
                picture = ImageOps.exif_transpose(file.convert("RGBA"))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise FileError(f"{path} is not a picture that Pillow can read ({error}); use a .png or .jpg") from error
        background = Image.new("RGBA", picture.size, (empty, empty, empty, 255))
        picture = Image.alpha_composite(background, picture)
    picture = picture.convert("L")
    # `thumbnail` never enlarges, as more pixels of the same shades would be the same density.
    picture.thumbnail((resolution, resolution), Image.Resampling.BOX)
    return np.asarray(picture, dtype=np.float64)
