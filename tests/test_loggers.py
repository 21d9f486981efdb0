"""What a run logs can be read back: TensorBoard events, JSON lines, the bar on the terminal."""

import json
import math

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from small_run import Memory, small_flow, small_gaussian, small_trainer, stopping_at
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

import flows
from flows.training import (
    HParams,
    JSONLinesLogger,
    ProgressBar,
    TensorBoardLogger,
    TrainingInterrupted,
    read_metrics,
    training_curves,
)


def events(folder):
    accumulator = EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0, "images": 0})
    accumulator.Reload()
    return accumulator


def scalars(folder, name):
    return [(event.step, event.value) for event in events(folder).Scalars(name)]


def hparams_of(accumulator):
    content = {}
    for tag in accumulator.PluginTagToContent("hparams"):
        data = plugin_data_pb2.HParamsPluginData.FromString(accumulator.SummaryMetadata(tag).plugin_data.content)
        if data.HasField("session_start_info"):
            for name, value in data.session_start_info.hparams.items():
                content[name] = getattr(value, value.WhichOneof("kind"))
    return content


def layout_of(accumulator):
    (event,) = accumulator.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    return {
        group.title: {chart.title: [tag[1:-1] for tag in chart.multiline.tag] for chart in group.chart}
        for group in layout.category
    }


CONFIG = {"seed": 0, "field": {"hidden": [8, 8], "activation": "silu"}, "solver": {"rtol": 1e-5, "step_size": None}}


def test_a_run_can_be_read_in_tensorboard(tmp_path, monkeypatch):
    dataset = small_gaussian()
    flow = small_flow(dataset, flows.divergence.Hutchinson(num_probes=2))
    summary = small_trainer(tmp_path, dataset, flow=flow, config=CONFIG, log_every=2, plot_every=0).fit()
    found = events(tmp_path)
    tags = found.Tags()
    assert set(tags["scalars"]) >= {
        *(
            f"{stage}/{name}"
            for stage in ("flow_matching", "maximum_likelihood")
            for name in ("loss", "gradient_norm", "learning_rate", "steps_per_second")
        ),
        "flow_matching/velocity_error",
        "maximum_likelihood/nll",
        "maximum_likelihood/nfe_forward",
        "maximum_likelihood/nfe_backward",
        "maximum_likelihood/divergence_standard_error",
        "validation/nll",
        "validation/gap",
        "validation/nfe",
        "validation/steps_accepted",
        "validation/nll_se",
        "test/nll",
        "test/nll_se",
        "test/gap",
        "validation/score",
    }
    assert not [tag for tag in tags["scalars"] if tag.startswith("train/")]  # two units in one curve
    assert [step for step, _ in scalars(tmp_path, "flow_matching/loss")] == [2, 4, 6]
    assert [step for step, _ in scalars(tmp_path, "maximum_likelihood/nll")] == [8, 10, 11]
    assert [step for step, _ in scalars(tmp_path, "validation/nll")] == [3, 6, 9, 11]
    gap = dict(scalars(tmp_path, "validation/gap"))
    for step, nll in scalars(tmp_path, "validation/nll"):
        assert gap[step] == pytest.approx(nll - dataset.entropy, abs=1e-5)
    assert scalars(tmp_path, "maximum_likelihood/nfe_forward")[0] == (8, 8.0)
    assert scalars(tmp_path, "test/nll") == [(11, pytest.approx(summary.metrics["nll"], abs=1e-5))]

    pictures = {f"plots/{name}" for name in ("density", "samples", "trajectories", "evolution")}
    assert set(tags["images"]) == pictures | {"plots/solve"}
    assert [event.step for event in found.Images("plots/density")] == [6, 11]
    image = found.Images("plots/density")[0]
    assert (image.width, image.height) == (1152, 552)
    files = {path.name for path in (tmp_path / "plots").iterdir()}
    assert files == {f"{name}{end}.png" for name in ("density", "samples", "trajectories", "evolution", "solve")
                     for end in ("", "_000006")} | {"curves.png"}  # fmt: skip

    charts = layout_of(found)
    assert list(charts) == ["quality", "flow_matching", "maximum_likelihood", "cost"]
    assert charts["maximum_likelihood"]["loss"] == ["maximum_likelihood/loss", "maximum_likelihood/nll"]
    assert charts["quality"]["negative log-likelihood in nats"] == ["validation/nll", "test/nll"]
    shown = {tag for group in charts.values() for tags in group.values() for tag in tags}
    absent = {f"flow_matching/{name}" for name in ("nll", "nfe_forward", "nfe_backward")}  # it solves nothing
    absent |= {f"flow_matching/steps_{kind}" for kind in ("accepted", "rejected")}
    assert shown <= set(tags["scalars"]) | absent

    text = found.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "hidden:" in text
    assert (tmp_path / "config.yaml").read_text().startswith("seed: 0\n")
    assert hparams_of(found) == {
        "seed": 0,
        "field.hidden": "[8, 8]",
        "field.activation": "silu",
        "solver.rtol": 1e-5,
        "parameters": summary.parameters,
    }
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1  # one file, so one row in the HPARAMS tab


