"""A density in the plane from the pixels of a picture."""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flows.datasets.density import Density, check_points
from flows.errors import InvalidValueError


class ImageDensity(Density):
    """Piecewise constant density over the pixels of a picture, in about [-2, 2]^2.

    p(x) = w_i / (area of a pixel * sum_j w_j) in pixel i, with w = (how dark or bright, 0 to 1)^contrast.
    Entropy: -sum_i p_i log(p_i / area) nats, with p_i = w_i / sum_j w_j.

    Args:
        path: any picture that Pillow reads; transparent parts count as empty. None: a photograph that
            comes with scikit-learn (`load_sample_image("china.jpg")`).
        dense: "dark" or "bright", where the density is high.
        contrast: exponent of the weights; more than 1 empties the middle tones.
        resolution: the picture is reduced to this many pixels along its longer side, which spans [-2, 2].
        num_validation, num_test, num_reference: see `Density`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a picture, or one of a single shade, or a setting out of range.
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
        if not 0 < contrast < math.inf:
            raise InvalidValueError(f"contrast must be positive, got {contrast!r}; 1 takes the shades as they are")
        if isinstance(resolution, bool) or not isinstance(resolution, int) or resolution < 1:
            raise InvalidValueError(f"resolution must be a whole number of pixels >= 1, got {resolution!r}")
        shades = _shades(path, resolution, empty=255 if dense == "dark" else 0)
        weight = shades.max() - shades if dense == "dark" else shades - shades.min()
        if weight.max() == 0:
            raise InvalidValueError(
                f"{path} has a single shade at {shades.shape[1]} x {shades.shape[0]} pixels, so no pixel is "
                "denser than another; choose a picture with dark and bright parts, or a higher resolution"
            )
        weight = (weight / weight.max()) ** contrast
        self.probability = torch.from_numpy(weight / weight.sum())  # (rows, columns), row 0 at the top
        self.pixel = 4 / max(weight.shape)
        log_density = self.probability.log() - 2 * math.log(self.pixel)
        self.entropy = -torch.where(self.probability > 0, self.probability * log_density, 0).sum().item()
        self._log_density = log_density.flatten()
        self._cumulative = self.probability.flatten().cumsum(0)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        level = self._cumulative[-1] * torch.rand(n, generator=generator, dtype=torch.float64)
        # numpy's search runs in one thread; torch's starts all of them for a batch, at 20 times the cost when busy
        index = torch.from_numpy(np.searchsorted(self._cumulative.numpy(), level.numpy(), side="right"))
        offset = torch.rand(n, 2, generator=generator, dtype=torch.float64)
        x = self._position(index, offset).to(torch.get_default_dtype())
        # Rounding can move a point over the edge, into a pixel of density zero; its own centre is safe.
        moved = (self._index(x)[0] != index).unsqueeze(-1)
        return torch.where(moved, self._position(index, torch.full_like(offset, 0.5)).to(x), x)

    def log_prob(self, x: Tensor) -> Tensor:
        index, inside = self._index(check_points(x))
        log_density = self._log_density.to(x)[index]
        # The zero keeps the result in the graph (with a zero gradient), as callers who differentiate expect.
        return torch.where(inside, 0 * x.sum(-1) + log_density, -math.inf)

    def _position(self, index: Tensor, offset: Tensor) -> Tensor:
        """Points at `offset`, in [0, 1]^2 from the lower left, within the pixels of a flat `index`."""
        rows, columns = self.probability.shape
        across = index % columns + offset[:, 0] - columns / 2
        up = rows / 2 - 1 - index // columns + offset[:, 1]
        return self.pixel * torch.stack([across, up], -1)

    def _index(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The flat index of the pixel around each point, and whether there is one."""
        rows, columns = self.probability.shape
        scaled = x.detach().double() / self.pixel
        column = torch.floor(scaled[..., 0] + columns / 2)
        row = rows - 1 - torch.floor(scaled[..., 1] + rows / 2)
        inside = (column >= 0) & (column < columns) & (row >= 0) & (row < rows)
        return torch.where(inside, row * columns + column, 0).long(), inside


def _shades(path: str | Path | None, resolution: int, empty: int) -> np.ndarray:
    """Grey levels 0 to 255, (rows, columns), of a picture no longer than `resolution` on either side."""
    from PIL import Image, ImageOps

    if path is None:
        from sklearn.datasets import load_sample_image

        picture = Image.fromarray(load_sample_image("china.jpg"))
    else:
        if not Path(path).is_file():
            raise FileNotFoundError(f"no picture at {path}; path is read from {Path.cwd()} unless absolute")
        try:
            with Image.open(path) as file:
                picture = ImageOps.exif_transpose(file.convert("RGBA"))
        except (OSError, SyntaxError, ValueError) as error:
            raise InvalidValueError(
                f"{path} is not a picture that Pillow can read ({error}); use a .png or .jpg"
            ) from error
        background = Image.new("RGBA", picture.size, (empty, empty, empty, 255))
        picture = Image.alpha_composite(background, picture)
    picture = picture.convert("L")
    # Never enlarged: more pixels of the same shades are the same density.
    picture.thumbnail((resolution, resolution), Image.Resampling.BOX)
    return np.asarray(picture, dtype=np.float64)
