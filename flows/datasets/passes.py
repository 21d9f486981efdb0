"""Finite sets of examples: cutting them into parts, and passing over the training part again and again."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flows.datasets.base import Batch, BatchStream
from flows.errors import InvalidValueError


class EpochStream(BatchStream):
    """Batches of examples without replacement, in an order drawn anew for each pass.

    Every batch has min(batch_size, examples) of them: a batch larger than the set is the whole set in a new order,
    and what is left over at the end of a pass, too few for a batch, waits for the next pass.

    Args:
        dataset: its name.
        num_examples: of the training part.
        batch_size, generator, device, dtype: see `BatchStream`.
    """

    unit = "rows"  # what messages call examples

    def __init__(
        self,
        dataset: str,
        num_examples: int,
        batch_size: int,
        generator: torch.Generator,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(dataset, batch_size, generator, device, dtype)
        self.num_examples = num_examples
        self.batch_size = min(batch_size, num_examples)
        self._permutation = torch.empty(0, dtype=torch.long)  # drawn by the first `next`
        self._position = 0

    def draw(self) -> Tensor:
        """Return the indices of the next batch, (batch,), on the CPU."""
        if self._position + self.batch_size > len(self._permutation):
            self._permutation = torch.randperm(self.num_examples, generator=self.generator)
            self._position = 0
        chosen = self._permutation[self._position : self._position + self.batch_size]
        self._position += self.batch_size
        return chosen

    @abstractmethod
    def next(self) -> Batch:
        """Return the examples of `draw()`."""

    def state_dict(self) -> dict[str, Any]:
        own = {"permutation": self._permutation.clone(), "position": self._position, "rows": self.num_examples}
        return super().state_dict() | own

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["rows"] != self.num_examples:
            raise InvalidValueError(
                f"the saved position belongs to {state['rows']} training {self.unit}, {self.dataset!r} now has "
                f"{self.num_examples}; resume with the file and the split that the run was started with"
            )
        super().load_state_dict(state)
        self._permutation = state["permutation"].cpu().clone()
        self._position = state["position"]


def random_split(
    count: int, shares: Mapping[str, float], seed: int, source: str, unit: str
) -> dict[str, Tensor]:  # part: indices
    """Shuffle `count` examples and cut off the parts named in `shares`; what is left is the part "train".

    Shares are rounded to whole examples. Raises ValueError where a part would be empty, calling the set `source` and
    its examples `unit`.
    """
    names = [f"{part}_fraction" for part in shares]
    for name, share in zip(names, shares.values(), strict=True):
        if not 0 < share < 1:
            raise InvalidValueError(f"{name} must be between 0 and 1, both excluded, got {share!r}")
    if sum(shares.values()) >= 1:
        values = " + ".join(map(str, shares.values()))
        raise InvalidValueError(f"{' + '.join(names)} must leave a training part, got {values} >= 1")
    sizes = {part: round(count * share) for part, share in shares.items()}
    training = count - sum(sizes.values())
    if min(sizes.values()) < 1 or training < 2:
        found = ", ".join(f"{size} {part}" for part, size in {"training": max(training, 0), **sizes}.items())
        raise InvalidValueError(
            f"{source} has {count} {unit}, too few for the split: {found} {unit}, needed at least 2 training and 1 of "
            f"each other; bring more {unit} or change {' and '.join(names)}"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    parts = order.split([*sizes.values(), training])
    return dict(zip([*sizes, "train"], parts, strict=True))
