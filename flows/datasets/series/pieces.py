"""Pieces of time series: the beginning to train on, what follows to predict, and windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flows.datasets.splits import checked_fractions
from flows.errors import InvalidValueError


@dataclass(frozen=True)
class Piece:
    """Neighbouring points of a series: `count` of them from `start` on. A model starts from the first."""

    series: int
    start: int
    count: int


def cut_in_time(
    whole: Sequence[Tensor],  # (T_i,) each, whether a state was observed whole
    labels: Sequence[str],
    fractions: Mapping[str, float],  # of "test" and "validation"
    seed: int,
    source: str,
) -> dict[str, list[Piece]]:
    """Cut each series into its beginning, to train on, a part to validate on and its end, to test on.

    A later piece starts from the last state before it that was observed whole.

    Raises:
        InvalidTypeError, InvalidValueError: a fraction is out of range, or a series has too few points.
    """
    checked_fractions(fractions, seed, "points")
    pieces: dict[str, list[Piece]] = {"test": [], "validation": [], "train": []}
    for series, (starts, label) in enumerate(zip(whole, labels, strict=True)):
        end = len(starts)
        for split, fraction in fractions.items():
            first = end - max(1, round(fraction * len(starts)))
            if first < 2:
                raise InvalidValueError(
                    f"{source}: series {label!r} has {len(starts)} points, too few to train on its beginning and to "
                    "validate and test on what follows; leave it out, or set split_by=position to split by series"
                )
            start = int(starts[:first].nonzero()[-1])
            pieces[split].append(Piece(series, start, end - start))
            end = first
        pieces["train"].append(Piece(series, 0, end))
    return pieces


def cut_windows(piece: Piece, whole: Tensor, window: int) -> list[Piece]:
    """Cut a piece into windows of that many points; neighbours share one, and the last window may be shorter.

    A window goes on until a state that was observed whole, from which the next one starts.
    """
    starts = whole[piece.start : piece.start + piece.count].nonzero()[:, 0]
    found, here = [], 0
    while here < piece.count - 1:
        later = int(torch.searchsorted(starts, here + window - 1))
        stop = int(starts[later]) if later < len(starts) else piece.count - 1
        found.append(Piece(piece.series, piece.start + here, stop - here + 1))
        here = stop
    return found
