"""The trace of a perceptron's Jacobian, as a product of matrices around a cycle."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

MAX_KEPT_NUMBERS = 2**22  # of a product of weights; larger ones are not kept


class CycleTrace:
    r"""tr(D_N W_N ··· D_2 W_2 D_1 W_1) with W_n shared by the batch and D_n = diag(slopes of node n).

    The Jacobian of a multilayer perceptron is W_out D_L W_L ··· D_1 W_1 with the slopes of its activations in
    D, so by tr AB = tr BA its trace runs around the cycle of hidden layers, with W_1 W_out as the edge that
    closes it. What depends on the weights alone is computed here, once; each call costs

    * one node: Σ_i a_i (W_1)_ii;
    * two nodes: bᵀ (W_2 ∘ W_1ᵀ) a, one matrix product a batch;
    * more: the tangents of one node are pushed around the cycle, from both sides, until they meet. The node is the one
      that makes it cheapest, usually the narrowest: (its width) × (the other widths), never the dimension of the event
      as such. The first push of a side, u = W_2 D_1 w for each column w of W_1, is a product a (W_2 ∘ w)ᵀ of the
      slopes a of the whole batch with what depends on the weights alone.

    Args:
        weights: W_1 (w_1 × w_N), W_2 (w_2 × w_1), ..., W_N (w_N × w_{N−1}).
    """

    def __init__(self, weights: list[Tensor]) -> None:
        self.count = len(weights)
        self.start = _cheapest([len(weight) for weight in weights])
        if self.count == 1:
            self.constant = weights[0].diagonal()
            return
        if self.count == 2:
            self.constant = weights[1] * weights[0].T
            return
        first, *middle, last = (weights[(self.start + 1 + k) % self.count] for k in range(self.count))
        self.middle = middle[1:-1]
        if self.count == 3:
            self.rising = _Push(first.T, middle[0], last)
        else:
            self.rising, self.closing = _Push(first.T, middle[0]), _Closing(middle[-1], last)

    def __call__(
        self,
        slopes: Sequence[Tensor],  # N tensors (B, w_n) or (1, w_n), or N − 1: then the last is one, and the start
    ) -> Tensor:  # (B,)
        """The trace for each sample."""
        if self.count == 1:
            return slopes[0] @ self.constant
        if self.count == 2:
            return ((slopes[0] @ self.constant.T) * slopes[1]).sum(-1)
        first, *between, last = (slopes[(self.start + 1 + k) % self.count] for k in range(self.count - 1))
        tangents = self.rising(first)
        for weight, passed in zip(self.middle, between, strict=False):
            tangents = functional.linear(passed.unsqueeze(1) * tangents, weight)
        if len(slopes) == self.count:
            tangents = tangents * slopes[self.start].unsqueeze(2)
        if self.count == 3:
            return (tangents.sum(1) * last).sum(-1)
        return (self.closing(tangents * between[-1].unsqueeze(1)) * last).sum(-1)


class _Push:
    """a (B, n) to the k tangents W diag(a) v, (B, k, m), times constants r (k, m) if given.

    Args:
        tangents: v, (k, n).
        weight: W, (m, n).
        scales: r.
    """

    def __init__(self, tangents: Tensor, weight: Tensor, scales: Tensor | None = None) -> None:
        self.tangents, self.weight, self.scales = tangents, weight, scales
        self.product = None  # (k m, n), all that depends on the weights
        if len(tangents) * weight.numel() <= MAX_KEPT_NUMBERS:
            product = weight * tangents.unsqueeze(1)
            self.product = (product if scales is None else product * scales.unsqueeze(2)).flatten(0, 1)

    def __call__(self, slopes: Tensor) -> Tensor:
        if self.product is not None:
            return functional.linear(slopes, self.product).unflatten(1, (len(self.tangents), -1))
        pushed = functional.linear(slopes.unsqueeze(1) * self.tangents, self.weight)
        return pushed if self.scales is None else pushed * self.scales


class _Closing:
    """The k tangents u (B, k, n) to Σ_k r_k ∘ W u_k (B, m).

    Args:
        weight: W, (m, n).
        scales: r, (k, m).
    """

    def __init__(self, weight: Tensor, scales: Tensor) -> None:
        self.weight, self.scales = weight, scales
        self.product = None  # (m, k n), all that depends on the weights
        if len(scales) * weight.numel() <= MAX_KEPT_NUMBERS:
            self.product = (scales.T.unsqueeze(2) * weight.unsqueeze(1)).flatten(1)

    def __call__(self, tangents: Tensor) -> Tensor:
        if self.product is not None:
            return functional.linear(tangents.flatten(1), self.product)
        return (functional.linear(tangents, self.weight) * self.scales).sum(1)


def _cost(widths: list[int], start: int) -> int:
    """Multiplications of the matrix products when the tangents of node `start` are pushed around."""
    order = [widths[(start + 1 + k) % len(widths)] for k in range(len(widths))]
    return order[-1] * sum(a * b for a, b in itertools.pairwise(order))


def perceptron_products(
    weights: list[Tensor],  # W_1, ..., W_L, W_out
    slopes: list[Tensor],  # L tensors (B, w_l) or (1, w_l)
    directions: Tensor,  # (P, B, *event)
) -> Tensor:  # (P, B, *event)
    """J u for the Jacobian W_out D_L W_L ··· D_1 W_1 of a perceptron, each at the cost of one evaluation."""
    *hidden, out = weights
    pushed = directions.flatten(2)
    for weight, slope in zip(hidden, slopes, strict=True):
        pushed = slope * (pushed @ weight.T)
    return (pushed @ out.T).view(directions.shape)


class PerceptronTrace:
    r"""div of x ↦ diag(g) W_out σ_L(W_L ··· σ_1(W_1 x)) from the slopes of its activations and, if any, the gate g.

    The cycle of `CycleTrace` either skips the event space, through the edge W_1 W_out, or, where that is
    cheaper (a narrow event between three or more wide layers) or there is a gate, counts it as one more node.

    Args:
        weights: W_1, ..., W_L, W_out.
        gate_per_sample: there is a gate, which differs between samples and is given with the slopes. One that the
            batch shares is a part of W_out.
    """

    def __init__(self, weights: list[Tensor], gate_per_sample: bool = False) -> None:
        *hidden, out = weights
        self.ones = None  # the slopes of the event, where they must be given
        if len(self._nodes(weights, gate_per_sample)) == len(weights):
            self.cycle = CycleTrace([*hidden, out])
            if self.cycle.start != len(hidden) and not gate_per_sample:
                self.ones = out.new_ones(1, len(out))
        else:
            self.cycle = CycleTrace([hidden[0] @ out, *hidden[1:]])

    @staticmethod
    def num_tangents(weights: list[Tensor], gate_per_sample: bool = False) -> int:
        """How many tangents a call pushes through the layers: 0 where one or two nodes need none."""
        widths = PerceptronTrace._nodes(weights, gate_per_sample)
        return 0 if len(widths) <= 2 else widths[_cheapest(widths)]

    @staticmethod
    def _nodes(weights: list[Tensor], gate_per_sample: bool) -> list[int]:
        """The widths of the cycle's nodes: the hidden layers and, last, the event if it is one of them."""
        through_event = [len(weight) for weight in weights]
        hidden = through_event[:-1]
        if gate_per_sample or (len(hidden) > 2 and _least_cost(through_event) < _least_cost(hidden)):
            return through_event
        return hidden

    def __call__(
        self,
        slopes: list[Tensor],  # L tensors (B, w_l) or (1, w_l)
        gate: Tensor | None = None,  # (B, d), only with gate_per_sample
    ) -> Tensor:  # (B,)
        """The divergence of each sample."""
        event = self.ones if gate is None else gate
        return self.cycle(slopes if event is None else [*slopes, event])


def _cheapest(widths: list[int]) -> int:
    """The node from which the tangents cost least."""
    return min(range(len(widths)), key=lambda node: _cost(widths, node))


def _least_cost(widths: list[int]) -> int:
    return _cost(widths, _cheapest(widths))
