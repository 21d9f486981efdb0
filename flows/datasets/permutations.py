"""Permutations of many numbers that take no memory."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from flows.datasets.recognition.hashing import STEP, mix

ROUNDS = 6
LARGEST_KEY = 2**62


class Permutation:
    """A pseudo-random order of 0, ..., n − 1, of which any entry is computed without the others.

    It is a Feistel network on the numbers of b bits, 2ᵇ >= n: with halves L and R, each round maps (L, R) to
    (R, L xor h(R)), with a hash h of its own. That is a bijection whatever h is. Numbers of n or more are mapped again
    until they are below n. [Luby & Rackoff 1988; Black & Rogaway 2002, cycle walking]

    Args:
        count: n.
        key: tells permutations apart, from 0 to 2⁶² − 1.
    """

    def __init__(self, count: int, key: int) -> None:
        self.count = count
        self._half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))  # bits
        self._mask = np.uint64((1 << int(self._half)) - 1)
        self._keys = mix(np.uint64(key) + STEP * np.arange(1, ROUNDS + 1, dtype=np.uint64))

    def __call__(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the numbers at these places of the order."""
        found = self._once(places.astype(np.uint64))
        while len(outside := np.flatnonzero(found >= np.uint64(self.count))):
            found[outside] = self._once(found[outside])
        return found.astype(np.int64)

    def _once(self, numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = numbers >> self._half, numbers & self._mask
        for key in self._keys:
            left, right = right, left ^ (mix(right + key) & self._mask)
        return (left << self._half) | right


def new_key(generator: torch.Generator) -> int:
    """Draw the key of a permutation."""
    return int(torch.randint(LARGEST_KEY, (), generator=generator))
