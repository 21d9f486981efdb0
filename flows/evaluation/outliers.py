"""Tell outliers from data by their likelihood, by how typical it is, and by how simple they are."""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flows.arguments import checked
from flows.datasets import Batch, Dataset
from flows.errors import InvalidValueError
from flows.evaluation.evaluator import known, set_apart
from flows.evaluation.likelihood import Likelihood, likelihood, part_batches
from flows.evaluation.metrics import AUROC
from flows.models.cnf import CNF
from flows.models.resolution import CHECKED_POINTS


@dataclass(frozen=True)
class OutlierScores:
    """Scores that are high for outliers, and how well each tells them apart.

    The NLL misses outliers that are simpler than the data, which a flow often finds *more* likely. Its distance from
    the mean NLL of the validation part finds those that are much likelier. For whole numbers there is a likelihood
    ratio as well: −log p(x) minus the length of x after compression, in nats, which is how likely a model of nothing in
    particular finds it. [Nalisnick et al. 2019, arXiv:1810.09136, 1906.02994; Serrà et al. 2020, arXiv:1909.11480]

    Example:
        ```python
        import flows
        from flows.evaluation import likelihood, outlier_scores

        data, outliers = flows.datasets.Moons(num_test=100), flows.datasets.Circles(num_test=100)
        flow = flows.CNF(flows.fields.MLP((2,), hidden=(8,)))
        known = likelihood(flow, data.test_batches(100))
        scores = outlier_scores(flow, data, known, "test", outliers, batch_size=100)
        scores.likelihood, scores.typicality, scores.ratio
        ```
    """

    name: str  # of the outliers
    data_nll: Tensor  # (n,), nats
    outlier_nll: Tensor  # (m,)
    typical_nll: float  # the mean over the validation part
    unresolved: str | None = None  # why the scores are no result, and what to change
    data_length: Tensor | None = None  # (n,), nats, after compression; None: the data are no whole numbers
    outlier_length: Tensor | None = None  # (m,)

    @property
    def likelihood(self) -> AUROC:
        """Of −log p."""
        return AUROC.of(self.outlier_nll, self.data_nll)

    @property
    def typicality(self) -> AUROC:
        """Of |−log p − its typical value|."""
        return AUROC.of((self.outlier_nll - self.typical_nll).abs(), (self.data_nll - self.typical_nll).abs())

    @property
    def ratio(self) -> AUROC | None:
        """Of −log p minus the compressed length; None where the data are no whole numbers."""
        if self.data_length is None or self.outlier_length is None:
            return None
        return AUROC.of(self.outlier_nll - self.outlier_length, self.data_nll - self.data_length)

    def scored(self) -> dict[str, tuple[Tensor, Tensor, AUROC]]:
        """Name each score, with its values for data and outliers, and how well it tells them apart."""
        ours, theirs, typical = self.data_nll, self.outlier_nll, self.typical_nll
        found = {
            "NLL": (ours, theirs, self.likelihood),
            "distance from the typical NLL": ((ours - typical).abs(), (theirs - typical).abs(), self.typicality),
        }
        if self.data_length is not None and self.outlier_length is not None:
            ratio = self.ratio
            assert ratio is not None  # both lengths are known
            lengths = ours - self.data_length, theirs - self.outlier_length
            found["NLL minus compressed length"] = (*lengths, ratio)
        return found

    def table(self) -> list[tuple[str, str]]:
        """Names and values for a reader."""
        count, finite = len(self.outlier_nll), self.outlier_nll[self.outlier_nll.isfinite()]
        if self.unresolved is not None:
            return [
                ("outliers", f"{self.name}, NLL unresolved ({count:,} points)"),
                ("AUROC", f"unresolved: {self.unresolved}"),
            ]
        nll = f"NLL {finite.mean():.4f} nats" if len(finite) else ""
        if infinite := count - len(finite):
            others = f", {nll} for the others" if nll else ""
            nll = f"NLL infinite for {infinite:,}, where the density is 0{others}"
        return [
            ("outliers", f"{self.name}, {nll} ({count:,} points)"),
            ("AUROC", ", ".join(f"{score} by {name}" for name, (_, _, score) in self.scored().items())),
        ]

    def as_dict(self) -> dict[str, Any]:
        """The figures as plain values."""
        scores = {"nll": self.likelihood, "typicality": self.typicality}
        if (ratio := self.ratio) is not None:
            scores["ratio"] = ratio
        figures = {f"auroc_{key}": score.value for key, score in scores.items()}
        errors = {f"auroc_{key}_se": score.standard_error for key, score in scores.items()}
        about = {
            "outliers": self.name,
            "outlier_nll": known(float(self.outlier_nll.mean())),
            "outliers_infinite": int((~self.outlier_nll.isfinite()).sum()),
            "typical_nll": self.typical_nll,
        }
        everything = {**about, **figures, **errors, "auroc_unresolved": self.unresolved}
        return everything if self.unresolved is None else set_apart(everything, ["outlier_nll", *figures])

    def csv(self) -> str:
        """One line a point: its NLL, its distance from the typical NLL, any ratio, and whether it is an outlier."""
        found = [(ours, theirs) for ours, theirs, _ in self.scored().values()]
        lines = [",".join(["nll", "typicality", "ratio"][: len(found)]) + ",outlier"]
        for outlier in (0, 1):
            rows = torch.stack([both[outlier] for both in found], 1).tolist()
            lines += [",".join(f"{value:.9g}" for value in row) + f",{outlier}" for row in rows]
        return "\n".join(lines) + "\n"


