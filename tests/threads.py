"""Threads that stand for the processes of a run."""

import copy
import threading

import pytest
import torch

from flows.shares import Share, sharing


def in_threads(count, compute):
    """What `compute(rank)` returns in threads that stand for processes."""
    barrier, place, found = threading.Barrier(count, timeout=60), [None] * count, [None] * count

    def run(rank):
        def gather(tensor):
            place[rank] = tensor.detach().clone()
            barrier.wait()
            every = torch.stack(list(place))
            barrier.wait()
            return every

        try:
            with sharing(Share(rank, count, gather)):
                found[rank] = compute(rank)
        except BaseException as error:
            found[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in found:
        if isinstance(one, BaseException):
            raise one
    return found


def loss_and_gradients(objective, model, batch):
    """Gradients and metrics as one process adds them to those of the others, and the statistics of its solve."""
    model = copy.deepcopy(model)
    output = objective(model, batch, torch.Generator().manual_seed(1))
    (output.loss * output.weight).backward()
    metrics = {"loss": output.loss.detach(), **output.metrics}
    metrics = {name: output.weight * float(value) for name, value in metrics.items()}
    return [parameter.grad for parameter in model.parameters()], metrics, output.statistics


def check_shared(objective, model, batch, count=3, tolerance=1e-9):
    """The mean over `count` processes is what one finds alone: gradients, metrics and steps."""
    gradients, metrics, statistics = loss_and_gradients(objective, model, batch)
    found = in_threads(count, lambda rank: loss_and_gradients(objective, model, batch))
    assert objective.shares
    for i, gradient in enumerate(gradients):
        if gradient is None:  # a parameter that the objective does not train
            assert all(one[0][i] is None for one in found)
            continue
        mean = torch.stack([one[0][i] for one in found]).mean(0)
        torch.testing.assert_close(mean, gradient, rtol=tolerance, atol=1e-3 * tolerance)
    means = {name: sum(one[1][name] for one in found) / count for name in metrics}
    assert means == pytest.approx(metrics, rel=tolerance, nan_ok=True)
    if statistics is not None:
        for one in found:
            for mine, its in (
                (statistics.attempts, one[2].attempts),
                (statistics.backward_attempts, one[2].backward_attempts),
            ):
                assert [a.dt for a in its] == pytest.approx([a.dt for a in mine], rel=tolerance)