def test_a_curve_goes_on_where_a_run_was_stopped(tmp_path):
    """Steps that were logged after the last checkpoint, before a crash, do not appear twice."""
    with pytest.raises(TrainingInterrupted):
        small_trainer(tmp_path, stopping_at(small_gaussian(), 5)).fit()
    for logger in (TensorBoardLogger(tmp_path), JSONLinesLogger(tmp_path / "metrics.jsonl")):
        logger.log({"flow_matching/loss": 99.0}, 6)
        logger.close()
    memory = Memory()
    small_trainer(tmp_path, resume=tmp_path, loggers=[memory]).fit()
    assert [step for step, _ in memory.series("train/loss")] == [6, 7, 8, 9, 10, 11]
    curve = training_curves(read_metrics(tmp_path / "metrics.jsonl"))["train/loss"]
    assert [step for step, _ in curve] == list(range(1, 12))
    assert curve[5:] == memory.series("train/loss")
    written = scalars(tmp_path, "flow_matching/loss") + scalars(tmp_path, "maximum_likelihood/loss")
    assert [step for step, _ in written] == list(range(1, 12))
    assert [value for _, value in written] == pytest.approx([value for _, value in curve], rel=1e-6)


def test_tensorboard_takes_values_by_their_type(tmp_path):
    figure = Figure(figsize=(2, 1), dpi=50, facecolor="red")
    logger = TensorBoardLogger(tmp_path)
    logger.log({"number": 1.5, "tensor": torch.tensor(2.0), "picture": figure, "text": "hello"}, 3)
    settings = {"rate": 0.1, "flag": True, "sizes": [1, 2], "none": None}
    logger.log({"summary": HParams(settings, {"test/nll": 2.0, "test/gap": None})}, 4)
    logger.close()
    found = events(tmp_path)
    assert scalars(tmp_path, "number") == [(3, 1.5)]
    assert scalars(tmp_path, "tensor") == [(3, 2.0)]
    assert scalars(tmp_path, "test/nll") == [(4, 2.0)]
    assert "test/gap" not in found.Tags()["scalars"]
    assert (found.Images("picture")[0].width, found.Images("picture")[0].height) == (100, 50)
    assert found.Tensors("text/text_summary")[0].tensor_proto.string_val == [b"hello"]
    assert hparams_of(found) == {"rate": 0.1, "flag": True, "sizes": "[1, 2]", "none": "None"}


def test_figures_arrive_in_their_colours(tmp_path):
    from flows.training.events import _pixels

    assert (_pixels(Figure(figsize=(1, 1), dpi=10, facecolor="#204060")) == np.array([0x20, 0x40, 0x60])).all()


def test_json_lines_hold_the_numbers(tmp_path):
    path = tmp_path / "metrics.jsonl"
    logger = JSONLinesLogger(path)
    logger.log({"loss": 0.5, "nfe": 3, "text": "no", "figure": Figure()}, 1)
    logger.log({"text": "nothing to write"}, 2)
    logger.log({"loss": math.inf, "nll": math.nan}, 3)
    logger.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 0.5, "nfe": 3.0},
        {"step": 3, "loss": None, "nll": None},
    ]
    assert read_metrics(path) == {"loss": [(1, 0.5)], "nfe": [(1, 3.0)]}
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    resumed = JSONLinesLogger(path, resume_step=1)
    resumed.log({"loss": 0.25}, 2)
    resumed.close()
    assert read_metrics(path)["loss"] == [(1, 0.5), (2, 0.25)]


def test_the_bar_shows_stage_loss_evaluations_and_speed(capsys):
    bar = ProgressBar({"flow_matching": 10, "maximum_likelihood": 5})
    bar.log({"train/loss": 1.23456}, 10)
    bar.log({"train/loss": 3.5, "train/nfe_forward": 74.0}, 12)
    bar.log({"validation/nll": 3.25, "validation/gap": 0.5, "validation/nll_se": 0.125}, 12)
    bar.log({"plots/density": None}, 12)
    bar.log({"train/loss": 3.25, "train/nfe_forward": 80.0}, 15)
    bar.advance("maximum_likelihood", 15, 1.0)
    bar.close()
    last = capsys.readouterr().err.splitlines()[-1]
    for part in ("maximum_likelihood: 100%", "15/15", "step/s", "loss=3.25", "nfe=80", "nll=3.25", "gap=0.5000±0.1250"):
        assert part in last, last


def test_the_bar_names_a_new_stage_at_its_first_step(capsys):
    bar = ProgressBar({"flow_matching": 10, "maximum_likelihood": 5})
    bar.advance("flow_matching", 10, 0.5)
    bar.advance("maximum_likelihood", 11, 0.6)
    bar.close()
    assert "maximum_likelihood:  73%" in capsys.readouterr().err.splitlines()[-1]


def test_a_resumed_bar_starts_where_the_run_stands(capsys):
    bar = ProgressBar({"flow_matching": 10}, resume_step=4)
    bar.log({"train/loss": 1.0}, 6)
    bar.advance("flow_matching", 6, 0.6)
    bar.close()
    assert "6/10" in capsys.readouterr().err


def test_the_bar_of_a_stage_that_ends_by_time_shows_the_share_of_the_time(capsys):
    bar = ProgressBar({"flow_matching": None})
    bar.advance("flow_matching", 17, 0.25)
    bar.close()
    assert "25/100" in capsys.readouterr().err


def test_the_bar_moves_with_every_step(tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(ProgressBar, "advance", lambda bar, stage, step, done: steps.append(step))
    small_trainer(tmp_path, log_every=0, validate_every=0, progress_bar=True).fit()
    assert list(dict.fromkeys(steps)) == list(range(1, 12))
