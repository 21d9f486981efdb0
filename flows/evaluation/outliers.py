"""Tell outliers from data by their likelihood."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flows.arguments import checked
from flows.datasets import Batch, Dataset
from flows.errors import InvalidValueError
from flows.evaluation.evaluator import set_apart
from flows.evaluation.likelihood import Likelihood, likelihood, part_batches
from flows.evaluation.metrics import AUROC
from flows.models.cnf import CNF
from flows.models.resolution import CHECKED_POINTS


@dataclass(frozen=True)
class OutlierScores:
    """Two scores that are high for outliers, and how well each tells them apart.

    The NLL misses outliers that are simpler than the data, which a flow often finds *more* likely; its distance from
    the mean NLL of the validation part finds those too. [Nalisnick et al. 2019, arXiv:1810.09136, 1906.02994]

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

    name: str  # of the outliers
    data_nll: Tensor  # (n,), nats
    outlier_nll: Tensor  # (m,)
    typical_nll: float  # the mean over the validation part
    unresolved: str | None = None  # why the scores are no result, and what to change

    @property
    def likelihood(self) -> AUROC:
        """Of −log p."""
        return AUROC.of(self.outlier_nll, self.data_nll)

    @property
    def typicality(self) -> AUROC:
        """Of |−log p − its typical value|."""
        return AUROC.of((self.outlier_nll - self.typical_nll).abs(), (self.data_nll - self.typical_nll).abs())

    def table(self) -> list[tuple[str, str]]:
        """Names and values for a reader."""
        nll, count = self.outlier_nll.mean(), len(self.outlier_nll)
        if self.unresolved is not None:
            return [
                ("outliers", f"{self.name}, NLL unresolved ({count:,} points)"),
                ("AUROC", f"unresolved: {self.unresolved}"),
            ]
        return [
            ("outliers", f"{self.name}, NLL {nll:.4f} nats ({count:,} points)"),
            ("AUROC", f"{self.likelihood} by NLL, {self.typicality} by its distance from the typical NLL"),
        ]

    def as_dict(self) -> dict[str, Any]:
        """The figures as plain values."""
        scores = {"nll": self.likelihood, "typicality": self.typicality}
        figures = {f"auroc_{key}": score.value for key, score in scores.items()}
        errors = {f"auroc_{key}_se": score.standard_error for key, score in scores.items()}
        known = {"outliers": self.name, "outlier_nll": float(self.outlier_nll.mean()), "typical_nll": self.typical_nll}
        everything = {**known, **figures, **errors, "auroc_unresolved": self.unresolved}
        return everything if self.unresolved is None else set_apart(everything, ["outlier_nll", *figures])

    def csv(self) -> str:
        """One line a point: its NLL, its distance from the typical NLL, and whether it is an outlier."""
        lines = ["nll,typicality,outlier"]
        for outlier, values in enumerate((self.data_nll, self.outlier_nll)):
            lines += [f"{nll:.9g},{abs(nll - self.typical_nll):.9g},{outlier}" for nll in values.tolist()]
        return "\n".join(lines) + "\n"


@checked
def outlier_scores(
    flow: CNF,
    dataset: Dataset,
    data: Likelihood,  # of the part of the data set
    part: str,
    outliers: Dataset | None,
    batch_size: int,
    generator: torch.Generator | None = None,  # of the order of pixels, noise and probes
    num_draws: int = 1,
) -> OutlierScores:
    """Compare the points of a part with those of the same part of `outliers`.

    Without such a data set, outliers are the points of the part itself with their pixels shuffled.

    Raises:
        ValueError: the outliers have another shape or other levels than the data.

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
    if outliers is None:
        batches, num_points = part_batches(flow, dataset, part, batch_size)
        batches, name = shuffled(batches, generator), f"{dataset.name}, shuffled"
    else:
        batches, num_points = part_batches(flow, outliers, part, batch_size)
        name = f"{outliers.name}, {part}"
        for what in ("event_shape", "num_levels"):
            if getattr(outliers, what) != getattr(dataset, what):
                raise InvalidValueError(
                    f"outliers must be of the {what} of the data {dataset.name!r}, {getattr(dataset, what)}, got "
                    f"{getattr(outliers, what)} of {outliers.name!r}"
                )
    known, num_known = part_batches(flow, dataset, "validation", batch_size)
    typical = likelihood(flow, known, generator, CHECKED_POINTS, "validation", num_known, num_draws)
    strange = likelihood(flow, batches, generator, CHECKED_POINTS, "outliers", num_points, num_draws)
    faults = (data.unresolved(dataset.entropy), typical.unresolved(dataset.entropy), strange.unresolved())
    unresolved = next((fault for fault in faults if fault is not None), None)
    return OutlierScores(name, data.values, strange.values, typical.nll, unresolved)


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
