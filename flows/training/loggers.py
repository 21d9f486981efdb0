"""Where metrics go: each logger has `log(metrics, step)` and `close()`."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from flows.arguments import checked
from flows.progress import LOG_SECONDS, new_bar
from flows.training.appended import AppendedFile
from flows.training.streams import UnbreakableStream
from flows.writing import write_text

Metric = float | Tensor
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<LEFT, {rate_fmt}{postfix}]"  # as tqdm draws it
OF_THE_RUN = (
    "validation",
    "bits_per_dim",
    "test",
    "plots",
    "config",
    "summary",
)  # groups of metrics that belong to no stage
BAR_LABELS = {  # of a stage first
    "loss": "loss",
    "nfe_forward": "nfe",
    "validation/nll": "nll",
    "validation/bits_per_dim": "bits/dim",
    "validation/gap": "gap",
    "validation/free_energy": "free energy",
    "validation/effective_sample_size": "ESS",
    "validation/score": "score",
}


class MetricMeans:
    """Averages the metrics of steps between two logs.

    `add` sums tensors on their device and never reads them, since reading makes the program wait for a GPU.
    """

    def __init__(self) -> None:
        self._sums: dict[str, float | Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, metrics: Mapping[str, Metric], weight: float = 1.0) -> None:
        """Add the values of one step, multiplied by the `weight` of this process among several."""
        for name, value in metrics.items():
            value = weight * (value.detach() if isinstance(value, Tensor) else float(value))
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def average(self, gather: Callable[[Tensor], Tensor]) -> None:
        """Replace the sums of each process by their mean over the processes; all of them must call this."""
        if self._sums:
            own = torch.tensor([float(total) for total in self._sums.values()], dtype=torch.float64)
            self._sums = dict(zip(self._sums, gather(own).mean(0).tolist(), strict=True))

    def pop(self) -> dict[str, float]:
        """Return the means since the last call, and start again."""
        means = {name: float(total) / self._counts[name] for name, total in self._sums.items()}
        self._sums.clear()
        self._counts.clear()
        return means

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self._sums), "counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sums = dict(state["sums"])
        self._counts = dict(state["counts"])


@checked
@dataclass(frozen=True)
class Layout:
    """How TensorBoard's CUSTOM SCALARS tab groups the curves of a run."""

    charts: Mapping[str, Mapping[str, Sequence[str]]]  # by title: the charts of a group, and the tags of each


@checked
@dataclass(frozen=True)
class HParams:
    """The settings of a run beside its final results, for TensorBoard's HPARAMS tab.

    Example:
        ```python
        import flows

        logger = flows.training.TensorBoardLogger("events")
        logger.log({"hparams": flows.training.HParams({"lr": 1e-3}, {"nll": 1.5})}, step=100)
        logger.close()
        ```
    """

    settings: Mapping[str, Any]  # flat; anything but a number, a bool or a string is written as text
    results: Mapping[str, float | None]  # None: unknown, left out


class Logger(Protocol):
    """Receives numbers, figures, texts and `HParams`, and keeps those that it can show.

    Example:
        ```python
        import flows


        class Printer:
            '''Prints the numbers; any object with these two methods is a `Logger`.'''

            def log(self, metrics, step):
                print(step, {name: value for name, value in metrics.items() if isinstance(value, float)})

            def close(self):
                pass


        reporting = flows.training.Reporting(loggers=[Printer()])
        ```
    """

    def log(self, metrics: Mapping[str, Any], step: int) -> None: ...

    def close(self) -> None: ...


@checked
class JSONLinesLogger:
    """Appends one JSON object a call, `{"step": 20, "flow_matching/loss": 1.4, ...}`; only numbers are kept.

    `pandas.read_json(path, lines=True)` reads the file. A number that is not finite is written as null. A disk that
    fails delays lines and never ends the run, see `AppendedFile`.

    Args:
        path: the file.
        resume_step: drop the lines of later steps, which the resumed run will write again.
        resume_count: keep so many lines. Where there are fewer, `resume_step` decides.

    Attributes:
        count: of the lines.

    Example:
        ```python
        import flows

        logger = flows.training.JSONLinesLogger("metrics.jsonl")
        logger.log({"train/loss": 1.4}, step=20)
        logger.close()
        flows.training.read_metrics("metrics.jsonl")  # {"train/loss": [(20, 1.4)]}
        ```
    """

    def __init__(
        self, path: str | os.PathLike[str], resume_step: int | None = None, resume_count: int | None = None
    ) -> None:
        path = Path(path)
        self.count = 0
        if resume_step is not None and path.exists():
            if resume_count is not None and _cut(path, resume_count):
                self.count = resume_count
            else:
                rows = [json.dumps(row) + "\n" for row in _rows(path) if row["step"] <= resume_step]
                write_text(path, "".join(rows))
                self.count = len(rows)
        self.file = AppendedFile(path)

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        row = {name: float(value) for name, value in metrics.items() if isinstance(value, (int, float))}
        if row:
            finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
            self.count += 1
            self.file.write((json.dumps({"step": step, **finite}) + "\n").encode())

    def close(self) -> None:
        self.file.close()


