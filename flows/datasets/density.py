"""Densities to sample from without end: a new one is a class with `sample` and, if it has one, `log_prob`."""

from abc import abstractmethod
from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from flows.datasets.base import Batch, BatchStream, Dataset, convert, converted_batch, fixed_batches
from flows.errors import InvalidValueError

# Seeds of the fixed parts: large, so that they meet no seed that a person would give a training run.
VALIDATION_SEED = 0x5EED_0001_7A11_DA7E
TEST_SEED = 0x5EED_0002_07E5_7AB1
REFERENCE_SEED = 0x5EED_0003_4EF4_ECE5


class Density(Dataset):
    """A known density p(x), sampled afresh for every training batch.

    Subclasses set `name`, and `entropy` (nats) where known, and implement `sample`; those with a `log_prob`
    override it too. Validation and test points, and `reference()`, are drawn once, each from a fixed seed of
    its own, when first asked for.

    Args:
        num_validation, num_test: sizes of the fixed parts.
        num_reference: number of points that `reference()` returns.
    """

    event_shape = (2,)
    # On the class too, so that a subclass whose __init__ forgets this one still works.
    num_validation: int = 10_000
    num_test: int = 100_000
    num_reference: int = 10_000

    def __init__(self, num_validation: int = 10_000, num_test: int = 100_000, num_reference: int = 10_000):
        sizes = {"num_validation": num_validation, "num_test": num_test, "num_reference": num_reference}
        for key, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise InvalidValueError(f"{key} must be a whole number >= 1, got {size!r}")
            setattr(self, key, size)

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw n independent points, (n, *event), with `generator` (on the CPU) as the only randomness."""

    def draw(self, n: int, generator: torch.Generator) -> Batch:
        """Draw n examples, with their contexts where the density is conditional."""
        return Batch(checked_sample(self, n, generator))

    def log_prob(self, x: Tensor) -> Tensor:
        """Return log p(x) in nats, (*batch,), for x of (*batch, *event); -inf outside the support."""
        raise NotImplementedError(
            f"{type(self).__name__} has no log_prob; ask has_log_prob first, or estimate from samples"
        )

    @property
    def has_log_prob(self) -> bool:
        """Whether `log_prob` is implemented."""
        return type(self).log_prob is not Density.log_prob

    def train_stream(
        self,
        batch_size: int,
        generator: torch.Generator,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "DensityStream":
        """Return an endless stream of fresh samples."""
        return DensityStream(self, batch_size, generator, device, dtype)

    def validation_batches(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Iterator[Batch]:
        return self._in_batches(self._validation, batch_size, device, dtype)

    def test_batches(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Iterator[Batch]:
        return self._in_batches(self._test, batch_size, device, dtype)

    def reference(self) -> Tensor:
        return convert(self._reference.x, None, None, self.name)

    @cached_property
    def _validation(self) -> Batch:
        return self._fixed(self.num_validation, VALIDATION_SEED)

    @cached_property
    def _test(self) -> Batch:
        return self._fixed(self.num_test, TEST_SEED)

    @cached_property
    def _reference(self) -> Batch:
        return self._fixed(self.num_reference, REFERENCE_SEED)

    def _fixed(self, n: int, seed: int) -> Batch:
        return self.draw(n, torch.Generator().manual_seed(seed))

    def _in_batches(
        self, part: Batch, batch_size: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> Iterator[Batch]:
        return fixed_batches(part.x, batch_size, device, dtype, self.name, part.context)


class DensityStream(BatchStream):
    """Fresh independent samples; its state is the generator's."""

    def __init__(
        self,
        density: Density,
        batch_size: int,
        generator: torch.Generator,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(density.name, batch_size, generator, device, dtype)
        self.density = density

    def next(self) -> Batch:
        batch = self.density.draw(self.batch_size, self.generator)
        return converted_batch(batch.x, batch.context, self.device, self.dtype, self.dataset)


def checked_sample(density: Density, n: int, generator: torch.Generator) -> Tensor:
    """Call `density.sample`, or raise InvalidValueError where it does not return n points of its event shape."""
    points = density.sample(n, generator)
    return checked_shape(points, n, density.event_shape, f"{type(density).__name__}.sample({n}, generator)")


def checked_shape(points: Tensor, n: int, shape: tuple[int, ...], call: str, name: str = "event_shape") -> Tensor:
    """Return what `call` has returned, detached, or raise InvalidValueError where it is not (n, *shape)."""
    expected = (n, *shape)
    if not isinstance(points, Tensor) or tuple(points.shape) != expected:
        found = f"shape {tuple(points.shape)}" if isinstance(points, Tensor) else type(points).__name__
        raise InvalidValueError(
            f"{call} must return a tensor of shape {expected}, got {found}; make it return (n, *{name}), or set "
            f"{name} = {shape} right"
        )
    return points.detach()


def check_points(x: Tensor, dim: int = 2) -> Tensor:
    """Return x, or raise InvalidValueError where it is not (*batch, dim)."""
    if x.ndim < 1 or x.shape[-1] != dim:
        raise InvalidValueError(f"log_prob expects points of shape (*batch, {dim}), got {tuple(x.shape)}")
    return x