@checked
def outlier_scores(
    flow: CNF,
    dataset: Dataset,
    data: Likelihood,  # of the part of the data set
    part: str,
    outliers: Dataset | Literal["shuffled", "plain"] | None,
    batch_size: int,
    generator: torch.Generator | None = None,  # of the order of pixels, noise and probes
    num_draws: int = 1,
) -> OutlierScores:
    """Compare the points of a part with those of the same part of `outliers`.

    Without such a data set, outliers are the points of the part itself with their pixels `shuffled` (None or
    `"shuffled"`), or made `plain`: known failures of a score by likelihood look like the latter.

    Outliers where the density is 0 have an infinite NLL.

    Raises:
        ValueError: the outliers have another shape or other levels than the data, or are fewer than two, or plain ones
            are asked for of data that are no whole numbers.

    Example:
        ```python
        import flows
        from flows.evaluation import likelihood, outlier_scores

        data, outliers = flows.datasets.Moons(num_test=100), flows.datasets.Circles(num_test=100)
        flow = flows.CNF(flows.fields.MLP((2,), hidden=(8,)))
        known = likelihood(flow, data.test_batches(100))
        scores = outlier_scores(flow, data, known, "test", outliers, batch_size=100)
        scores.likelihood, scores.typicality
        ```
    """
    if outliers is None or isinstance(outliers, str):
        batches, num_points = part_batches(flow, dataset, part, batch_size)
        name = f"{dataset.name}, {outliers or 'shuffled'}"
        if outliers == "plain" and dataset.num_levels is None:
            raise InvalidValueError(f"outliers=plain needs images of whole numbers, and {dataset.name!r} is continuous")
        batches = plain(batches) if outliers == "plain" else shuffled(batches, generator)
    else:
        batches, num_points = part_batches(flow, outliers, part, batch_size)
        name = f"{outliers.name}, {part}"
        for what in ("event_shape", "num_levels"):
            if getattr(outliers, what) != getattr(dataset, what):
                raise InvalidValueError(
                    f"outliers must be of the {what} of the data {dataset.name!r}, {getattr(dataset, what)}, got "
                    f"{getattr(outliers, what)} of {outliers.name!r}{_converted(dataset, outliers)}"
                )
        if num_points < 2:
            raise InvalidValueError(
                f"outliers must be two points or more, and the {part} part of {outliers.name!r} has {num_points}; give "
                "more, or cut off a larger part, such as outliers.test_fraction=0.8"
            )
    batches = list(batches)  # drawn once
    lengths: list[Tensor | None] = [None, None]
    if dataset.num_levels is not None:
        own, _ = part_batches(flow, dataset, part, batch_size)
        of_part = len(data.values)
        lengths = [
            compressed_length(torch.cat([batch.x for batch in found])[:most], dataset.num_levels)
            for found, most in ((own, of_part), (batches, num_points))
        ]
    usual, num_usual = part_batches(flow, dataset, "validation", batch_size)
    typical = likelihood(flow, usual, generator, CHECKED_POINTS, "validation", num_usual, num_draws)
    try:
        strange = likelihood(flow, batches, generator, CHECKED_POINTS, "outliers", num_points, num_draws, True)
    except InvalidValueError as error:
        raise InvalidValueError(f"outliers: {error}") from error
    faults = (data.unresolved(dataset.entropy), typical.unresolved(dataset.entropy), strange.unresolved())
    unresolved = next((fault for fault in faults if fault is not None), None)
    return OutlierScores(name, data.values, strange.values, typical.nll, unresolved, *lengths)


