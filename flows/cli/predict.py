"""`flows predict`: states of a trained neural ODE at any times, with their errors, in a file."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor

from flows.checks import whole_number
from flows.cli.config import check_output, plain_settings, run_with_hydra, with_changes
from flows.cli.errors import readable_errors
from flows.cli.grammar import readable_arguments
from flows.cli.initial import Initial, check_size, read_initial, read_times
from flows.errors import InvalidTypeError
from flows.models.neural_ode import NeuralODE
from flows.predictions import model_device, predictive_sd
from flows.training.files import run_folder
from flows.training.loading import LoadedRun, load_run, place
from flows.training.settings import instantiate
from flows.writing import write_result

SHOWN = 3  # series in the picture


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program; `arguments` are those of the command line by default."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with readable_errors("predict", arguments):
        run_with_hydra(predict, "predict", readable_arguments(arguments))


def predict(composed: DictConfig) -> None:
    """Predict with the composed settings."""
    with readable_errors():
        settings = plain_settings(composed)
        check_output(settings["output"], ".csv")
        whole_number("batch_size", settings["batch_size"])
        times = read_times(settings["times"])
        run = load_run(settings["checkpoint"], settings["trust"])
        model = neural_ode_of(run)
        config = with_changes(run.config, {"solver": settings.get("solver")})
        model.solver = instantiate(config["solver"], "solver")
        data = run.config.get("data") or {}
        columns = run.data.get("columns") or [f"x{i}" for i in range(math.prod(model.event_shape))]
        initial = read_initial(
            settings["initial"],
            columns,
            model.event_shape,
            settings["context"],
            run.context_shape,
            data.get("context_columns") or (),
            settings["id"],
            _columns_of_inputs(run),
            data.get("id"),
        )
        check_size(len(initial.ids), len(times), len(columns))
        place(model, settings["device"], settings["dtype"])
        states, error, sd = _solved(model, initial, times, settings["batch_size"])
        default = run_folder(run.checkpoint) / "predictions" / f"{datetime.now():%Y-%m-%d_%H-%M-%S_%f}.csv"
        output = Path(settings["output"] or default)
        write_result(output, "".join(_lines(initial.ids, times, columns, states, error, sd)))
        span = f"t = {times[0].item():g} to {times[-1].item():g}"
        print(f"{len(initial.ids):,} x {len(times):,} states, {span}, in {output}")
        told = error[~error.isnan()]
        print(f"largest solver error {told.max().item():.1e}" if len(told) else "the solver error is unknown")
        if (beyond := _beyond(times, run.data.get("training_span"))) is not None:
            print(beyond)
        if settings["plot"]:
            print(f"picture in {_draw(output, initial, times, columns, states, error, sd)}")


def neural_ode_of(run: LoadedRun) -> NeuralODE:
    """The model of a run, which must be a neural ODE.

    Raises:
        InvalidTypeError: it is another one.
    """
    if not isinstance(run.model, NeuralODE):
        raise InvalidTypeError(
            f"{run.checkpoint} holds a {type(run.model).__name__}, and only a flows.NeuralODE predicts "
            "states; draw from a flow with: flows sample checkpoint=..."
        )
    return run.model


def _columns_of_inputs(run: LoadedRun) -> list[str]:
    """The columns of a table of inputs, of a run with `data.input_columns`; else none."""
    data = run.config.get("data") or {}
    inputs = run.data.get("input_columns") or []
    return [str(data.get("time", "time")), *inputs, *map(str, data.get("context_columns") or ())] if inputs else []


def _solved(model: NeuralODE, initial: Initial, times: Tensor, batch_size: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """States, solver errors and standard deviations of observations, (N, T, d) each, in float64 on the CPU."""
    device, parts = model_device(model), []
    dtype = model.dtype if device.type == "mps" else torch.float64
    with torch.no_grad():
        for rows in torch.arange(len(initial.ids)).split(batch_size):
            context = None if initial.context is None else initial.context[rows].to(device, dtype)
            path = model.trajectory(initial.states[rows].to(device, dtype), times.to(device, dtype), context)
            assert path.solver_error is not None  # as asked for
            sd = predictive_sd(model, path.states)
            parts.append([part for part in (path.states, path.solver_error, sd) if part is not None])
    states, error, *sd = (torch.cat(each).flatten(2).double().cpu() for each in zip(*parts, strict=True))
    return states, error, sd[0] if sd else None


def _beyond(times: Tensor, span: float | None) -> str | None:
    """Say which states lie beyond the time that training series took; None if none do, or nothing is known."""
    late = times[(times - times[0]).abs() > (math.inf if span is None else span * (1 + 1e-9))]
    if not len(late):
        return None
    return (
        f"{len(late):,} of {len(times):,} times, from t = {late[0].item():g} on, lie further from the start than any "
        f"training series went ({span:.4g}): nothing was learned about such predictions, and the solver error does not "
        "tell their error"
    )


def _lines(
    ids: Sequence[str], times: Tensor, columns: Sequence[str], states: Tensor, error: Tensor, sd: Tensor | None
) -> Iterator[str]:
    """The lines of a .csv in long form."""
    names = [*columns, *(f"{name}_solver_error" for name in columns)]
    names += [] if sd is None else [f"{name}_sd" for name in columns]
    yield ",".join(map(_field, ["id", "time", *names])) + "\n"
    table = torch.cat([states, error] if sd is None else [states, error, sd], 2)
    for label, rows in zip(ids, table.tolist(), strict=True):
        for t, row in zip(times.tolist(), rows, strict=True):
            numbers = ",".join("" if math.isnan(value) else f"{value:.9g}" for value in row)
            yield f"{_field(label)},{t:.12g},{numbers}\n"


def _field(text: str) -> str:
    return '"' + text.replace('"', '""') + '"' if any(sign in text for sign in ',"\n\r') else text


def _draw(
    output: Path,
    initial: Initial,
    times: Tensor,
    columns: Sequence[str],
    states: Tensor,
    error: Tensor,
    sd: Tensor | None,
) -> Path:
    from flows import plots  # slow to import

    shown = min(SHOWN, len(initial.ids))
    drawn = plots.SeriesPrediction(
        times=times.expand(shown, -1),
        states=states[:shown],
        solver_error=error[:shown].nan_to_num(0.0),
        sd=None if sd is None else sd[:shown],
        names=list(columns),
        labels=initial.ids[:shown],
    )
    return write_result(output.with_suffix(".png"), plots.time_series(drawn))