@checked
class ProgressBar:
    """A bar on the terminal that shows the stage, the loss, the evaluations and the steps per second.

    Args:
        stages: number of steps of each stage, in order; None for one that ends by time.
        resume_step: the step that a resumed run starts from.
        remaining: returns the seconds that the whole run still takes, None where they are unknown.

    Example:
        ```python
        import flows

        bar = flows.training.ProgressBar({"flow_matching": 100})
        bar.close()
        ```
    """

    def __init__(
        self,
        stages: Mapping[str, int | None],
        resume_step: int | None = None,
        remaining: Callable[[], float | None] | None = None,
    ) -> None:
        self._shown: dict[str, str] = {}
        self._counts_steps = None not in stages.values()
        counted = {"total": sum(steps or 0 for steps in stages.values()), "initial": resume_step or 0, "unit": "step"}
        self._bar = new_bar(
            kind=_Bar,
            **(counted if self._counts_steps else {"total": 100, "unit": "%"}),
            dynamic_ncols=True,
            mininterval=0.2,
            file=UnbreakableStream(sys.stderr),  # type: ignore[arg-type]
        )
        self._bar.remaining = remaining
        self._warnings = contextlib.ExitStack()
        self._warnings.enter_context(warnings_above_bars())

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Show the numbers that have a place on the bar."""
        del step
        known = {**metrics, **training_curves(metrics, prefix="")}
        new = {label: f"{known[name]:.4g}" for name, label in BAR_LABELS.items() if name in known}
        if not new or self._bar.disable:
            return
        if len(new) > 1:
            new.pop("score", None)  # it has a name of its own
        error = metrics.get("validation/nll_se")
        if "gap" in new and error is not None:
            new["gap"] = f"{metrics['validation/gap']:.4f}±{error:.4f}"
        if "loss" in new and "nfe" not in new:
            self._shown.pop("nfe", None)  # this stage solves no ODE
        self._shown.update(new)
        self._bar.set_postfix(self._shown, refresh=False)

    def advance(self, stage: str, step: int, done: float) -> None:
        """Show that `step`, or the share `done` of the run, is over."""
        self._bar.set_description(stage, refresh=False)
        self._bar.update((step if self._counts_steps else int(100 * done)) - self._bar.n)

    def pause(self, activity: str) -> None:
        """Show at a terminal what goes on between two steps."""
        self._bar.set_description(activity, refresh=self._bar.mininterval < LOG_SECONDS)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._warnings.close()
        self._bar.close()


class _Bar(tqdm):
    """A bar whose remaining time is given: steps of other stages, validation and the test count."""

    remaining: Callable[[], float | None] | None = None

    @property
    def format_dict(self) -> Mapping[str, Any]:  # type: ignore[override]
        shown = super().format_dict
        seconds = None if self.remaining is None else self.remaining()
        left = "?" if seconds is None else tqdm.format_interval(seconds)
        return {**shown, "bar_format": BAR.replace("LEFT", left)}


@contextlib.contextmanager
def warnings_above_bars() -> Iterator[None]:
    """While entered, print warnings of the package to stderr, above progress bars instead of into them.

    What is being compiled is printed, too, since nothing else moves meanwhile. A handler that the program has given the
    logger `flows` takes precedence.
    """
    logger, handler = logging.getLogger("flows"), _AboveBars()
    compilations = logging.getLogger("flows.compilations")
    if logger.handlers:
        yield
        return
    logger.addHandler(handler)
    level = compilations.level
    compilations.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        compilations.setLevel(level)


class _AboveBars(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        stream: Any = UnbreakableStream(sys.stderr)
        kind = f"{record.levelname.capitalize()}: " if record.levelno >= logging.WARNING else ""
        tqdm.write(f"{kind}{record.getMessage()}", file=stream)


@checked
def read_metrics(path: str | os.PathLike[str]) -> dict[str, list[tuple[int, float]]]:
    """Read the curves of a JSON-lines file: for each metric its (step, value) pairs.

    Example:
        ```python
        import flows

        logger = flows.training.JSONLinesLogger("metrics.jsonl")
        logger.log({"train/loss": 1.4}, step=20)
        logger.close()
        flows.training.read_metrics("metrics.jsonl")  # {"train/loss": [(20, 1.4)]}
        ```
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in _rows(Path(path)):
        for name, value in row.items():
            if name != "step" and value is not None:
                curves.setdefault(name, []).append((row["step"], value))
    return curves


@checked
def training_curves(metrics: Mapping[str, Any], prefix: str = "train/") -> dict[str, Any]:
    """Return what stages log, `flow_matching/loss`, under the same names for all of them, `train/loss`.

    Curves of several stages, lists of (step, value) pairs, are joined.
    """
    joined: dict[str, Any] = {}
    for name, value in metrics.items():
        group, _, own = name.partition("/")
        if not own or group in OF_THE_RUN:
            continue
        key = prefix + own
        joined[key] = sorted([*joined[key], *value]) if key in joined and isinstance(value, list) else value
    return joined


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values as one level with dotted names; a list stays one value."""
    level: dict[str, Any] = {}
    for name, value in nested.items():
        level |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return level


def _rows(path: Path) -> list[dict[str, Any]]:
    """Read the whole lines of a metrics file; damaged ones, and half a line at the end, are passed over."""
    rows, lines = [], path.read_bytes().splitlines()
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


def _cut(path: Path, count: int) -> bool:
    """Keep the first `count` lines; returns whether there were so many."""
    size = 0
    with path.open("rb") as file:
        for _ in range(count):
            line = file.readline()
            if not line.endswith(b"\n"):
                return False
            size += len(line)
    if path.stat().st_size > size:
        os.truncate(path, size)
    return True