def _converted(dataset: Dataset, outliers: Dataset) -> str:
    """How images of another size or mode become outliers, in words."""
    own = dataset.event_shape
    if len(own) != 3 or len(outliers.event_shape) != 3 or own[0] not in (1, 3):
        return ""
    mode = "L" if own[0] == 1 else "RGB"
    return f"; files of images are converted by outliers.size=[{own[1]},{own[2]}] outliers.mode={mode}"


@checked
def shuffled(batches: Iterable[Batch], generator: torch.Generator | None = None) -> Iterator[Batch]:
    """The same points, each with its entries in a random order of its own; the channels of a pixel stay together.

    Example:
        ```python
        import torch

        import flows
        from flows.evaluation import shuffled

        data = flows.datasets.Digits()
        batches = shuffled(data.test_batches(100), torch.Generator().manual_seed(0))
        ```
    """
    for batch in batches:
        channels = batch.x.shape[1] if batch.x.ndim == 4 else 1
        x = batch.x.reshape(len(batch.x), channels, -1)
        device = x.device if generator is None else generator.device
        order = torch.rand(len(x), 1, x.shape[2], generator=generator, device=device).argsort(-1).to(x.device)
        yield Batch(x.gather(2, order.expand_as(x)).view_as(batch.x), batch.context)


@checked
def plain(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Images of one level each, the most frequent one of the image: blank paper for drawings.

    Example:
        ```python
        import flows
        from flows.evaluation import plain

        batches = plain(flows.datasets.Digits().test_batches(100))
        ```
    """
    for batch in batches:
        level = batch.x.flatten(1).mode(1).values
        yield Batch(level.view(-1, *[1] * (batch.x.ndim - 1)).expand_as(batch.x).contiguous(), batch.context)


@checked
def compressed_length(
    x: Tensor,  # (n, *event), whole numbers
    num_levels: int,
) -> Tensor:  # (n,), nats
    """Length of each point after lossless compression, log 256 for each byte: by PNG for images, otherwise by zlib.

    It is −log of the probability that the compressor gives the point. What every file has, such as a header, is
    included.

    Example:
        ```python
        import flows
        from flows.evaluation import compressed_length

        compressed_length(flows.datasets.Digits().reference()[:10], num_levels=17)
        ```
    """
    rows = x.cpu().numpy().astype(np.uint8 if num_levels <= 256 else np.uint32)
    pictures = rows.ndim == 4 and rows.shape[1] in (1, 3) and num_levels <= 256
    sizes = [_png_size(row) if pictures else len(zlib.compress(row.tobytes(), 9)) for row in rows]
    return torch.tensor(sizes, dtype=torch.float64) * math.log(256)


def _png_size(image: np.ndarray) -> int:  # (C, H, W)
    file = io.BytesIO()
    Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(file, "png", optimize=True)
    return len(file.getvalue())
