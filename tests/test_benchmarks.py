import argparse
import itertools
import re
import time

import pytest
import torch
from problems import at_work

from benchmarks.__main__ import BENCHMARKS, main
from benchmarks.divergence import BARE, LOOP, Cost, measure, table
from benchmarks.probing_likelihood import measure_saving
from benchmarks.probing_likelihood import table as saving_table
from benchmarks.probing_noise import measure_noise, trained_on_digits
from benchmarks.workloads import bottleneck, convolutional, perceptron, structured
from flows import ODESolver
from flows.compare.timing import alternating_medians
from flows.divergence import Analytic, Exact
from flows.fields import Linear


def test_cases_take_turns_and_slow_ones_stop_early() -> None:
    calls = []
    cases = {"quick": lambda: calls.append("quick"), "slow": lambda: (calls.append("slow"), time.sleep(0.02))}
    medians = alternating_medians(cases, seconds_each=0.001, most=10)
    assert medians["slow"] >= 0.02 > medians["quick"]
    assert calls.count("slow") == 2  # the first run counts, and one more
    assert calls.count("quick") > 3
    assert calls[:4] == ["quick", "slow", "quick", "slow"]


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda benchmark: benchmark.__name__)
def test_every_benchmark_explains_itself(benchmark, capsys) -> None:
    commands = argparse.ArgumentParser().add_subparsers()
    benchmark.add_command(commands)
    (name,) = commands.choices
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    assert f"python -m benchmarks {name} [-h]" in capsys.readouterr().out


def test_a_benchmark_runs_from_the_command_line(capsys) -> None:
    main(["divergence", "--parts", "mlp", "--dimensions", "2", "--seconds", "0", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "MLP, d = 2, two hidden layers of 64; batch 1024 forward, 256 with backward" in printed
    assert re.search(r"\nAnalytic +0 +yes ", printed)


def test_times_of_ones_own_cost_the_evaluations_of_their_union(capsys) -> None:
    main(["series", "own_times"])
    own, union = re.findall(r"(\d+) evaluations", capsys.readouterr().out)
    assert own == union


def test_a_wrong_argument_is_told_without_a_traceback(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(["entropy_gap", "--data", "breast_cancer", "--seconds", "0.1"])
    assert "got breast_cancer" in capsys.readouterr().err


def test_table_states_ratios() -> None:
    rows = [
        Cost(BARE, None, None, 1.0, 2.0),
        Cost(LOOP, None, None, 60.0, 80.0),
        Cost("Analytic", 0, True, 1.5, 4.0),
    ]
    assert list(table(rows))[-1].split() == ["Analytic", "0", "yes", "1.50", "40.0", "2.00", "20.0"]
    assert list(table([rows[0], rows[2]]))[-1].split() == ["Analytic", "0", "yes", "1.50", "2.00"]


def test_measures_every_estimator() -> None:
    costs = measure(Linear((3,)), (3,), {"a": Analytic(), "e": Exact()}, 4, 4, seconds_each=0.0)
    assert [(cost.name, cost.products) for cost in costs] == [(BARE, None), (LOOP, None), ("a", 0), ("e", 3)]
    assert all(cost.forward > 0 and cost.training > 0 for cost in costs)


@pytest.mark.parametrize(
    "workload",
    [perceptron(2), perceptron(64), bottleneck(), *structured(), *convolutional()],
    ids=lambda workload: workload.title,
)
def test_every_estimator_suits_its_workload(workload) -> None:
    field = workload.build(workload.event_shape)
    x = torch.randn(2, *workload.event_shape)
    for estimator in workload.estimators.values():
        bound = at_work(estimator, field, workload.event_shape)
        if bound.cost <= 32:
            sample = bound(torch.tensor(0.5), x, bound.draw_probes(x))
            assert sample.divergence.shape == (2,)


def test_colours_beat_as_many_signs_on_digits() -> None:
    flow, digits = trained_on_digits(steps=5, progress=False)
    rows = measure_noise(flow, digits[:16], strides=(3,), times=(0.2, 0.8), draws=5, progress=False)
    assert [(row.t, row.products) for row in rows] == [(0.2, 9), (0.8, 9), (None, 9)]
    assert all(row.probing < row.hutchinson for row in rows)
    squares = [row.hutchinson**2 for row in rows]
    assert squares[2] == pytest.approx(sum(squares[:2]) / 2)
    assert all(a != b for a, b in itertools.pairwise(squares))


def test_probing_at_the_exact_stride_gives_the_same_likelihood() -> None:
    flow, digits = trained_on_digits(steps=3, progress=False, size=9, batch_size=16)
    flow.solver = ODESolver("rk4", step_size=0.5)
    estimator = flow.divergence
    saving = measure_saving(flow, digits[:2])
    assert (saving.event_shape, saving.stride, saving.products, saving.nfe) == ((1, 9, 9), 5, (81, 25), 8)
    assert saving.difference < 1e-9
    assert saving.speedup == saving.seconds[0] / saving.seconds[1] > 0
    assert flow.divergence is estimator
    assert "81 to 25" in list(saving_table([saving]))[1]
