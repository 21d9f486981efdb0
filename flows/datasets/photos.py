"""Patches of photographs: natural images that need no download."""

import torch
from torch import Tensor

from flows.datasets.images import Images, LabelledImages
from flows.datasets.passes import random_split
from flows.errors import InvalidValueError


class PhotoPatches(Images):
    """Colour patches of the two sample photographs of scikit-learn, with 256 levels.

    The photographs (427 × 640 pixels) are cut into square regions that go to training, validation or test as a
    whole, so that no test patch shares a pixel with a training patch. Training patches lie `stride` pixels apart and
    overlap each other; those of the other parts do not overlap at all.

    Args:
        size: pixels along each side of a patch.
        region: pixels along each side of a region.
        stride: of training patches.
        validation_fraction, test_fraction: shares of the regions.
        split_seed: which regions go where.
        flip: mirror half of the training patches, drawn anew each time.

    Raises:
        ValueError: sizes that do not fit.
    """

    def __init__(
        self,
        size: int = 8,
        region: int = 32,
        stride: int = 2,
        validation_fraction: float = 0.1,
        test_fraction: float = 0.2,
        split_seed: int = 0,
        flip: bool = True,
    ):
        for key, value in {"size": size, "region": region, "stride": stride}.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidValueError(f"{key} must be a whole number of pixels >= 1, got {value!r}")
        regions = torch.cat([_patches(photo, region, region) for photo in _photographs(region)])
        if size > region:
            raise InvalidValueError(
                f"a patch of size {size} does not fit into a region of {region} pixels; enlarge region"
            )
        shares = {"test": test_fraction, "validation": validation_fraction}
        split = random_split(len(regions), shares, split_seed, "photo_patches", "regions")
        parts = {
            part: LabelledImages(
                torch.cat([_patches(r, size, stride if part == "train" else size) for r in regions[indices]])
            )
            for part, indices in split.items()
        }
        super().__init__(parts, 256, name="photo_patches", flip=flip, source="photo_patches")


def _photographs(region: int) -> list[Tensor]:  # (3, H, W) each
    from sklearn.datasets import load_sample_image

    photos = [torch.from_numpy(load_sample_image(name).copy()).movedim(-1, 0) for name in ("china.jpg", "flower.jpg")]
    if region > photos[0].shape[1]:
        raise InvalidValueError(f"region must fit into a photograph of 427 × 640 pixels, got {region}")
    return photos


def _patches(image: Tensor, size: int, stride: int) -> Tensor:  # (n, C, size, size)
    """All squares of an image (C, H, W) whose corners lie on multiples of the stride."""
    cut = image.unfold(1, size, stride).unfold(2, size, stride)  # (C, rows, columns, size, size)
    return cut.flatten(1, 2).movedim(1, 0).contiguous()
